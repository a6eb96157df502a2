"""A teacher rounded to nearest, as one of the models of an evaluation: the plainest method, for comparison.

    name = rounded_name("smollm2-135m-instruct", 2, 16)      "round-to-nearest:2:16:smollm2-135m-instruct"
    load_any(name)

Its dense weights need memory as the teacher's do. It is no checkpoint: only evaluations know these names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lbllm.baselines.rtn import round_to_nearest
from lbllm.chat.pool import Loaded, load_model
from lbllm.sections import WHOLE_ROW

_NAME = re.compile(r"round-to-nearest:([1-8]):(-1|[1-9]\d{0,6}):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Rounded:
    """``teacher`` with all linear layers of its blocks rounded to 2^``bits`` even levels in each group of weights."""

    teacher: str
    bits: int
    group_size: int

    @property
    def title(self) -> str:
        """The model as people read it."""
        groups = "whole rows" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        return f"Round to nearest, W{self.bits}A16, {groups}"

    @property
    def stored_bits(self) -> float | None:
        """Bits per weight with each group's minimum and step in 16 bits; None for whole rows of unknown length."""
        return None if self.group_size == WHOLE_ROW else self.bits + 32 / self.group_size


def rounded_name(teacher: str, bits: int, group_size: int) -> str:
    """The name of a rounded teacher in an evaluation."""
    return f"round-to-nearest:{bits}:{group_size}:{teacher}"


def rounded(name: str) -> Rounded | None:
    """What a name of ``rounded_name`` says; None for the name of another model."""
    found = _NAME.fullmatch(name)
    return None if found is None else Rounded(found[3], int(found[1]), int(found[2]))


def load_any(name: str) -> Loaded:
    """``load_model``, also for a name of ``rounded_name``. Raises LbllmError."""
    found = rounded(name)
    if found is None:
        return load_model(name)
    loaded = load_model(found.teacher)
    model = round_to_nearest(loaded.model, found.bits, found.group_size)
    return replace(loaded, model=model, precision=found.title)
