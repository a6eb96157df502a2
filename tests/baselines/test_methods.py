"""The methods that LBLLM is compared with, against slow programs of their own in float64 and against counted bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.baselines import arb, billm
from lbllm.baselines.bwa import bwa
from lbllm.baselines.layer import Quantized, Settings, block_by_block
from lbllm.baselines.methods import METHODS, Method, method, quantize_blocks, quantize_layer
from lbllm.baselines.rtn import round_to_nearest, rtn
from lbllm.errors import ConfigError, LbllmError
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.quant.levels import group_length
from lbllm.stages.hessians import input_statistics
from tests.helpers.cases import cases
from tests.helpers.tiny_models import VOCABULARY, tiny
from tests.stages.test_ptq import correlated_inputs

SHAPES = {"rows": st.integers(1, 5), "columns": st.integers(1, 40), "seed": st.integers(0, 1000)}
GROUP_SIZES = st.one_of(st.just(-1), st.integers(1, 50))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(columns: int, seed: int = 0) -> Tensor:
    x = correlated_inputs(4 * columns + 8, columns, seed)
    return x.t() @ x / len(x)


def output_error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    difference = weight.double() - value.double()
    return float(torch.einsum("oi,ij,oj->", difference, hessian.double(), difference))


def damped_hessian(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def as_half(value: float) -> float:
    return float(torch.tensor(value).half())


def grid(group: list[float], bits: int) -> list[float]:
    """Even levels from a float16 minimum in float16 steps."""
    low, steps = as_half(min(group)), 2**bits - 1
    step = max(as_half((max(group) - low) / steps), 0.0)
    return [low + step * k for k in range(steps + 1)]


@given(group_size=GROUP_SIZES, bits=st.integers(1, 4), **SHAPES)
@cases(40)
def test_rtn_takes_the_nearest_step_of_each_group(
    rows: int, columns: int, seed: int, group_size: int, bits: int
) -> None:
    weight = normal(rows, columns, seed=seed)
    result = rtn(weight, None, Settings(group_size, bits))
    assert result.weight.dtype == torch.float32
    length = group_length(group_size, columns)
    starts = range(0, columns, length)
    for row, start in itertools.product(range(rows), starts):
        group = weight[row, start : start + length].float().tolist()
        levels = grid(group, bits)
        best = [min(abs(w - level) for level in levels) for w in group]
        given = (weight[row, start : start + length].float() - result.weight[row, start : start + length]).abs()
        torch.testing.assert_close(given, torch.tensor(best), atol=1e-5, rtol=1e-4)
    assert result.bits == rows * (columns * bits + 32 * len(starts))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_round_to_nearest_changes_the_blocks_linear_layers_alone(architecture: str) -> None:
    model, _ = tiny(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = round_to_nearest(model, bits=2, group_size=20)
    path, blocks = decoder_blocks(student)
    linear = {f"{path}.{i}.{name}.weight" for i, block in enumerate(blocks) for name in linear_layers(block)}
    for name, value in student.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])
        assert torch.equal(value, before[name]) == (name not in linear), name
    weight = linear_weight(next(iter(linear_layers(blocks[0]).values())))
    assert all(len(row[:20].unique()) <= 4 for row in weight)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rtn"])
def test_calibrated_methods_beat_rounding_where_inputs_are_correlated(name: str) -> None:
    weight = normal(32, 96)
    x = normal(400, 96, seed=1) + 2 * normal(400, 8, seed=2) @ normal(8, 96, seed=3)
    hessian = x.t() @ x / len(x)
    plain = output_error(weight, rtn(weight, None, Settings(32)).weight, hessian)
    result = METHODS[name].quantize(weight, hessian, Settings(32))
    assert result.weight.dtype == torch.float32
    assert output_error(weight, result.weight, hessian) < 0.8 * plain


@given(group_size=st.integers(1, 30), **SHAPES)
@cases(20)
def test_later_blocks_absorb_all_of_a_blocks_error(rows: int, columns: int, seed: int, group_size: int) -> None:
    weight, hessian = normal(rows, columns, seed=seed), hessian_of(columns, seed)
    seen: list[Tensor] = []
    values: list[Tensor] = []

    def coarse(block: Tensor, inverse: Tensor) -> Quantized:
        seen.append(block.clone())
        values.append(block.round())
        return Quantized(values[-1], block.numel())

    result = block_by_block(weight, hessian, Settings(group_size), coarse)
    assert result.bits == weight.numel()
    assert torch.equal(result.weight, torch.cat(values, 1).float())
    damped, done = damped_hessian(hessian, 0.01), 0
    for block in seen:
        # What the free columns should be, given the values of those before: the minimum of tr((W - Q) H (W - Q)^T).
        if done:
            error = weight[:, :done] - torch.cat(values, 1)[:, :done]
            best = weight[:, done:] + error @ damped[:done, done:] @ torch.linalg.inv(damped[done:, done:])
            torch.testing.assert_close(block, best[:, : block.shape[1]], atol=1e-6, rtol=1e-6)
        done += block.shape[1]


def slow_plain(values: list[float]) -> float:
    """The squared error of mu + alpha B, mu the mean and alpha the mean magnitude about it."""
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    scale = sum(abs(v - mean) for v in values) / len(values)
    return sum((abs(v - mean) - scale) ** 2 for v in values)


@given(**SHAPES)
@cases(15)
def test_break_point_is_the_best_of_all_tried(rows: int, columns: int, seed: int) -> None:
    part = normal(rows, columns, seed=seed)
    magnitudes = sorted(part.abs().flatten().tolist())
    points = {magnitudes[int(share * (len(magnitudes) - 1))] for share in billm.SHARES}

    def error(point: float) -> float:
        split = [([w for w in row if abs(w) < point], [w for w in row if abs(w) >= point]) for row in part.tolist()]
        return sum(slow_plain(small) + slow_plain(large) for small, large in split)

    assert error(float(billm.break_point(part))) == pytest.approx(min(map(error, points)), abs=1e-9)


def test_salient_columns_are_the_most_sensitive_and_their_number_is_the_best() -> None:
    block, inverse = normal(6, 24), normal(24, seed=1).square() + 0.1
    block[:, [3, 8, 20]] *= 6
    salient = billm.salient_columns(block, inverse)
    count = int(salient.sum())
    order = sorted(range(24), key=lambda j: -float(block[:, j].square().sum() / inverse[j]))
    assert sorted(order[:count]) == salient.nonzero()[:, 0].tolist()

    def error(count: int) -> float:
        parts = [[row[j] for j in chosen] for row in block.tolist() for chosen in (order[:count], order[count:])]
        return sum(map(slow_plain, parts))

    assert error(count) == pytest.approx(min(error(count) for count in range(1, 24)))


def test_residual_binarization() -> None:
    row, mask = torch.tensor([[9.0, 1.0, 3.0, -2.0, -6.0]]), torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    # Mean -1, magnitudes 2, 4, 1, 5: scale 3; what is left is -1, 1, 2, -2 with mean 0 and scale 1.5.
    assert billm.approximate(row, mask, 1).tolist() == [[0.0, 2.0, 2.0, -4.0, -4.0]]
    assert billm.approximate(row, mask, 2).tolist() == [[0.0, 0.5, 3.5, -2.5, -5.5]]


def test_billm_has_the_values_and_bits_of_its_format() -> None:
    weight, hessian = normal(7, 40), hessian_of(40)
    result = billm.billm(weight, hessian, Settings(16))
    bits = 0
    for start in (0, 16, 32):
        block = result.weight[:, start : start + 16]
        rows, columns = block.shape
        # Signs and group bitmap, or two signs: 2 bits each; column mask; mu, alpha of two groups; mu, two alphas.
        bits += 2 * rows * columns + columns + 16 * rows * (4 + 3)
        assert all(len(row.unique()) <= 8 for row in block)
    assert result.bits == bits
    assert billm.stored_bits(7, 16, 16) == 2 * 7 * 16 + 16 + 16 * 7 * 3


@given(order=st.integers(1, 2), **SHAPES)
@cases(20)
def test_no_round_of_refinement_raises_the_error(rows: int, columns: int, seed: int, order: int) -> None:
    weight = normal(rows, columns, seed=seed)
    mask = (normal(rows, columns, seed=seed + 1) > -0.5).double()
    errors = []
    for rounds in range(6):
        planes = arb.refine(weight, mask, order, rounds)
        value = sum((plane.value() for plane in planes), torch.zeros_like(weight))
        assert not value[mask == 0].any()
        errors.append(float((weight * mask - value).square().sum()))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    if order == 2:
        # The signs come last in a round: of the four pairs each weight has the best.
        sizes = [plane.row * plane.column for plane in planes]
        pairs = [weight - a * sizes[0] - b * sizes[1] for a, b in itertools.product((1, -1), repeat=2)]
        best = torch.stack(pairs).square().amin(0) * mask
        torch.testing.assert_close((weight * mask - value).square(), best)


def test_row_and_column_scales_are_found_again() -> None:
    row, column = normal(9, 1).abs() + 0.1, normal(1, 30, seed=1).abs() + 0.1
    weight = row * column * normal(9, 30, seed=2).sign()
    (plane,) = arb.refine(weight, torch.ones_like(weight), 1, 30)
    torch.testing.assert_close(plane.value(), weight)


@pytest.mark.parametrize("column_groups", [False, True])
def test_arb_counts_every_bit_and_is_a_sum_of_its_parts(column_groups: bool) -> None:
    weight, hessian = normal(6, 20), hessian_of(20)
    blocks: list[tuple[int, int]] = []

    def watch(block: Tensor, inverse: Tensor) -> Quantized:
        blocks.append((block.shape[1], int(billm.salient_columns(block, inverse).sum())))
        return arb.binarize_block(block, inverse, column_groups=column_groups)

    result = block_by_block(weight, hessian, Settings(12), watch)
    again = arb.arb(weight, hessian, Settings(12), column_groups=column_groups)
    assert torch.equal(result.weight, again.weight)
    bits = 0
    for columns, salient in blocks:
        bits += columns + 6 * (2 * salient + 2 * (columns - salient)) + 16 * 2 * (6 + columns - salient)
        bits += 6 * salient * column_groups + 16 * (1 + column_groups) * 2 * (6 + salient)
    assert [columns for columns, _ in blocks] == [12, 8]
    assert again.bits == result.bits == bits


def test_bwa_keeps_outlier_channels_in_8_bits() -> None:
    weight, hessian = normal(5, 70), hessian_of(70)
    result = bwa(weight, hessian, Settings(16))
    outliers = hessian.diagonal().argsort()[-2:]
    others = torch.tensor([j for j in range(70) if j not in outliers])
    for row in result.weight:
        scale = row[outliers].abs().max() / 127
        assert scale == scale.half().float()
        codes = row[outliers] / scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert all(len(group.unique()) <= 4 for group in row[others].split(16))
    assert result.bits == 5 * (2 * 68 + 5 * 4 * 16) + 5 * (2 * 8 + 16) + 70
    assert result.wide is not None
    assert sorted(result.wide.tolist()) == sorted(outliers.tolist())
    few = bwa(weight[:, :20], hessian[:20, :20], Settings(-1))
    assert few.bits == 5 * (2 * 20 + 4 * 16)
    assert all(len(row.unique()) <= 4 for row in few.weight)


@given(name=st.sampled_from(list(METHODS)), group_size=GROUP_SIZES, **SHAPES)
@cases(40)
def test_any_shape_goes(name: str, rows: int, columns: int, seed: int, group_size: int) -> None:
    weight, hessian = normal(rows, columns, seed=seed).float(), hessian_of(columns, seed).float()
    if seed % 3 == 0:
        weight[0] = 0
        hessian[0] = hessian[:, 0] = 0
    before = weight.clone(), hessian.clone()
    result = METHODS[name].quantize(weight, hessian, Settings(group_size))
    assert result.weight.shape == weight.shape
    assert result.weight.dtype == torch.float32
    assert result.weight.isfinite().all()
    assert result.bits > weight.numel()
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_hessians_are_those_of_the_quantized_models_inputs(architecture: str) -> None:
    model, _ = tiny(architecture)
    sequences = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    hessians: list[Tensor] = []

    def coarse(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
        hessians.append(hessian)
        return Quantized((weight * 8).round() / 8, weight.numel())

    done: list[tuple[int, int]] = []
    stored = quantize_blocks(
        model, sequences, Method("coarse", coarse), Settings(16), on_block=lambda *count: done.append(count)
    )
    assert done == [(1, 2), (2, 2)]
    layers = [layer for block in decoder_blocks(model)[1] for layer in linear_layers(block).values()]
    assert stored.weights == sum(linear_weight(layer).numel() for layer in layers)
    assert stored.bpw == 1
    inputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=sequences)
    for x, hessian in zip(inputs, hessians, strict=True):
        torch.testing.assert_close(hessian, input_statistics([x], [x])[0], atol=1e-3, rtol=1e-3)


def test_every_method_quantizes_a_model_and_says_what_it_takes() -> None:
    sequences = torch.randint(3, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    for name in METHODS:
        model, _ = tiny("llama")
        stored = quantize_blocks(model, sequences, method(name), Settings(16))
        assert 2 < stored.bpw < 12
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_can_not_be_quantized_is_named() -> None:
    with pytest.raises(ConfigError, match="'awq' is not known; choose from rtn"):
        method("awq")
    bad = torch.full((8, 8), math.nan)
    with pytest.raises(LbllmError, match=r"layers\.3\.up: GPTQ found values"):
        quantize_layer("layers.3.up", torch.ones(2, 8), bad, METHODS["gptq"], Settings(4))
    with pytest.raises(LbllmError, match=r"layers\.3\.up: BiLLM found values"):
        quantize_layer("layers.3.up", 1e30 * torch.randn(2, 8), torch.eye(8), METHODS["billm"], Settings(4))
