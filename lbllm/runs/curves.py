"""Curves of losses for charts: thinned out to few points, and smoothed."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_POINTS = 800


def points(values: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[int], list[float | None]]:
    """At most ``limit`` points (step, value), with every peak: the least and the greatest value of each bin of steps.

    Steps count from 1. A bin is a fixed range of steps. Its length is a power of two, so new values change only the
    last bin until the number of steps has doubled. A value that is not finite becomes None, a gap.
    """
    width = 1
    while math.ceil(len(values) / width) * min(width, 2) > limit:
        width *= 2
    steps: list[int] = []
    kept: list[float | None] = []
    for start in range(0, len(values), width):
        part = range(start, min(start + width, len(values)))
        finite = [step for step in part if math.isfinite(values[step])]
        if finite:
            chosen = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        for step in sorted(chosen) if finite else part[:1]:
            steps.append(step + 1)
            kept.append(values[step] if finite else None)
    return steps, kept


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """A running mean over about ``share`` of the steps, at least 4; it skips values that are not finite."""
    weight = 1 / max(4.0, share * len(values))
    mean = total = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            # The first values are averaged over their number, or they would be pulled towards zero.
            total += weight * (1 - total)
            mean += (value - mean) * weight / total
        result.append(mean if total else math.nan)
    return result
