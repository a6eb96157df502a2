"""A target in words: "70 MB", "2.6 bits", "4 GB of memory"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lbllm.errors import ConfigError
from lbllm.json_input import shown
from lbllm.units import size

Kind = Literal["bits", "file", "memory"]
EXAMPLES = '"2.6 bits", "70 MB" or "4 GB of memory"'
_BITS = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:bits?|bpw)(?:\s*(?:a|per|/)\s*weight)?", re.IGNORECASE)
_BYTES = re.compile(r"(\d+(?:[.,]\d+)?)\s*([kmgt]i?b)(\s+(?:of\s+)?(?:memory|ram))?", re.IGNORECASE)
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Target:
    """What a plan may take at most. ``bits``: bits per binarized weight. ``file``: bytes of the checkpoint's weights.
    ``memory``: bytes of the finished model while it answers."""

    kind: Kind
    amount: float

    @property
    def words(self) -> str:
        """The target as people write it."""
        if self.kind == "bits":
            return f"{self.amount:g} bits per weight"
        return size(self.amount) + (" of memory" if self.kind == "memory" else "")


def parse_target(text: str) -> Target:
    """Read a target. Raises ConfigError with examples for anything else."""
    words = text.strip()
    if found := _BITS.fullmatch(words):
        target = Target("bits", _number(found[1]))
    elif found := _BYTES.fullmatch(words):
        target = Target("memory" if found[3] else "file", _number(found[1]) * _UNITS[found[2].lower()])
    else:
        raise ConfigError(f"target {shown(text)} can't be read; give for example {EXAMPLES}")
    if target.amount <= 0:
        raise ConfigError(f"target {shown(text)} is nothing; give for example {EXAMPLES}")
    return target


def _number(text: str) -> float:
    return float(text.replace(",", "."))
