"""Changes as the page's address says them, and as the engine takes them.

dense:layer     the student, this layer dense again           dense:block     this block
only:layer      the teacher, only this layer binarized        only:block      this block
first:12        blocks 0 to 11 binarized
levels:a,b,c,d  the student, the levels of this group changed; levels: as they are
bits:4, bits:w1 the student, this layer quantized anew
"""

from __future__ import annotations

from dataclasses import dataclass

from app.microscope.state import place_words
from lbllm.errors import ConfigError
from lbllm.json_input import shortened
from lbllm.labels import FORMAT_NAMES
from lbllm.microscope.address import Address
from lbllm.microscope.hybrid import Bits, Choice, Dense, Edited, FirstBlocks, Only
from lbllm.microscope.microscope import Microscope
from lbllm.sections import Format

KINDS: dict[str, str] = {
    "dense": "Dense again",
    "only": "Only it binarized",
    "first": "First blocks",
    "levels": "Levels by hand",
    "bits": "Other bits",
}
ROUNDED = ("1", "2", "3", "4", "6", "8")
# Levels by hand are at most so large: larger ones overflow in the layers behind.
MOST = 1000.0
FORMATS: dict[str, Format] = {name.replace("+", ""): name for name in FORMAT_NAMES}


@dataclass(frozen=True)
class Change:
    """One change: a kind of ``KINDS`` and what it needs besides the place."""

    kind: str
    detail: str

    @classmethod
    def parse(cls, text: str) -> Change:
        """Read a change. Raises ConfigError, with the text, if it is not one."""
        kind, _, detail = text.partition(":")
        right = {
            "dense": detail in ("layer", "block"),
            "only": detail in ("layer", "block"),
            "first": detail.isascii() and detail.isdigit() and len(detail) < 5,
            "levels": not detail or _levels(detail) is not None,
            "bits": detail in ROUNDED or detail in FORMATS,
        }
        if not right.get(kind, False):
            raise ConfigError(
                f"{shortened(text)} is not a change; write for example dense:layer, only:block, first:12, "
                "levels:-0.1,0,0.1,0.2 or bits:4"
            )
        return cls(kind, detail)

    def __str__(self) -> str:
        return f"{self.kind}:{self.detail}"

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The levels by hand; None if they are as they were."""
        return _levels(self.detail) if self.kind == "levels" else None


def _levels(text: str) -> tuple[float, ...] | None:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        return None
    return found if len(found) in (2, 4) and all(abs(level) <= MOST for level in found) else None


def missing(change: Change, at: Address) -> str:
    """What has to be chosen before the change means something; empty if nothing is missing."""
    if change.kind in ("dense", "only") and at.block is None:
        return "Choose a layer or a block on the map."
    if change.kind == "levels" and at.group is None:
        return "Choose a layer on the map, then in Weights a group of it: its levels can be changed here."
    return "Choose a layer on the map." if change.kind == "bits" and at.layer is None else ""


def choice_of(change: Change, at: Address, scope: Microscope, levels: tuple[float, ...]) -> Choice:
    """The change as the engine takes it; ``levels``: those of the group, if they are not changed by hand."""
    layer = None if change.detail == "block" else at.layer
    if change.kind == "first":
        return FirstBlocks(min(int(change.detail), scope.blocks))
    assert at.block is not None
    if change.kind == "dense":
        return Dense(at.block, layer)
    if change.kind == "only":
        return Only(at.block, layer)
    assert at.layer is not None
    if change.kind == "levels":
        return Edited(str(at), change.levels or levels)
    if change.detail in ROUNDED:
        return Bits(at.block, at.layer, int(change.detail))
    fmt = scope.layer(at).fmt
    return Bits(at.block, at.layer, fmt.model_copy(update={"format": FORMATS[change.detail]}))


def name_of(change: Change, at: Address) -> str:
    """The hybrid of a change in a few words."""
    place = place_words(Address(at.block, None if change.detail == "block" else at.layer))
    if change.kind == "first":
        return f"First {change.detail} blocks binarized"
    if change.kind == "levels":
        return f"Levels of {_inner(place_words(at))} by hand"
    if change.kind == "bits":
        kind = FORMAT_NAMES[FORMATS[change.detail]] if change.detail in FORMATS else f"{change.detail} bits"
        return f"{place} in {kind}"
    return f"{place} dense again" if change.kind == "dense" else f"Only {_inner(place)} binarized"


def _inner(place: str) -> str:
    """A place inside a sentence."""
    return place[0].lower() + place[1:]
