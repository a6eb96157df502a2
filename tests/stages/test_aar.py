"""Stage 3: the search against all of its candidates, and what training does to a tiny block with 4-bit activations."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    layer_inputs,
    linear_layers,
    run_block,
    share_copy,
    shared_inputs,
)
from lbllm.quant.activations import CLIP_RANGE, KNEE_RANGE, ActQuantizer
from lbllm.quant.kv_cache import KVFormat, TrainingCache
from lbllm.quant.kv_groups import training_cache
from lbllm.sections import AarConfig, LayerFormat, PtqConfig
from lbllm.stages.aar import CLIPS, KNEES, aar_block, add_quantizers, search_grid
from lbllm.stages.distill import binary_layers, block_error
from lbllm.stages.ptq import ptq_block
from tests.helpers.tiny_models import VOCABULARY, tiny

LENGTH = 16
CONFIG = AarConfig(epochs=6, batch_tokens=8 * LENGTH, search_tokens=200, lr_levels=1e-2, lr_act=1e-2)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The search.


def quantizer_with(bits: int, tail: int, knee: float, clip: float) -> ActQuantizer:
    quantizer = ActQuantizer(bits, tail).requires_grad_(False)
    quantizer.act.copy_(torch.tensor([knee, clip, clip]))
    return quantizer


@torch.no_grad()
def output_error(quantizer: ActQuantizer, x: Tensor, weight: Tensor) -> float:
    """Mean over the tokens of ||W (q(x) - x)||^2 / ||W x||^2, token by token in float64."""
    errors = []
    for token in x:
        difference = quantizer(token[None])[0].double() - token.double()
        errors.append(
            float((weight.double() @ difference).norm() ** 2 / (weight.double() @ token.double()).norm() ** 2)
        )
    return sum(errors) / len(errors)


@pytest.mark.parametrize("tail", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1.5])
def test_the_search_takes_the_best_of_all_candidates(tail: int, size: float) -> None:
    x = torch.randn(40, 32, generator=random()) * torch.exp(size * torch.randn(40, 32, generator=random(1)))
    weight = torch.randn(12, 32, generator=random(2))
    quantizer = ActQuantizer(4, tail)
    error = search_grid(quantizer, x, weight)
    errors = {
        (knee, clip): output_error(quantizer_with(4, tail, knee, clip), x, weight)
        for knee, clip in itertools.product(KNEES, CLIPS)
    }
    knee, clip_low, clip_high = quantizer.act.tolist()
    best = min(errors, key=lambda candidate: errors[candidate])
    assert (knee, clip_low, clip_high) == pytest.approx((*best, best[1]))
    assert error == pytest.approx(errors[best], rel=1e-4)


def test_ranges_of_a_few_inputs_keep_an_outlier_from_the_others() -> None:
    x, weight = torch.randn(40, 32, generator=random()), torch.randn(12, 32, generator=random(2))
    x[:, 5] *= 30
    errors = []
    for size in (-1, 16, 8):
        quantizer = ActQuantizer(4, 2, group_size=size)
        errors.append(search_grid(quantizer, x, weight))
        quantizer.requires_grad_(False)
        assert errors[-1] == pytest.approx(output_error(quantizer, x, weight), rel=1e-4)
    assert errors[0] > errors[1] > errors[2]


def test_heavier_tails_get_a_smaller_body() -> None:
    knees = []
    for size in (0.0, 1.0):
        x = torch.randn(100, 64, generator=random()) * torch.exp(size * torch.randn(100, 64, generator=random(1)))
        quantizer = ActQuantizer(4, 2)
        search_grid(quantizer, x, torch.randn(20, 64, generator=random(2)))
        knees.append(quantizer.act.tolist()[0])
    assert knees[0] > knees[1]


def test_plain_quantizers_have_nothing_to_search() -> None:
    quantizer = ActQuantizer(8, 2)
    x, weight = torch.randn(10, 16, generator=random()), torch.randn(4, 16, generator=random(1))
    error = search_grid(quantizer, x, weight)
    assert quantizer.act.tolist() == [1, 1, 1]
    assert error == pytest.approx(output_error(quantizer, x, weight), rel=1e-3)


def test_inputs_of_zeros_are_searched_without_harm() -> None:
    quantizer = ActQuantizer(4, 2)
    assert search_grid(quantizer, torch.zeros(5, 16), torch.randn(4, 16, generator=random())) == 0
    assert quantizer.act.isfinite().all()


# Whole blocks.


class Problem:
    """A tiny block after stage 1: student, its call, inputs and targets, layers by shared input."""

    def __init__(self, architecture: str = "llama", act_bits: dict[str, int] | None = None, default: int = 4) -> None:
        model, _ = tiny(architecture)
        block = decoder_blocks(model)[1][0].requires_grad_(False)
        sequences = torch.randint(3, VOCABULARY, (32, LENGTH), generator=random())
        self.inputs: Tensor = first_inputs(model, sequences, 32)
        self.call: dict[str, Any] = capture_calls(model, sequences[:1])[0]
        with torch.no_grad():
            self.targets = run_block(block, self.inputs, self.call)
        formats = {
            name: LayerFormat.model_validate(
                {"format": "w1+1", "group_size": 16, "param_bits": 16, "act_bits": (act_bits or {}).get(name, default)}
            )
            for name in linear_layers(block)
        }
        self.sharing = shared_inputs(block, self.inputs[:1], self.call)
        self.student: nn.Module = share_copy(block)
        meant = all_inputs(block, self.inputs, self.call, 32)
        stage_1 = ptq_block(block, share_copy(block), self.call, self.inputs, meant, formats, PtqConfig(), 32)
        for name, _, layer in list(stage_1):
            self.student.set_submodule(name, layer)

    def add_quantizers(self, kv_bits: int = 4) -> None:
        add_quantizers(
            self.student,
            self.sharing,
            self.call,
            self.inputs,
            CONFIG,
            tail=2,
            cache=training_cache(KVFormat(kv_bits)),
            batch=32,
        )

    def train(self, config: AarConfig = CONFIG, kv_bits: int = 4) -> list[float]:
        steps = aar_block(
            self.student,
            self.call,
            self.inputs,
            self.targets,
            config,
            cache=training_cache(KVFormat(kv_bits)),
            seed=0,
            autocast=nullcontext,
        )
        return [step.loss for step in steps]

    def error(self, kv_bits: int = 4) -> float:
        cache = training_cache(KVFormat(kv_bits))
        return block_error(self.student, self.inputs, self.targets, self.call, 32, cache)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.student.state_dict().items()}


@pytest.mark.parametrize(("architecture", "kv_bits"), [("llama", 4), ("llama", 16), ("gpt2", 8), ("phi3", 4)])
def test_training_lowers_the_searched_loss_and_keeps_the_bits(architecture: str, kv_bits: int) -> None:
    problem = Problem(architecture)
    clean = problem.error(16)
    problem.add_quantizers(kv_bits)
    before, state = problem.error(kv_bits), problem.state()
    assert before > clean
    losses = problem.train(kv_bits=kv_bits)
    assert len(losses) == 6 * 4
    assert all(math.isfinite(loss) for loss in losses)
    assert problem.error(kv_bits) < 0.97 * before
    after = problem.state()
    for name in state:
        trained = name.endswith((".params", "quantizer.act"))
        assert torch.equal(after[name], state[name]) != trained, name


def test_the_squared_error_is_that_of_the_paper() -> None:
    """The first step's loss against ||teacher - student||_F^2 in float64, over the number of values."""
    problem = Problem()
    problem.add_quantizers()
    with torch.no_grad():
        output = run_block(problem.student, problem.inputs, problem.call, TrainingCache(4))
    squared = (problem.targets.double() - output.double()).norm() ** 2 / output.numel()
    one_step = AarConfig(epochs=1, batch_tokens=problem.inputs.shape[0] * LENGTH, loss="mse")
    assert problem.train(one_step) == [pytest.approx(float(squared), rel=1e-4)]
    before = problem.error()
    losses = problem.train(CONFIG.model_copy(update={"loss": "mse"}))
    assert sum(losses[-4:]) < sum(losses[:4])
    assert problem.error() < before


