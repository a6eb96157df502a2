"""Stage 1 against a slow float64 program of its own, against plain clustering, and on degenerate inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbllm.errors import LbllmError
from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    linear_layers,
    linear_weight,
    run_block,
    share_copy,
)
from lbllm.quant.levels import (
    LEVELS,
    POINTS,
    assign,
    fit_levels,
    from_groups,
    group_length,
    levels_to_params,
    nearest_level,
    params_to_levels,
    take_levels,
    to_groups,
)
from lbllm.quant.packing import stored_params
from lbllm.quant.table import fit_format
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import Format, LayerFormat, PtqConfig
from lbllm.stages.distill import block_error
from lbllm.stages.hessians import align, correction_, input_statistics
from lbllm.stages.ptq import Binarized, binarize_layer, ptq_block, to_layer
from tests.helpers.tiny_models import VOCABULARY, tiny

CONFIG = PtqConfig(em_steps=6, damping=0.01, sweeps=2, align=1.0)


def layer_format(format_: Format = "w1+1", group_size: int = 8, param_bits: int = 16) -> LayerFormat:
    return LayerFormat.model_validate(
        {"format": format_, "group_size": group_size, "param_bits": param_bits, "act_bits": 16}
    )


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Float64 inputs (tokens, features) of unequal, correlated features."""
    mix = torch.randn(features, features, generator=random(seed), dtype=torch.float64) / features**0.5
    sizes = torch.logspace(-1, 1, features, dtype=torch.float64)[torch.randperm(features, generator=random(seed + 1))]
    clean = torch.randn(tokens, features, generator=random(seed + 2), dtype=torch.float64)
    return (clean + 2 * clean @ mix) * sizes


