"""Runs as a list shows them: what each is and has measured, which of them are wanted, and in which order.

listed = [describe(run, view, note, now) for ...]
ordered(matching(listed, Wanted(words="g16", tags=("paper",))), "bits")
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from lbllm.config import RunConfig
from lbllm.errors import RunError
from lbllm.events import Evaluated
from lbllm.labels import format_name
from lbllm.runs.notes import Note
from lbllm.runs.store import Run, State
from lbllm.runs.view import RunView
from lbllm.sections import STAGES, Stage

Order = Literal["newest", "oldest", "name", "state", "bits", "size", "perplexity", "time"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class Listed:
    """A run with all that a list says of it. ``config``: None if the settings can't be read. ``teacher``: equal for
    runs of one teacher. ``measured``: by text, the newest evaluation of the latest stage that was evaluated on it;
    ``teachers``: the same of the teacher. Sizes in bytes, ``seconds`` of work, seconds ``left``;
    None: not known."""

    run: Run
    note: Note
    config: RunConfig | None = None
    teacher: str = ""
    bits: float | None = None
    size: int | None = None
    speed: float | None = None
    machine: str | None = None
    seconds: float = 0.0
    left: float | None = None
    parts: tuple[int, int] = (0, 0)
    measured: dict[str, Evaluated] = field(default_factory=dict)
    teachers: dict[str, Evaluated] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """The model's name, a path shortened to its last part."""
        if self.config is None:
            return None
        name = self.config.model
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def format(self) -> str | None:
        """What the run quantizes, and to how many bits."""
        return None if self.config is None else format_name(self.config, self.config.stages[-1])

    @property
    def latest(self) -> Evaluated | None:
        """The evaluation that was measured last."""
        return next(reversed(self.measured.values()), None)

    @property
    def progress(self) -> float:
        """The share of its parts that is finished, 0 to 1."""
        done, parts = self.parts
        return done / parts if parts else 0.0


def describe(run: Run, view: RunView, note: Note, now: float, expected: Mapping[Stage, float] | None = None) -> Listed:
    """A run as lists show it, from its ``view`` inside ``caught_up``. ``now``: seconds since the epoch; ``expected``:
    the estimated seconds of each stage, for the time left before the run's first blocks tell it."""
    config = settings(run)
    measured: dict[str, Evaluated] = {}
    teachers: dict[str, Evaluated] = {}
    for event in view.evaluations:
        if event.what == "teacher":
            teachers[event.text] = event
        elif event.what in STAGES:
            known = measured.pop(event.text, event)
            later = STAGES.index(event.what) >= STAGES.index(known.what)
            measured[event.text] = event if later else known
    result, begun = view.result, view.started
    return Listed(
        run,
        note,
        config,
        teacher_key(run, config),
        result.bpw if result is not None else begun.bpw if begun is not None else None,
        result.disk_bytes if result is not None else None,
        view.speed.tokens_per_second if view.speed is not None else None,
        view.speed.machine if view.speed is not None else None,
        view.elapsed(now if run.state == "running" else view.last_time),
        view.seconds_left(now, expected or {}) if run.state == "running" else None,
        view.parts,
        measured,
        teachers,
    )


def settings(run: Run) -> RunConfig | None:
    """The run's settings; None if they can't be read. They never change, so a file is read once."""
    try:
        changed = (run.folder / "config.json").stat().st_mtime_ns
    except OSError:
        return None
    return _settings(run, changed)


@lru_cache(maxsize=1000)
def _settings(run: Run, changed: int) -> RunConfig | None:
    try:
        return run.config
    except RunError:
        return None


def teacher_key(run: Run, config: RunConfig | None) -> str:
    """A text that is equal for two runs of one teacher: the hash of what the run's folder says of the teacher's
    weights, or, of a run that has not got so far, the model's name, or its place where it is a path."""
    try:
        return hashlib.sha256((run.folder / "teacher.json").read_bytes()).hexdigest()
    except OSError:
        name = config.model if config is not None else ""
        return str(run.cwd / name) if name and (run.cwd / name).exists() else name.lower()


@dataclass(frozen=True)
class Wanted:
    """Which runs of a list are wanted; what is empty excludes no run. ``words``: each must be part of the name, id,
    note, tags, model or format; ``tags``: all of them; ``states``, ``models``: one of them."""

    words: str = ""
    tags: tuple[str, ...] = ()
    states: tuple[State, ...] = ()
    models: tuple[str, ...] = ()

    def includes(self, one: Listed) -> bool:
        """Whether a run is wanted."""
        told = (one.run.name, one.run.id, one.note.text, *one.note.tags, one.model or "", one.format or "")
        text = "\n".join(told).casefold()
        return (
            all(word in text for word in self.words.casefold().split())
            and {tag.casefold() for tag in self.tags} <= {tag.casefold() for tag in one.note.tags}
            and (not self.states or one.run.state in self.states)
            and (not self.models or one.model in self.models)
        )


def matching(listed: Iterable[Listed], wanted: Wanted) -> list[Listed]:
    """The wanted runs, in the order in which they are given."""
    return [one for one in listed if wanted.includes(one)]


def ordered(listed: Sequence[Listed], order: Order) -> list[Listed]:
    """The runs in an order; the newest first where it decides nothing, and last those without the value.

    Perplexities are compared within one teacher and text: runs of the teacher and text that most runs have come first.
    """
    newest = sorted(listed, key=lambda one: (one.run.created, one.run.id), reverse=True)
    if order == "newest":
        return newest
    if order == "oldest":
        return newest[::-1]
    counts: dict[tuple[str, str], int] = {}
    for one in newest:
        if one.latest is not None:
            counts[one.teacher, one.latest.text] = counts.get((one.teacher, one.latest.text), 0) + 1

    def perplexity(one: Listed) -> Any:
        if one.latest is None:
            return None
        group = (one.teacher, one.latest.text)
        return -counts[group], *group, one.latest.perplexity

    keys: dict[Order, Callable[[Listed], Any]] = {
        "name": lambda one: one.run.name.casefold(),
        "state": lambda one: get_args(State).index(one.run.state),
        "bits": lambda one: one.bits,
        "size": lambda one: one.size,
        "perplexity": perplexity,
        "time": lambda one: -one.seconds,
    }
    key = keys[order]
    known = [one for one in newest if key(one) is not None]
    return sorted(known, key=key) + [one for one in newest if key(one) is None]


def scales(listed: Iterable[Listed]) -> set[tuple[str, str]]:
    """The teachers and texts of the runs' latest perplexities: those of two of them can't be compared."""
    return {(one.teacher, one.latest.text) for one in listed if one.latest is not None}