def test_layers_with_one_input_share_their_quantizer() -> None:
    problem = Problem("llama")
    problem.add_quantizers()
    layers = binary_layers(problem.student)
    for names in problem.sharing:
        assert len({id(layers[name].quantizer) for name in names}) == 1
    assert len({id(layer.quantizer) for layer in layers.values()}) == len(problem.sharing)
    assert all(layer.quantizer is not None and layer.quantizer.bits == 4 for layer in layers.values())


def test_the_first_layers_quantizer_is_searched_on_what_it_reads_for_all_that_read_it() -> None:
    problem = Problem("llama")
    problem.add_quantizers()
    layers = binary_layers(problem.student)
    names = problem.sharing[0]
    x = torch.cat(list(layer_inputs(problem.student, names[0], problem.inputs, problem.call, 32)))[:200]
    expected = ActQuantizer(4, 2)
    search_grid(expected, x, torch.cat([layers[name].weight() for name in names]))
    quantizer = layers[names[0]].quantizer
    assert quantizer is not None
    assert torch.equal(quantizer.act, expected.act)


def test_each_layer_gets_the_bits_of_its_format() -> None:
    problem = Problem("llama", {"self_attn.k_proj": 8, "self_attn.v_proj": 16, "mlp.down_proj": 16})
    problem.add_quantizers()
    found = {
        name: 16 if layer.quantizer is None else layer.quantizer.bits
        for name, layer in binary_layers(problem.student).items()
    }
    expected = dict.fromkeys(found, 4) | {"self_attn.k_proj": 8, "self_attn.v_proj": 16, "mlp.down_proj": 16}
    assert found == expected
    assert math.isfinite(problem.train()[-1])


def test_without_quantized_activations_only_the_levels_train() -> None:
    problem = Problem("llama", default=16)
    problem.add_quantizers(16)
    before = problem.error(16)
    problem.train(kv_bits=16)
    assert problem.error(16) < before


def test_knees_and_clips_stay_in_their_ranges_and_can_come_back() -> None:
    problem = Problem("llama")
    problem.add_quantizers()
    problem.train(CONFIG.model_copy(update={"lr_act": 5.0, "epochs": 1}))
    for layer in binary_layers(problem.student).values():
        assert layer.quantizer is not None
        knee, *clips = layer.quantizer.act.tolist()
        assert KNEE_RANGE[0] - 1e-6 <= knee <= KNEE_RANGE[1]
        assert all(CLIP_RANGE[0] - 1e-6 <= clip <= CLIP_RANGE[1] for clip in clips)


def test_no_epochs_leave_the_searched_start() -> None:
    problem = Problem("llama")
    problem.add_quantizers()
    state = problem.state()
    assert problem.train(CONFIG.model_copy(update={"epochs": 0})) == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in problem.state().items())


def test_targets_that_are_not_finite_end_training_and_leave_the_block_usable() -> None:
    problem = Problem("llama")
    problem.add_quantizers()
    problem.targets[:, 0, 0] = float("nan")
    state = problem.state()
    losses = problem.train()
    assert len(losses) == 1
    assert not math.isfinite(losses[0])
    assert all(torch.equal(tensor, state[name]) for name, tensor in problem.state().items())