def problem(rows: int = 6, features: int = 21, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight (rows, features) and a Hessian, float64."""
    x = correlated_inputs(tokens, features)
    return torch.randn(rows, features, generator=random(7), dtype=torch.float64), x.t() @ x / tokens


def values(result: Binarized, group_size: int) -> Tensor:
    """The binarized weight (out, in) that a result stands for."""
    in_features = result.index.shape[1]
    index = to_groups(result.index, group_length(group_size, in_features))
    return from_groups(take_levels(result.levels, index), in_features)


def corrected(weight: Tensor, hessian: Tensor, drift: Tensor, config: PtqConfig) -> Tensor:
    return align(weight, correction_(hessian, drift.clone(), config), config)


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    residual = (weight - quantized).double()
    return float((residual @ hessian.double() * residual).sum())


def slow_levels(points: list[float], importance: list[float], count: int, steps: int) -> list[float]:
    """Importance-weighted Lloyd iterations on a list of numbers, from the best cut of its runs of sorted neighbours."""
    size = -(-len(points) // POINTS)
    order = sorted(range(len(points)), key=lambda j: points[j])
    runs = [order[begin : begin + size] for begin in range(0, len(points), size)]

    def cluster(members: list[int]) -> tuple[float, float]:
        mass = sum(importance[j] for j in members)
        mean = sum(importance[j] * points[j] for j in members) / mass
        return mean, sum(importance[j] * (points[j] - mean) ** 2 for j in members)

    best, levels = math.inf, [0.0] * count
    for cuts in itertools.combinations(range(1, len(runs)), count - 1):
        edges = itertools.pairwise((0, *cuts, len(runs)))
        parts = [[*itertools.chain(*runs[begin:end])] for begin, end in edges]
        found = [cluster(part) for part in parts]
        if sum(error for _, error in found) < best:
            best, levels = sum(error for _, error in found), [mean for mean, _ in found]
    for _ in range(steps):
        clusters: list[list[int]] = [[] for _ in levels]
        for j, point in enumerate(points):
            distances = [abs(point - level) for level in levels]
            clusters[distances.index(min(distances))].append(j)
        for k, members in enumerate(clusters):
            if members:
                levels[k] = sum(importance[j] * points[j] for j in members) / sum(importance[j] for j in members)
        levels.sort()
    return levels


def slow_gptq(weight: Tensor, hessian: Tensor, fmt: LayerFormat, config: PtqConfig) -> Tensor:
    """OBS column by column, with the inverse Hessian of the remaining columns kept explicitly; one row at a time."""
    out_features, features = weight.shape
    length = group_length(fmt.group_size, features)
    damped = hessian + config.damping * hessian.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    inverses, inverse = [], torch.linalg.inv(damped)
    for j in range(features):
        inverses.append(inverse)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    quantized = torch.empty_like(weight)
    for row in range(out_features):
        remaining = weight[row].clone()
        levels: list[float] = []
        for j in range(features):
            if j % length == 0:
                span = range(j, min(j + length, features))
                importance = [1 / float(inverses[k][k, k]) for k in span]
                points = [float(remaining[k]) for k in span]
                levels = slow_levels(points, importance, LEVELS[fmt.format], config.em_steps)
            distances = [abs(float(remaining[j]) - level) for level in levels]
            quantized[row, j] = levels[distances.index(min(distances))]
            error = (remaining[j] - quantized[row, j]) / inverses[j][j, j]
            remaining[j + 1 :] -= error * inverses[j][j, j + 1 :]
    return quantized


@pytest.mark.parametrize("format_", ["w1+1", "w1"])
@pytest.mark.parametrize("group_size", [7, 8, -1])
def test_compensation_equals_a_slow_program(format_: Format, group_size: int) -> None:
    weight, hessian = problem()
    fmt, config = layer_format(format_, group_size), CONFIG.model_copy(update={"sweeps": 0})
    result = binarize_layer(weight, hessian, fmt, config)
    torch.testing.assert_close(values(result, group_size), slow_gptq(weight, hessian, fmt, config))


@pytest.mark.parametrize("format_", ["w1+1", "w1", "w1+1+1"])
@pytest.mark.parametrize("group_size", [6, 8, 21])
def test_no_sweep_of_the_descent_increases_the_error_of_any_row(format_: Format, group_size: int) -> None:
    weight, hessian = problem(rows=20)
    damped = hessian + CONFIG.damping * hessian.diagonal().mean() * torch.eye(21, dtype=torch.float64)
    errors = []
    for sweeps in range(5):
        config = CONFIG.model_copy(update={"sweeps": sweeps})
        result = binarize_layer(weight, hessian, layer_format(format_, group_size), config)
        residual = weight - values(result, group_size)
        errors.append((residual @ damped * residual).sum(1))
        torch.testing.assert_close(result.error, errors[-1])
        torch.testing.assert_close(result.energy, (weight @ damped * weight).sum(1))
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier * (1 + 1e-9)).all()
    assert float(errors[2].sum()) < 0.95 * float(errors[0].sum())


def test_the_descent_ends_where_no_single_weight_can_be_improved() -> None:
    weight, hessian = problem(rows=4, features=16)
    config = CONFIG.model_copy(update={"sweeps": 60})
    result = binarize_layer(weight, hessian, layer_format(group_size=8), config)
    damped = hessian + CONFIG.damping * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    quantized = values(result, 8)
    for row, column in itertools.product(range(4), range(16)):
        best = output_error(weight[row : row + 1], quantized[row : row + 1], damped)
        for level in result.levels[row, column // 8]:
            other = quantized[row : row + 1].clone()
            other[0, column] = level
            assert output_error(weight[row : row + 1], other, damped) >= best * (1 - 1e-6)


@pytest.mark.parametrize("format_", ["w1+1", "w1", "w1+1+1"])
def test_each_step_of_stage_1_beats_plain_clustering(format_: Format) -> None:
    weight, hessian = problem(rows=16, features=64, tokens=500)
    groups = to_groups(weight, 16)
    plain, _ = fit_format(groups, torch.ones(16, dtype=torch.float64), format_, 8)
    clustered = output_error(weight, from_groups(nearest_level(groups, plain), 64), hessian)
    compensated, descended = (
        output_error(
            weight,
            values(binarize_layer(weight, hessian, layer_format(format_, 16), CONFIG.model_copy(update=change)), 16),
            hessian,
        )
        for change in ({"sweeps": 0}, {"sweeps": 2})
    )
    assert descended < compensated < 0.7 * clustered


def test_float32_is_as_good_as_float64() -> None:
    weight, hessian = problem(rows=16, features=64, tokens=500)
    fmt = layer_format(group_size=16)
    errors = [
        output_error(weight, values(binarize_layer(weight.to(dtype), hessian.to(dtype), fmt, CONFIG), 16), hessian)
        for dtype in (torch.float64, torch.float32)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


DEGENERATE: dict[str, Tensor] = {
    "fewer tokens than features": torch.randn(3, 24, generator=random()),
    "inputs that are always zero": torch.randn(100, 24, generator=random()) * (torch.arange(24) % 3 > 0),
    "constant inputs": torch.ones(100, 24),
    "no input at all": torch.zeros(100, 24),
    "a ruling token": torch.cat((torch.randn(100, 24, generator=random()), torch.full((1, 24), 1e4))),
    "mostly silent tokens": torch.cat((torch.randn(10, 24, generator=random()), torch.zeros(90, 24))),
    "tiny inputs": 1e-12 * torch.randn(100, 24, generator=random()),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize(
    ("format_", "group_size"),
    [("w1+1", 8), ("w1+1", 10), ("w1+1", -1), ("w1", 1), ("w1+1+1", -1), ("w1+1+1", 1)],
)
def test_degenerate_inputs_give_finite_levels(kind: str, format_: Format, group_size: int) -> None:
    x = DEGENERATE[kind]
    hessian, drift = input_statistics(iter([x]), iter([x]))
    weight = corrected(torch.randn(5, 24, generator=random(4)), hessian, drift, CONFIG)
    result = binarize_layer(weight, hessian, layer_format(format_, group_size), CONFIG)
    result.check("layer")
    assert float(values(result, group_size).abs().max()) < 1e3


def test_a_weight_of_zeros_stays_zero() -> None:
    _, hessian = problem()
    result = binarize_layer(torch.zeros(3, 21), hessian.float(), layer_format(), CONFIG)
    assert float(values(result, 8).abs().max()) == 0


def test_statistics_are_those_of_all_tokens() -> None:
    """H = X^T X / tokens and D = (X_teacher - X)^T X / tokens, whatever the batches."""
    x = torch.randn(60, 8, generator=random())
    target = x + 0.1 * torch.randn(60, 8, generator=random(1))
    hessian, drift = input_statistics(iter(x.split(25)), iter(target.split(25)))
    expected_hessian, expected_drift = torch.zeros(8, 8).double(), torch.zeros(8, 8).double()
    for token, meant in zip(x.double(), target.double(), strict=True):
        expected_hessian += torch.outer(token, token) / 60
        expected_drift += torch.outer(meant - token, token) / 60
    torch.testing.assert_close(hessian.double(), expected_hessian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drift.double(), expected_drift, rtol=1e-5, atol=1e-5)


def test_one_massive_token_does_not_rule_the_hessian() -> None:
    x = torch.randn(200, 8, generator=random())
    plain, _ = input_statistics(iter([x]), iter([x]))
    x[0] *= 1000
    ruled, drift = input_statistics(iter([x]), iter([x]))
    assert float((ruled - plain).norm() / plain.norm()) < 0.2
    assert float(drift.abs().max()) == 0


def test_align_is_the_least_squares_solution() -> None:
    """W' minimizes the distance of X W'^T from X_teacher W^T; damping draws it towards W."""
    x = correlated_inputs(300, 12)
    x /= x.norm(dim=1, keepdim=True)
    target = x + 0.2 * torch.randn(300, 12, generator=random(5), dtype=torch.float64) * x.abs().mean()
    weight = torch.randn(5, 12, generator=random(6), dtype=torch.float64)
    hessian, drift = x.t() @ x / 300, (target - x).t() @ x / 300
    exact = torch.linalg.lstsq(x, target @ weight.t()).solution.t()
    aligned = corrected(weight, hessian, drift, PtqConfig(align_damping=1e-12))
    torch.testing.assert_close(aligned, exact, rtol=1e-6, atol=1e-6)

    def distance(change: float) -> float:
        return float((corrected(weight, hessian, drift, PtqConfig(align_damping=change)) - weight).norm())

    assert 0 < distance(10) < distance(0.1) < distance(1e-4)
    torch.testing.assert_close(corrected(weight, hessian, drift, PtqConfig(align=0)), weight)
    half = corrected(weight, hessian, drift, PtqConfig(align=0.5, align_damping=1e-12))
    torch.testing.assert_close(half, (weight + exact) / 2, rtol=1e-6, atol=1e-6)


# Whole blocks.


def block_problem(architecture: str) -> tuple[nn.Module, dict[str, Any], Tensor, Tensor]:
    """A tiny model's first block, its call, the stream that enters it, and a drifted stream as a student's would be."""
    model, _ = tiny(architecture)
    sequences = torch.randint(3, VOCABULARY, (16, 24), generator=random())
    stream = first_inputs(model, sequences, 8)
    drifted = stream + 0.05 * stream.std() * torch.randn(stream.shape, generator=random(1))
    return decoder_blocks(model)[1][0], capture_calls(model, sequences[:1])[0], stream, drifted


def stage_1(
    block: nn.Module,
    student: nn.Module,
    call: dict[str, Any],
    drifted: Tensor,
    stream: Tensor,
    formats: dict[str, LayerFormat],
) -> dict[str, tuple[Binarized, BinaryLinear]]:
    meant = all_inputs(block, stream, call, 8)
    layers = ptq_block(block, student, call, drifted, meant, formats, CONFIG, 8)
    return {name: (result, layer) for name, result, layer in layers}


def clustered(block: nn.Module, formats: dict[str, LayerFormat]) -> nn.Module:
    """The block with every weight at the nearest of four levels a group, without stage 1's care."""
    student = share_copy(block)
    for name, fmt in formats.items():
        weight = linear_weight(block.get_submodule(name)).detach()
        groups = to_groups(weight, group_length(fmt.group_size, weight.shape[1]))
        importance = to_groups(torch.ones_like(weight), groups.shape[-1])
        levels = fit_levels(groups, importance, LEVELS[fmt.format], 8)
        index = from_groups(assign(groups, levels), weight.shape[1]).contiguous()
        student.set_submodule(name, BinaryLinear(block.get_submodule(name), fmt, levels_to_params(levels), index))
    return student


@pytest.mark.parametrize("architecture", ["llama_bias", "gpt2", "phi3"])
def test_a_block_after_stage_1_beats_plain_clustering(architecture: str) -> None:
    block, call, stream, drifted = block_problem(architecture)
    formats = dict.fromkeys(linear_layers(block), layer_format(group_size=16))
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    student: nn.Module = share_copy(block)
    results = stage_1(block, student, call, drifted, stream, formats)
    assert set(results) == set(formats)
    for name, (result, layer) in results.items():
        weight = linear_weight(block.get_submodule(name))
        assert result.latent.shape == weight.shape
        assert (result.levels.diff(dim=-1) >= 0).all()
        assert float(result.error.sum() / result.energy.sum()) < 0.3
        # The student holds what a checkpoint will hold.
        assert torch.equal(linear_weight(student.get_submodule(name)), layer.weight())
        assert torch.equal(layer.params, stored_params(levels_to_params(result.levels), 16))
    targets = torch.cat([run_block(block, part, call) for part in stream.split(8)]).detach()
    plain = block_error(clustered(block, formats), drifted, targets, call, 8)
    assert block_error(student, drifted, targets, call, 8) < 0.9 * plain
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_layers_of_one_input_may_have_different_formats_and_some_stay_dense() -> None:
    block, call, stream, drifted = block_problem("llama")
    formats = {
        "self_attn.q_proj": layer_format(group_size=16),
        "self_attn.v_proj": layer_format("w1", -1, param_bits=8),
        "self_attn.o_proj": layer_format(group_size=8, param_bits=4),
        "mlp.down_proj": layer_format(group_size=7, param_bits=8),
    }
    student: nn.Module = share_copy(block)
    results = stage_1(block, student, call, drifted, stream, formats)
    assert set(results) == set(formats)
    assert results["self_attn.q_proj"][0].levels.shape == (48, 3, 4)
    assert results["self_attn.v_proj"][0].levels.shape == (24, 1, 2)
    assert results["mlp.down_proj"][0].levels.shape == (48, 13, 4)
    assert linear_weight(student.get_submodule("self_attn.k_proj")) is linear_weight(
        block.get_submodule("self_attn.k_proj")
    )
    distinct = [len(row.unique()) for row in linear_weight(student.get_submodule("self_attn.v_proj"))]
    assert max(distinct) == 2


def test_errors_of_4_bit_parameters_are_made_up_for() -> None:
    """Rounding the parameters first and then choosing bits beats rounding them when all is done."""
    weight, hessian = problem(24, 64, 300)
    first, last = (binarize_layer(weight, hessian, layer_format(group_size=8, param_bits=b), CONFIG) for b in (4, 16))
    source = nn.Linear(64, 24)
    rounded = to_layer(source, layer_format(group_size=8, param_bits=4), last)
    chosen = to_layer(source, layer_format(group_size=8, param_bits=4), first)
    errors = [output_error(weight, layer.weight().detach(), hessian) for layer in (chosen, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_layers_solved_together_get_what_they_would_get_alone() -> None:
    block, call, stream, drifted = block_problem("llama")
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    fmt = layer_format(group_size=16)
    together = stage_1(block, share_copy(block), call, drifted, stream, dict.fromkeys(names, fmt))
    for name in names:
        alone, _ = stage_1(block, share_copy(block), call, drifted, stream, {name: fmt})[name]
        result, _ = together[name]
        torch.testing.assert_close(params_to_levels(result.levels), params_to_levels(alone.levels))
        torch.testing.assert_close(result.latent, alone.latent)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_the_layers_name(bad: float) -> None:
    block, call, stream, drifted = block_problem("llama")
    drifted[0, 0, 0] = bad
    formats = {"mlp.down_proj": layer_format()}
    with pytest.raises(LbllmError, match=r"mlp\.down_proj.*ptq\.damping"):
        stage_1(block, share_copy(block), call, drifted, stream, formats)
