"""Intervals of means and of their differences by the paired bootstrap (Efron 1979).

    rows = numpy.stack([first, second], axis=1)
    means = resampled_means([rows])                    (samples, 2)
    interval(means[:, 1] - means[:, 0], len(rows))

A row holds what several models got on one window or one question. Whole rows are drawn with replacement, so the models
keep the same windows in every sample: what is hard for all of them cancels in a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy

SAMPLES = 4_000
LEVEL = 0.95
_DRAWN = 2_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """An interval that holds the true value in a share of ``LEVEL`` of cases, if the rows are like others."""

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


def interval(values: numpy.ndarray, rows: int) -> Interval:
    """Return the expanded percentile interval of values (samples,) that were resampled from ``rows`` rows, at least 2.

    The plain percentile interval is too narrow for few rows: of a mean of ten, it holds the true value in 90% of cases
    instead of 95%. So each of its tails is Phi(-sqrt(n / (n - 1)) t), with Student's t for n - 1 degrees of freedom
    (Hesterberg 2015).
    """
    tail = tail_share(rows)
    low, high = numpy.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def tail_share(rows: int) -> float:
    """Return the share of resampled values that each tail of the interval leaves out. Raises ValueError below 2 rows.

    Student's t is that of its expansion in 1 / (n - 1), within 1% from four rows on (Abramowitz and Stegun 26.7.5).
    """
    if rows < 2:
        raise ValueError(f"an interval needs at least 2 rows, not {rows}")
    normal, freedom = NormalDist(), rows - 1
    z = normal.inv_cdf((1 + LEVEL) / 2)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return normal.cdf(-math.sqrt(rows / freedom) * t)
