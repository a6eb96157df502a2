"""The levels of W(1+1+1) against searches over all scales and codes in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lbllm.quant.levels import assign, levels_to_params, params_to_levels, to_groups
from lbllm.quant.packing import pack_codes, packed_shape, unpack_codes
from lbllm.quant.table import TABLE, fit_format, fit_scales, fit_table, is_table, sampled
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import LayerFormat
from tests.helpers.cases import cases


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def error(groups: Tensor, importance: Tensor, levels: Tensor) -> Tensor:
    """sum_j h_j min_k (w_j - l_k)^2 of every group (out, n), over all levels without any order among them."""
    return (importance * (groups[..., None] - levels[..., None, :]).square().amin(-1)).sum(-1)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**32))
@cases(30)
def test_a_scale_is_the_best_one_for_its_codes_and_near_the_best_of_all(
    rows: int, count: int, length: int, seed: int
) -> None:
    groups, importance = randn(rows, count, length, seed=seed), randn(rows, count, length, seed=seed + 1).square()
    table = randn(TABLE, seed=seed + 2).sort().values
    scales = fit_scales(groups, importance, table, 30)
    assert scales.shape == (rows, count, 1)
    assert float(scales.min()) >= 0
    value = table[assign(groups, scales * table).long()]
    best = (importance * value * groups).sum(-1) / (importance * value.square()).sum(-1)
    torch.testing.assert_close(scales[..., 0], best.clamp_min(0), rtol=1e-6, atol=1e-9)


def test_scales_come_near_the_best_of_all() -> None:
    groups, importance = randn(20, 5, 32, seed=3), randn(20, 5, 32, seed=4).square()
    table = fit_table(groups, importance)
    found = error(groups, importance, fit_scales(groups, importance, table, 8) * table)
    tried = [error(groups, importance, torch.full((20, 5, 1), 0.02 * k) * table) for k in range(1, 400)]
    least = torch.stack(tried).amin(0)
    assert float(found.sum() / least.sum()) < 1.03


def test_the_table_fits_better_than_that_of_the_normal_distribution_and_any_near_it() -> None:
    """Weights that lie evenly on both sides, with a scale of their own in each row."""
    weight = (torch.rand(60, 64, generator=random(1), dtype=torch.float64) - 0.5) * randn(60, 1, seed=2).abs()
    importance = randn(64, seed=5).square()
    groups, counted = to_groups(weight, 16), to_groups(importance[None], 16)
    table = fit_table(groups, counted)
    assert is_table(table)
    assert torch.equal(table, table.half().double())
    assert float(table.abs().max()) == 1

    def after(candidate: Tensor) -> float:
        return float(error(groups, counted, fit_scales(groups, counted, candidate, 10) * candidate).sum())

    normal = fit_table(randn(60, 4, 16), torch.ones(16, dtype=torch.float64))
    assert after(table) < 0.99 * after(normal)
    for k in range(TABLE):
        for step in (-0.05, 0.05):
            other = table.clone()
            other[k] += step
            assert after(table) < 1.05 * after(other.sort().values)


def test_a_table_and_scales_that_made_the_weights_are_found() -> None:
    made = torch.tensor([-1.0, -0.7, -0.42, -0.15, 0.12, 0.4, 0.66, 0.95], dtype=torch.float64)
    codes = torch.randint(0, 8, (64, 2, 32), generator=random())
    scales = 0.5 + torch.rand(64, 2, 1, generator=random(1), dtype=torch.float64)
    weight = scales * made[codes]
    levels, table = fit_format(weight, torch.ones(32, dtype=torch.float64), "w1+1+1", 10)
    assert table is not None
    torch.testing.assert_close(table, made, rtol=0, atol=2e-3)
    close = torch.isclose(levels_to_params(levels, table), scales, rtol=5e-3, atol=0)
    assert float(close.double().mean()) > 0.98  # the scale of a group is a local optimum
    torch.testing.assert_close(params_to_levels(scales, table), scales * table)


@pytest.mark.parametrize("value", [0.0, 1e-30, -2.5])
def test_equal_weights_have_finite_levels(value: float) -> None:
    levels, table = fit_format(torch.full((3, 2, 5), value), torch.ones(5), "w1+1+1", 3)
    assert table is not None
    assert is_table(table)
    assert bool(levels.isfinite().all())


def test_a_large_layer_is_sampled_in_whole_rows_of_all_weights() -> None:
    parts = sampled([torch.zeros(3000, 512), torch.ones(1000, 512)])
    assert parts.shape == (2000, 512)
    assert float(parts.mean()) == 0.25


@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 2**32))
@cases(40)
def test_codes_of_four_bits_survive_whole_bytes(rows: int, groups: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, groups, count), generator=random(seed), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert tuple(packed.shape[1:]) == packed_shape(groups, count, 4)
    assert torch.equal(unpack_codes(packed, groups, count), codes)


FORMAT = LayerFormat(format="w1+1+1", group_size=8, param_bits=16, act_bits=16)


def trained_layer(seed: int = 0) -> tuple[BinaryLinear, Tensor]:
    """A layer (6, 20) whose latent weights train, and these."""
    source = nn.Linear(20, 6, dtype=torch.float64)
    weight = randn(6, 20, seed=seed)
    groups = to_groups(weight, 8)
    levels, table = fit_format(groups, to_groups(torch.ones_like(weight), 8), "w1+1+1", 4)
    index = assign(groups, levels).flatten(1)[:, :20].contiguous()
    layer = BinaryLinear(source, FORMAT, levels_to_params(levels, table), index, table=table)
    layer.thaw(weight, "coupled")
    return layer, weight


def test_gradients_are_straight_through_for_weights_and_exact_for_scales_and_table() -> None:
    layer, latent = trained_layer()
    assert layer.table is not None
    assert layer.latent is not None
    slope = randn(6, 20, seed=9)
    (layer.weight() * slope).sum().backward()
    scales, table = (one.detach().clone().requires_grad_() for one in (layer.params, layer.table))
    by_column = scales[:, torch.arange(20) // 8]
    index = (latent[..., None] - (by_column * table).detach()).abs().argmin(-1)
    ((by_column[..., 0] * table[index]) * slope).sum().backward()
    torch.testing.assert_close(layer.params.grad, scales.grad)
    torch.testing.assert_close(layer.table.grad, table.grad)
    torch.testing.assert_close(layer.latent.grad, slope)
    # The same without a graph, as stages 2 and 3 do it.
    wanted = [one.grad for one in layer.trained()]
    for one in layer.trained():
        one.grad = None
    layer.gradient = slope
    layer.pass_on()
    for one, grad in zip(layer.trained(), wanted, strict=True):
        torch.testing.assert_close(one.grad, grad)


def test_a_table_that_training_put_out_of_order_is_stored_ascending_with_the_same_weights() -> None:
    layer, _ = trained_layer()
    assert layer.table is not None
    with torch.no_grad():
        layer.table[2], layer.table[5] = 0.9, -0.8
        layer.params[1] *= -1
    layer.freeze()
    before = layer.weight().detach()
    layer.round_params()
    assert is_table(layer.table)
    assert torch.equal(layer.table, layer.table.half().double())
    torch.testing.assert_close(layer.weight().detach(), before, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [[0.0, 1, 2, 3, 4, 5, 7, 6], [0.0, 1, 2, 3, 4, 5, 6, float("nan")]])
def test_other_values_are_no_table(bad: list[float]) -> None:
    assert not is_table(torch.tensor(bad))
