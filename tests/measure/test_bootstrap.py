"""The paired bootstrap against all resamples of a few rows, counted one by one."""

from __future__ import annotations

import itertools

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbllm.measure.bootstrap import LEVEL, interval, resampled_means
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
    found = interval(apart)
    for bound, share in ((found.low, (1 - LEVEL) / 2), (found.high, (1 + LEVEL) / 2)):
        assert (wanted < bound - 1e-9).mean() <= share + 0.02
        assert (wanted <= bound + 1e-9).mean() >= share - 0.02


def test_what_is_hard_for_both_cancels() -> None:
    hard = numpy.random.default_rng(0).normal(size=50) * 100
    drawn = resampled_means([numpy.stack([hard, hard + 1], axis=1)])
    assert interval(drawn[:, 1] - drawn[:, 0]).low == pytest.approx(1)
    assert interval(drawn[:, 1]).high - interval(drawn[:, 1]).low > 10
    assert interval(drawn[:, 1] - drawn[:, 0]).excludes_zero


def test_the_same_seed_gives_the_same_samples_and_every_stratum_counts_the_same() -> None:
    few, many = numpy.ones((2, 1)), numpy.zeros((9, 1))
    assert resampled_means([few, many]).tolist() == [[0.5]] * 4_000
    rows = numpy.arange(8.0)[:, None]
    assert (resampled_means([rows], seed=3) == resampled_means([rows], seed=3)).all()
    assert (resampled_means([rows], seed=3) != resampled_means([rows], seed=4)).any()
    for empty in ([], [few, few[:0]]):
        with pytest.raises(ValueError, match="at least one row"):
            resampled_means(empty)
