"""What a plan is measured by: stage 1 as a run does it, layers alone, and the divergence divided among layers."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.measure.perplexity import divergence
from lbllm.models.blocks import (
    decoder_blocks,
    layer_inputs,
    linear_layers,
    linear_weight,
    set_linear_weight,
    share_copy,
)
from lbllm.models.teacher import Teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.planning.alone import alone, clustering_errors
from lbllm.planning.candidates import made
from lbllm.planning.measuring import spread
from lbllm.planning.shares import shares
from lbllm.planning.stage_one import Stream, binarized
from lbllm.quant.levels import group_length, to_groups
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.plan import block_formats
from lbllm.quant.table import clustered, fit_format
from lbllm.sections import PtqConfig
from lbllm.stages.hessians import factorize, input_statistics
from lbllm.stages.ptq import binarize_layer
from tests.helpers.cases import cases
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

FORMATS = (made("w1+1", 16, 16), made("w1+1", 16, 4), made("w1", 16, 16), made("w1+1+1", -1, 16))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return tiny_teacher("llama")


def nothing(done: int, of: int) -> None:
    assert 0 <= done < of


def test_stage_1_in_memory_is_the_stage_of_a_run(teacher: Teacher, tmp_path: Path) -> None:
    rules = {"*.down_proj": {"format": "w1+1+1", "group_size": -1}, "*.q_proj": {"format": "w1"}}
    config = run_config(stages=["ptq"], quant={"overrides": rules})
    run_tiny(config, tmp_path, teacher)
    expected = stage_model(config, tmp_path, "ptq", teacher)
    _, _, formats = block_formats(teacher.model, config.quant.weights_only())
    found = binarized(teacher, formats, token_ids(), config.ptq, nullcontext, nothing)
    packed = {name: layer for name, layer in expected.named_modules() if isinstance(layer, PackedLinear)}
    assert len(packed) == 14
    for name, layer in packed.items():
        torch.testing.assert_close(linear_weight(found.get_submodule(name)), layer.dequantize(), rtol=1e-5, atol=1e-6)


def test_a_layer_alone_is_binarized_on_the_inputs_that_it_gets_in_the_teacher(teacher: Teacher) -> None:
    config, sequences = PtqConfig(sweeps=0), token_ids()
    path, blocks = decoder_blocks(teacher.model)
    reference = [dict.fromkeys(linear_layers(block), FORMATS[0]) for block in blocks]
    del reference[1]["mlp.up_proj"]
    weights, errors = alone(teacher, reference, FORMATS, sequences, config, nullcontext, nothing)
    assert weights.keys() == errors.keys()
    assert len(weights) == 13
    stream = Stream(teacher, sequences, nullcontext)
    stream.taught(0)
    seen = list(layer_inputs(blocks[1], "mlp.down_proj", stream.hidden, stream.calls[1], 4))
    hessian, _ = input_statistics(iter(seen), iter(seen))
    weight = linear_weight(blocks[1].get_submodule("mlp.down_proj"))
    result = binarize_layer(weight, hessian, FORMATS[0], config)
    levels = to_groups(result.index.long(), 16), result.levels
    expected = levels[1].gather(-1, levels[0]).flatten(1)[:, :90]
    difference = weights[f"{path}.1.mlp.down_proj"].float() - expected
    assert float(difference.norm() / expected.norm()) < 5e-2  # another batch, parameters in float16
    assert all(found[0] == pytest.approx(1) for found in errors.values())
    # The more bits, the smaller the error; one bit a weight has the largest.
    assert all(found[2] > 2 * found[0] for found in errors.values())


@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_errors_are_weighted_by_the_diagonal_of_the_factor(teacher: Teacher, number: int) -> None:
    fmt = FORMATS[number]
    weight = linear_weight(decoder_blocks(teacher.model)[1][0].get_submodule("mlp.down_proj"))
    inputs = torch.randn(200, 90, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 90)
    _, factor = factorize(inputs.t() @ inputs / 200, 0.1)
    importance = 1 / factor.diagonal().square()
    length = group_length(fmt.group_size, 90)
    groups, counted = to_groups(weight, length), to_groups(importance[None], length)
    levels, _ = fit_format(groups, counted, fmt.format, 3)
    nearest = (groups[..., None].double() - levels[..., None, :].double()).square().amin(-1)
    expected = float((nearest * counted).sum())
    # The parameters are rounded as they are stored: by float16 hardly, by 4 bits a little.
    (found,) = clustering_errors(weight, factor, [fmt], 3)
    assert found == pytest.approx(expected, rel=1e-2) if fmt.param_bits == 16 else expected < found < 1.5 * expected


@given(st.integers(1, 60), st.integers(1, 12))
@cases(60)
def test_sequences_are_taken_from_all_of_a_text(length: int, count: int) -> None:
    found = spread(torch.arange(length)[:, None], count)[:, 0].tolist()
    assert len(found) == min(count, length)
    assert found[0] == 0
    gaps = [after - before for before, after in itertools.pairwise([*found, length])]
    assert max(gaps) - min(gaps) <= 1


def moved(teacher: Teacher, names: list[str]) -> dict[str, Tensor]:
    return {name: clustered(linear_weight(teacher.model.get_submodule(name)), FORMATS[0]) for name in names}


def test_shares_add_up_to_the_divergence(teacher: Teacher) -> None:
    path, blocks = decoder_blocks(teacher.model)
    names = [f"{path}.{number}.{name}" for number, block in enumerate(blocks) for name in linear_layers(block)]
    sequences = token_ids(2, seed=5)
    weights = moved(teacher, names)
    still = f"{path}.0.self_attn.q_proj"
    weights[still] = linear_weight(teacher.model.get_submodule(still))
    found = shares(teacher, weights, sequences, nullcontext, nothing)
    model = share_copy(teacher.model)
    for name, weight in weights.items():
        set_linear_weight(model.get_submodule(name), weight)
    assert sum(found.values()) == pytest.approx(divergence(teacher.model, model, sequences).kl, rel=1e-3)
    assert found[still] == 0
    assert sum(value > 0 for value in found.values()) > 10
    # One layer has all of its own divergence.
    one = {name: weights[name] for name in (f"{path}.1.mlp.down_proj",)}
    model = share_copy(teacher.model)
    set_linear_weight(model.get_submodule(f"{path}.1.mlp.down_proj"), one[f"{path}.1.mlp.down_proj"])
    expected = divergence(teacher.model, model, sequences).kl
    assert sum(shares(teacher, one, sequences, nullcontext, nothing).values()) == pytest.approx(expected, rel=1e-3)
