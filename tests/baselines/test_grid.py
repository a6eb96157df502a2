"""Even grids and GPTQ on them, against slow programs of their own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.baselines.gptq import gptq, solve
from lbllm.baselines.grid import fit_even_grid
from lbllm.baselines.layer import Settings
from lbllm.baselines.methods import METHODS
from lbllm.baselines.rtn import rtn
from lbllm.quant.levels import group_length
from tests.baselines.test_methods import GROUP_SIZES, SHAPES, as_half, damped_hessian, hessian_of, normal, output_error
from tests.helpers.cases import cases

WAYS = {"bits": st.integers(2, 4), "symmetric": st.booleans(), "clip": st.booleans()}


def slow_levels(values: list[float], settings: Settings) -> list[float]:
    """The levels for one row of a group, by trying each range."""
    last = 2**settings.bits - 1
    found: list[tuple[float, list[float]]] = []
    for percent in range(100, 20, -1) if settings.clip else (100,):
        low, high = percent / 100 * min(0.0, *values), percent / 100 * max(0.0, *values)
        if settings.symmetric:
            step, zero = as_half(2 * max(-low, high) / last), float(2 ** (settings.bits - 1))
        else:
            step = as_half((high - low) / last)
            zero = float(max(0, min(last, round(-low / step)))) if step else 0.0
        levels = [step * (code - zero) for code in range(last + 1)]
        error = sum(min(abs(value - level) for level in levels) ** 2.4 for value in values)
        found.append((error, levels))
    return min(found, key=lambda one: one[0])[1]


@given(rows=st.integers(1, 4), columns=st.integers(2, 30), seed=st.integers(0, 1000), **WAYS)
@cases(25)
def test_a_grid_is_the_best_of_the_ranges_that_are_tried(
    rows: int, columns: int, seed: int, bits: int, symmetric: bool, clip: bool
) -> None:
    settings = Settings(bits=bits, symmetric=symmetric, clip=clip)
    group = normal(rows, columns, seed=seed)
    found = fit_even_grid(group, settings).round(group.t()).t()
    for values, result in zip(group.tolist(), found.tolist(), strict=True):
        levels = slow_levels(values, settings)
        best = [min(levels, key=lambda level: abs(level - value)) for value in values]
        ours, least = (sum(abs(v - q) ** 2.4 for v, q in zip(values, row, strict=True)) for row in (result, best))
        assert ours == pytest.approx(least, rel=1e-6, abs=1e-12)


def slow_gptq(weight: Tensor, hessian: Tensor, settings: Settings) -> Tensor:
    """Optimal brain quantization column by column: the inverse Hessian of what is left is inverted anew each time."""
    latent, value, damped = weight.clone(), torch.empty_like(weight), damped_hessian(hessian, settings.damping)
    length = group_length(settings.group_size, weight.shape[1])
    order = sorted(range(weight.shape[1]), key=lambda j: -float(hessian[j, j]) if settings.act_order else j)
    for at, column in enumerate(order):
        first = column // length * length
        source = weight if settings.act_order else latent
        if settings.act_order or column == first:
            members = [row[first : first + length].tolist() for row in source]
            grids = [torch.tensor(slow_levels(values, settings), dtype=torch.float64) for values in members]
        left = order[at:]
        inverse = torch.linalg.inv(damped[left][:, left])
        for row, (old, levels) in enumerate(zip(latent[:, column].tolist(), grids, strict=True)):
            value[row, column] = levels[(levels - old).abs().argmin()]
            latent[row, left] -= (old - value[row, column]) / inverse[0, 0] * inverse[0]
    return value


@given(act_order=st.booleans(), group_size=GROUP_SIZES, **WAYS, **(SHAPES | {"columns": st.integers(2, 24)}))
@cases(10)
def test_gptq_equals_the_slow_way(
    rows: int,
    columns: int,
    seed: int,
    group_size: int,
    bits: int,
    symmetric: bool,
    clip: bool,
    act_order: bool,
) -> None:
    weight, hessian = normal(rows, columns, seed=seed), hessian_of(columns, seed)
    settings = Settings(group_size, bits, 0.1, symmetric, clip, act_order)
    found, slow = gptq(weight, hessian, settings), slow_gptq(weight, hessian, settings)
    torch.testing.assert_close(found.weight.double(), slow, atol=1e-3, rtol=1e-3)
    groups = math.ceil(columns / group_length(group_size, columns))
    assert found.bits == rows * (columns * bits + groups * (16 if symmetric else 16 + bits))


def test_latent_weights_are_those_that_were_rounded() -> None:
    weight, hessian = normal(6, 40), hessian_of(40)
    for act_order in (False, True):
        solved = solve(weight, hessian, Settings(16, 3, act_order=act_order))
        for number, grid in enumerate(solved.grids):
            span = slice(16 * number, 16 * number + 16)
            assert torch.equal(grid.round(solved.latent[:, span].t()).t(), solved.value[:, span])


def test_each_option_helps_where_it_should() -> None:
    x = normal(600, 96, seed=1) + 2 * normal(600, 8, seed=2) @ normal(8, 96, seed=3)
    x *= torch.linspace(0.2, 3, 96).double()
    hessian, weight = x.t() @ x / len(x), normal(64, 96).pow(3)
    plain, clipped, both = (
        output_error(weight, gptq(weight, hessian, settings).weight, hessian)
        for settings in (Settings(32), Settings(32, clip=True), METHODS["gptq"].settings(group_size=32))
    )
    assert both < clipped < plain
    assert METHODS["gptq"].settings(group_size=32, bits=3) == Settings(32, 3, clip=True, act_order=True)
    rounded = [rtn(weight, None, Settings(32, 3, clip=clip, symmetric=True)) for clip in (False, True)]
    errors = [float((weight - result.weight).abs().pow(2.4).sum()) for result in rounded]
    assert errors[1] < errors[0]
    assert rounded[0].bits == 64 * (96 * 3 + 3 * 16)
