"""Times of work that is done again and again, in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def best_seconds(work: Callable[[], object], seconds: float) -> float:
    """The fastest of the repetitions that fit in ``seconds``, after one to warm up."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def median_seconds(works: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Each work's median time, of five turns or more; they take turns for ``seconds`` in all."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[-1]) < 5:
        for work, kept in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in times]
