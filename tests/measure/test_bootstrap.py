"""The paired bootstrap against all resamples of a few rows, counted one by one."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbllm.measure.bootstrap import LEVEL, interval, resampled_means, tail_share
from tests.helpers.cases import cases


def every_resample(strata: list[numpy.ndarray]) -> numpy.ndarray:
    """The mean over strata of the means of each possible resample, all equally likely."""
    each = [
        [rows[list(drawn)].mean(axis=0) for drawn in itertools.product(range(len(rows)), repeat=len(rows))]
        for rows in strata
    ]
    return numpy.array([numpy.mean(one, axis=0) for one in itertools.product(*each)])


@given(seed=st.integers(0, 10_000), sizes=st.sampled_from([(5,), (4,), (3, 3), (2, 4)]))
@cases(12)
def test_resamples_are_distributed_as_all_of_them_are(seed: int, sizes: tuple[int, ...]) -> None:
    generator = numpy.random.default_rng(seed)
    strata = [generator.normal(size=(size, 2)) for size in sizes]
    exact = every_resample(strata)
    drawn = resampled_means(strata, seed=seed, samples=4_000)
    assert drawn.mean(0) == pytest.approx(numpy.mean([rows.mean(0) for rows in strata], axis=0), abs=0.1)
    assert drawn.std(0) == pytest.approx(exact.std(0), rel=0.1)
    # Paired: each sample has one difference, of the same rows for both.
    apart, wanted = drawn[:, 1] - drawn[:, 0], exact[:, 1] - exact[:, 0]
    rows = sum(sizes)
    found = interval(apart, rows)
    for bound, share in ((found.low, tail_share(rows)), (found.high, 1 - tail_share(rows))):
        assert (wanted < bound - 1e-9).mean() <= share + 0.02
        assert (wanted <= bound + 1e-9).mean() >= share - 0.02


def test_what_is_hard_for_both_cancels() -> None:
    hard = numpy.random.default_rng(0).normal(size=50) * 100
    drawn = resampled_means([numpy.stack([hard, hard + 1], axis=1)])
    apart, alone = interval(drawn[:, 1] - drawn[:, 0], 50), interval(drawn[:, 1], 50)
    assert apart.low == pytest.approx(1)
    assert apart.excludes_zero
    assert alone.high - alone.low > 10


@pytest.mark.parametrize("rows", [6, 10, 40])
def test_the_interval_holds_the_true_value_as_often_as_it_says(rows: int) -> None:
    generator = numpy.random.default_rng(rows)
    held = []
    for seed in range(400):
        drawn = resampled_means([generator.normal(size=(rows, 1))], seed=seed, samples=2_000)[:, 0]
        found = interval(drawn, rows)
        held.append(found.low <= 0 <= found.high)
    assert numpy.mean(held) == pytest.approx(LEVEL, abs=0.03)


def test_tails_are_those_of_student_s_t() -> None:
    # t for 95% with 3, 9 and 99 degrees of freedom, from tables.
    for rows, t in ((4, 3.182), (10, 2.262), (100, 1.984)):
        wanted = NormalDist().cdf(-math.sqrt(rows / (rows - 1)) * t)
        assert tail_share(rows) == pytest.approx(wanted, rel=0.15)
    assert tail_share(10**6) == pytest.approx(0.025, rel=1e-3)
    with pytest.raises(ValueError, match="at least 2 rows"):
        tail_share(1)


def test_the_same_seed_gives_the_same_samples_and_every_stratum_counts_the_same() -> None:
    few, many = numpy.ones((2, 1)), numpy.zeros((9, 1))
    assert resampled_means([few, many]).tolist() == [[0.5]] * 4_000
    rows = numpy.arange(8.0)[:, None]
    assert (resampled_means([rows], seed=3) == resampled_means([rows], seed=3)).all()
    assert (resampled_means([rows], seed=3) != resampled_means([rows], seed=4)).any()
    for empty in ([], [few, few[:0]]):
        with pytest.raises(ValueError, match="at least one row"):
            resampled_means(empty)
