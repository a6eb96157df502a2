"""Intervals of means and of their differences by the paired bootstrap (Efron 1979).

    means = resampled_means([numpy.stack([first, second], axis=1)])     (samples, 2)
    interval(means[:, 1] - means[:, 0])

A row holds what several models got on one window or one question. Whole rows are drawn with replacement, so the models
keep the same windows in every sample: what is hard for all of them cancels in a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

SAMPLES = 4_000
LEVEL = 0.95
_DRAWN = 2_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """The interval that holds ``LEVEL`` of the resampled values."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is told apart from none."""
        return self.low > 0 or self.high < 0


def resampled_means(strata: Sequence[numpy.ndarray], *, seed: int = 0, samples: int = SAMPLES) -> numpy.ndarray:
    """Return the mean over strata of the means of resampled rows, float64 (samples, k), for rows (n, k) of each.

    Rows are drawn within their stratum (one task, for example), each of which counts the same. The same ``seed``, the
    same samples. Raises ValueError if there is no stratum, or one without rows.
    """
    if not strata or any(len(rows) == 0 for rows in strata):
        raise ValueError("the bootstrap needs at least one row in every stratum")
    generator = numpy.random.default_rng(seed)
    total = numpy.zeros((samples, strata[0].shape[1]))
    for rows in strata:
        values, count = numpy.asarray(rows, dtype=numpy.float64), len(rows)
        step = max(1, _DRAWN // count)
        for start in range(0, samples, step):
            drawn = generator.integers(0, count, (min(step, samples - start), count))
            total[start : start + len(drawn)] += values[drawn].mean(axis=1)
    return total / len(strata)


def interval(values: numpy.ndarray) -> Interval:
    """Return the percentile interval of resampled values (samples,)."""
    low, high = numpy.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
