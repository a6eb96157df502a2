"""The weight format against the paper's equation, and the clustering against brute force, in float64 loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm import kernels
from lbllm.quant.levels import (
    POINTS,
    assign,
    fit_levels,
    from_groups,
    group_length,
    index_to_planes,
    levels_to_params,
    nearest_level,
    params_to_levels,
    planes_to_index,
    polarization,
    refit,
    relaxed_level,
    take_levels,
    to_groups,
)
from tests.helpers.cases import cases

SHAPES = [(3, 12, 4), (2, 13, 4), (4, 7, -1), (1, 5, 5), (3, 6, 1), (2, 9, 64)]
"""(out, in, group_size): whole groups, a shorter last one, one a row, groups of one weight, longer than a row."""


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sorted_levels(rows: int, groups: int, count: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, groups, count, generator=random(seed), dtype=torch.float64).sort(-1).values


def weighted_error(groups: Tensor, importance: Tensor, levels: Tensor) -> Tensor:
    """sum_j h_j min_k (w_j - l_k)^2 of every group (out, n), over all levels without any order among them."""
    distance = (groups[..., None] - levels[..., None, :]).square().amin(-1)
    return (importance * distance).sum(-1)


@pytest.mark.parametrize(("rows", "in_features", "group_size"), SHAPES)
def test_groups_are_consecutive_weights_of_a_row(rows: int, in_features: int, group_size: int) -> None:
    weight = torch.randn(rows, in_features, generator=random())
    length = group_length(group_size, in_features)
    groups = to_groups(weight, length)
    assert groups.shape == (rows, math.ceil(in_features / length), length)
    for row, number in itertools.product(range(rows), range(groups.shape[1])):
        own = weight[row, number * length : (number + 1) * length].tolist()
        assert groups[row, number].tolist() == own + [0.0] * (length - len(own))
    assert torch.equal(from_groups(groups, in_features), weight)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_assign_finds_the_nearest_level(count: int) -> None:
    groups = torch.randn(5, 3, 11, generator=random(), dtype=torch.float64)
    levels = sorted_levels(5, 3, count)
    index = assign(groups, levels)
    assert index.dtype == torch.uint8
    for row, number, column in itertools.product(range(5), range(3), range(11)):
        distances = [abs(float(groups[row, number, column] - level)) for level in levels[row, number]]
        assert int(index[row, number, column]) == distances.index(min(distances))
    torch.testing.assert_close(nearest_level(groups, levels), take_levels(levels, index))


@pytest.mark.parametrize(("rows", "in_features", "group_size"), SHAPES)
def test_levels_planes_and_parameters_satisfy_the_equation(rows: int, in_features: int, group_size: int) -> None:
    """W_q = G (alpha_0 B + mu_0) + (1 - G) (alpha_1 B + mu_1), weight by weight."""
    weight = torch.randn(rows, in_features, generator=random(), dtype=torch.float64)
    length = group_length(group_size, in_features)
    groups = to_groups(weight, length)
    levels = sorted_levels(rows, groups.shape[1], 4)
    index = assign(groups, levels)
    params = levels_to_params(levels)
    planes = index_to_planes(from_groups(index, in_features), 4)
    quantized = from_groups(take_levels(params_to_levels(params), index), in_features)
    for row, column in itertools.product(range(rows), range(in_features)):
        alpha_0, mu_0, alpha_1, mu_1 = params[row, column // length].tolist()
        B, G = (1 if planes[0][row, column] else -1), int(planes[1][row, column])
        expected = G * (alpha_0 * B + mu_0) + (1 - G) * (alpha_1 * B + mu_1)
        assert float(quantized[row, column]) == pytest.approx(expected, abs=1e-12)


def test_sign_only_levels_satisfy_their_equation() -> None:
    groups = torch.randn(2, 3, 5, generator=random(), dtype=torch.float64)
    levels = sorted_levels(2, 3, 2)
    index = assign(groups, levels)
    sign, *bitmaps = index_to_planes(index, 2)
    alpha, mu = levels_to_params(levels).unbind(-1)
    assert not bitmaps
    expected = alpha[..., None] * torch.where(sign, 1.0, -1.0) + mu[..., None]
    torch.testing.assert_close(take_levels(levels, index), expected)


def test_the_bitmap_marks_the_outer_levels() -> None:
    _, bitmap = index_to_planes(torch.arange(4, dtype=torch.uint8), 4)
    assert bitmap.tolist() == [True, False, False, True]


def test_of_eight_levels_each_plane_halves_what_the_one_before_leaves() -> None:
    sign, bitmap, second = (plane.tolist() for plane in index_to_planes(torch.arange(8, dtype=torch.uint8), 8))
    assert sign == [False] * 4 + [True] * 4
    assert bitmap == [True, True, False, False, False, False, True, True]
    assert second == [True, False, True, False, False, True, False, True]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_planes_and_index_are_inverses(count: int) -> None:
    index = torch.arange(count, dtype=torch.uint8).repeat(3)
    back = planes_to_index(index_to_planes(index, count))
    assert back.dtype == torch.uint8
    assert torch.equal(back, index)


@pytest.mark.parametrize("count", [2, 4])
def test_parameters_and_levels_are_inverses(count: int) -> None:
    levels = sorted_levels(4, 3, count)
    torch.testing.assert_close(params_to_levels(levels_to_params(levels)), levels)
    # Any parameters at all, also those whose pairs cross.
    params = torch.randn(4, 3, count, generator=random(), dtype=torch.float64)
    torch.testing.assert_close(levels_to_params(params_to_levels(params)), params)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.sampled_from([2, 4]), st.integers(0, 2**32))
@cases(60)
def test_no_step_of_the_clustering_increases_the_error(
    rows: int, groups: int, length: int, count: int, seed: int
) -> None:
    weights = torch.randn(rows, groups, length, generator=random(seed), dtype=torch.float64)
    importance = torch.rand(rows, groups, length, generator=random(seed + 1), dtype=torch.float64)
    errors = [weighted_error(weights, importance, fit_levels(weights, importance, count, steps)) for steps in range(7)]
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier + 1e-12).all()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.sampled_from([2, 4]), st.integers(0, 2**32))
@cases(60)
def test_e_and_m_steps_in_turn_are_the_clustering(rows: int, groups: int, length: int, count: int, seed: int) -> None:
    weights = torch.randn(rows, groups, length, generator=random(seed), dtype=torch.float64)
    importance = torch.rand(length, generator=random(seed + 1), dtype=torch.float64)
    levels = fit_levels(weights, importance, count, 0)
    for steps in range(1, 5):
        index = assign(weights, levels)
        before = take_levels(levels, index)
        levels, moved = refit(weights, importance, levels, index)
        torch.testing.assert_close(levels, fit_levels(weights, importance, count, steps))
        # Weights that had one level have one level still, the mean of them all.
        after = take_levels(levels, moved)
        for row, group in itertools.product(range(rows), range(groups)):
            for value in before[row, group].unique():
                mine = before[row, group] == value
                mean = (importance * weights[row, group])[mine].sum() / importance[mine].sum()
                torch.testing.assert_close(after[row, group][mine], mean.expand(int(mine.sum())))


def test_a_level_without_weights_stays_and_levels_ascend_after_the_m_step() -> None:
    weights = torch.tensor([[[0.0, 0.1, 3.0, 3.2]]])
    levels, index = refit(
        weights, torch.ones(1), torch.tensor([[[0.0, 2.0, 2.1, 2.2]]]), torch.tensor([[[0, 0, 1, 1]]])
    )
    torch.testing.assert_close(levels, torch.tensor([[[0.05, 2.1, 2.2, 3.1]]]))
    assert index.tolist() == [[[0, 0, 3, 3]]]


@pytest.mark.parametrize("steps", [1, 5])
def test_levels_ascend_whatever_the_clusters(steps: int) -> None:
    """Few distinct values leave clusters empty; their levels stay where they are, in order."""
    weights = torch.randint(0, 2, (50, 4, 6), generator=random()).double()
    levels = fit_levels(weights, torch.ones(6, dtype=torch.float64), 4, steps)
    assert (levels.diff(dim=-1) >= 0).all()
    assert levels.isfinite().all()


def best_error(values: list[float], importance: list[float], count: int) -> float:
    """The least weighted error of any ``count`` levels: optimal clusters of points on a line are intervals."""
    order = sorted(range(len(values)), key=lambda j: values[j])
    best = math.inf
    for cuts in itertools.combinations_with_replacement(range(len(values) + 1), count - 1):
        total = 0.0
        for begin, end in itertools.pairwise((0, *cuts, len(values))):
            part = order[begin:end]
            mass = sum(importance[j] for j in part)
            if mass > 0:
                mean = sum(importance[j] * values[j] for j in part) / mass
                total += sum(importance[j] * (values[j] - mean) ** 2 for j in part)
        best = min(best, total)
    return best


@pytest.mark.parametrize("count", [2, 4])
def test_the_clustering_comes_near_the_best_one(count: int) -> None:
    """Never below the best of a brute-force search."""
    weights = torch.randn(40, 1, 13, generator=random(), dtype=torch.float64)
    importance = torch.rand(40, 1, 13, generator=random(1), dtype=torch.float64) + 0.1
    found = weighted_error(weights, importance, fit_levels(weights, importance, count, 20))[:, 0]
    best = torch.tensor(
        [best_error(w, h, count) for w, h in zip(weights[:, 0].tolist(), importance[:, 0].tolist(), strict=True)],
        dtype=torch.float64,
    )
    assert (found >= best - 1e-12).all()
    assert float((found <= best + 1e-9).double().mean()) > 0.9
    assert float(found.sum() / best.sum()) < 1.01


@given(st.integers(4, POINTS), st.sampled_from([2, 4]), st.integers(0, 2**32))
@cases(40)
def test_a_short_group_starts_at_the_best_clustering(length: int, count: int, seed: int) -> None:
    weights = torch.randn(2, 3, length, generator=random(seed), dtype=torch.float64)
    importance = torch.rand(2, 3, length, generator=random(seed + 1), dtype=torch.float64) + 0.01
    found = weighted_error(weights, importance, fit_levels(weights, importance, count, 0))
    rows = zip(weights.flatten(0, 1).tolist(), importance.flatten(0, 1).tolist(), strict=True)
    best = torch.tensor([best_error(w, h, count) for w, h in rows], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), best)


def test_two_or_four_distinct_values_are_kept_exactly() -> None:
    weights = torch.tensor([-2.0, -0.6, 0.5, 2.1], dtype=torch.float64).repeat(1, 1, 4)
    levels = fit_levels(weights, torch.ones(16, dtype=torch.float64), 4, 10)
    torch.testing.assert_close(nearest_level(weights, levels), weights)


def test_clustering_ignores_padding_and_weights_without_importance() -> None:
    weights = torch.randn(3, 2, 8, generator=random())
    importance = torch.rand(3, 2, 8, generator=random(1))
    padded = torch.cat((weights, torch.full((3, 2, 4), 1e3)), -1)
    levels = fit_levels(padded, torch.cat((importance, torch.zeros(3, 2, 4)), -1), 4, 5)
    torch.testing.assert_close(levels, fit_levels(weights, importance, 4, 5))


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("importance", [0.0, 1.0])
def test_clustering_of_equal_or_unimportant_weights_is_finite(value: float, importance: float) -> None:
    levels = fit_levels(torch.full((2, 3, 8), value), torch.full((8,), importance), 4, 4)
    assert levels.isfinite().all()
    if importance:
        torch.testing.assert_close(levels, torch.full_like(levels, value))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of ``function``'s output."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return torch.autograd.grad((output * torch.randn(output.shape, generator=random(9)).to(output)).sum(), leaves)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_gradients_of_the_nearest_level(count: int) -> None:
    """Against a dense formulation: one-hot assignments times levels, and the latent weight straight through."""
    groups = torch.randn(3, 2, 7, generator=random(), dtype=torch.float64)
    levels = sorted_levels(3, 2, count)

    def dense(latent: Tensor, levels: Tensor) -> Tensor:
        distance = (latent.detach()[..., None] - levels.detach()[..., None, :]).abs()
        chosen = torch.nn.functional.one_hot(distance.argmin(-1), count).double()
        return (chosen * levels[..., None, :]).sum(-1) + latent - latent.detach()

    torch.testing.assert_close(nearest_level(groups, levels), dense(groups, levels))
    torch.testing.assert_close(gradients(nearest_level, groups, levels), gradients(dense, groups, levels))


@cases(100)
@given(
    st.sampled_from([2, 4]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.integers(0, 2**32),
)
def test_the_nearest_level_is_one_of_the_levels_with_and_without_a_compiler(
    count: int, rows: int, number: int, length: int, scale: float, seed: int
) -> None:
    """Exactly, in float32 too: a sum of gaps would miss a level by its rounding."""
    groups = torch.randn(rows, number, length, generator=random(seed)) * scale
    levels = (torch.randn(rows, number, count, generator=random(seed + 1)) * scale).sort(-1).values
    found = []
    assert kernels.ready()
    for compiled in (True, False):
        with mock.patch.object(kernels, "ready", lambda compiled=compiled: compiled):
            assert torch.equal(nearest_level(groups, levels), take_levels(levels, assign(groups, levels)))
            found.append(gradients(nearest_level, groups, levels))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


def test_relaxed_level_is_the_equation_with_a_fractional_bitmap() -> None:
    groups = torch.randn(3, 2, 7, generator=random(), dtype=torch.float64)
    bitmap = torch.rand(3, 2, 7, generator=random(1), dtype=torch.float64)
    params = levels_to_params(sorted_levels(3, 2, 4))
    result = relaxed_level(groups, bitmap, params)
    for place in itertools.product(range(3), range(2), range(7)):
        alpha_0, mu_0, alpha_1, mu_1 = params[place[:2]].tolist()
        G, latent = float(bitmap[place]), float(groups[place])
        B = 1 if latent > G * mu_0 + (1 - G) * mu_1 else -1
        expected = G * (alpha_0 * B + mu_0) + (1 - G) * (alpha_1 * B + mu_1)
        assert float(result[place]) == pytest.approx(expected, abs=1e-12)


def test_gradients_of_the_relaxed_level() -> None:
    """Exact in bitmap and parameters with B fixed, straight through in the latent weight."""
    groups = torch.randn(3, 2, 7, generator=random(), dtype=torch.float64)
    bitmap = torch.rand(3, 2, 7, generator=random(1), dtype=torch.float64)
    params = levels_to_params(sorted_levels(3, 2, 4))

    def dense(latent: Tensor, bitmap: Tensor, params: Tensor) -> Tensor:
        alpha_0, mu_0, alpha_1, mu_1 = (params[..., k : k + 1] for k in range(4))
        B = torch.where(latent > bitmap * mu_0 + (1 - bitmap) * mu_1, 1.0, -1.0).detach()
        value = bitmap * (alpha_0 * B + mu_0) + (1 - bitmap) * (alpha_1 * B + mu_1)
        return value + latent - latent.detach()

    expected = gradients(dense, groups, bitmap, params)
    torch.testing.assert_close(gradients(relaxed_level, groups, bitmap, params), expected)


def test_polarization_is_zero_only_for_a_hard_bitmap() -> None:
    hard = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for beta in (2.0, 8.0, 20.0):
        assert float(polarization(hard, beta)) == 0
        for soft in (0.01, 0.5, 0.99):
            assert float(polarization(torch.tensor([0.0, soft]), beta)) > 0
    assert float(polarization(torch.full((5,), 0.5), 2.0)) == 1


@given(st.floats(0.01, 0.99), st.floats(2, 20))
@cases(100)
def test_polarization_drives_the_bitmap_outwards(value: float, beta: float) -> None:
    bitmap = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(polarization(bitmap, beta), [bitmap])
    assert float(slope) * (value - 0.5) <= 0
