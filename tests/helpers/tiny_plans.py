"""Plans of tiny models in a second: little text, and few formats to choose from."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from lbllm.planning import measuring
from lbllm.planning.candidates import ANCHORS, REFERENCE, made, weight_format
from lbllm.sections import LayerFormat

FEW = (*ANCHORS, REFERENCE, made("w1", 16, 4), made("w1+1", -1, 4), made("w1+1", 16, 4), made("w1+1+1", 16, 4))


def few_formats(own: Iterable[LayerFormat] = ()) -> tuple[LayerFormat, ...]:
    """Some candidates, with the layers' own formats."""
    return tuple(dict.fromkeys([*FEW, *map(weight_format, own)]))


def quick_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans in this process measure little."""
    monkeypatch.setattr(measuring, "candidates", few_formats)
    for name, number in (("SEQ_LEN", 32), ("TOKENS", 256), ("JUDGED", 128), ("SPREAD", 2)):
        monkeypatch.setattr(measuring, name, number)
