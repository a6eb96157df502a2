"""Sizes and durations as text."""

from __future__ import annotations

import pytest

from lbllm.units import duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (3.62, "3.6 s"), (12.3, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (92_100_000, "92.1 MB"), (1.39e9, "1.39 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text
