"""Stage 2: its loss against loops, its batches, and what training does to a tiny block."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    linear_layers,
    run_block,
    share_copy,
)
from lbllm.quant.levels import LEVELS
from lbllm.sections import Format, LayerFormat, PtqConfig, WatConfig
from lbllm.stages.distill import Step, batch_order, binary_layers, block_error, cosine, token_error
from lbllm.stages.ptq import ptq_block
from lbllm.stages.wat import wat_block
from tests.helpers.cases import cases
from tests.helpers.tiny_models import VOCABULARY, tiny

LENGTH = 16


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The loss.


def slow_token_error(output: Tensor, target: Tensor, kind: str) -> float:
    total, count = 0.0, 0
    for got, wanted in zip(output.flatten(0, -2).tolist(), target.flatten(0, -2).tolist(), strict=True):
        error = sum((a - b) ** 2 for a, b in zip(got, wanted, strict=True))
        scale = max(sum(a * a for a in got), sum(b * b for b in wanted))
        total += error / len(got) if kind == "mse" else error / scale
        count += 1
    return total / count


@pytest.mark.parametrize("kind", ["relative", "mse"])
def test_token_error_equals_loops(kind: str) -> None:
    target = torch.randn(2, 5, 8, generator=random(), dtype=torch.float64)
    output = target + torch.randn(2, 5, 8, generator=random(1), dtype=torch.float64)
    assert float(token_error(output, target, kind)) == pytest.approx(slow_token_error(output, target, kind), rel=1e-5)


@given(st.floats(-6, 6), st.floats(-6, 6), st.integers(0, 2**32))
@cases(60)
def test_relative_token_error_is_at_most_four(output_size: float, target_size: float, seed: int) -> None:
    output, target = torch.randn(2, 3, 8, generator=random(seed))
    loss = float(token_error(output * 10**output_size, target * 10**target_size))
    assert 0 <= loss <= 4 + 1e-5
    assert float(token_error(-target, target)) == pytest.approx(4)
    assert float(token_error(target, target)) == 0


@pytest.mark.parametrize("stream", ["output", "target", "both"])
def test_one_massive_token_does_not_rule_the_relative_error(stream: str) -> None:
    target = torch.randn(1, 100, 8, generator=random())
    output = target + 0.1 * torch.randn(1, 100, 8, generator=random(1))
    plain = float(token_error(output, target))
    spike = torch.zeros(1, 100, 8)
    spike[0, 0, 3] = 1e5
    output = output + spike * (stream != "target")
    target = target + spike * (stream != "output")
    leaf = output.clone().requires_grad_()
    loss = token_error(leaf, target)
    assert abs(float(loss.detach()) - plain) <= 4 / 100
    (gradient,) = torch.autograd.grad(loss, [leaf])
    assert float(gradient[0, 0].norm()) <= float(gradient[0, 1:].norm(dim=-1).max())


def test_tokens_of_zeros_have_no_error() -> None:
    zeros = torch.zeros(1, 3, 4, requires_grad=True)
    loss = token_error(zeros, torch.zeros(1, 3, 4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


# The schedule.


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
@cases(60)
def test_every_epoch_covers_every_sequence_once(sequences: int, batch: int, epochs: int, seed: int) -> None:
    order = batch_order(sequences, batch, epochs, seed)
    assert len(order) == epochs * math.ceil(sequences / batch)
    rows = torch.cat(order).view(epochs, sequences)
    assert torch.equal(rows.sort(1).values, torch.arange(sequences).expand(epochs, -1))
    assert max(len(part) for part in order) <= batch


def test_the_order_depends_on_the_seed_and_nothing_else() -> None:
    first = torch.cat(batch_order(50, 4, 2, 7))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(torch.cat(batch_order(50, 4, 2, 7)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(torch.cat(batch_order(50, 4, 2, 8)), first)
    assert not torch.equal(first[:50], first[50:])


def test_the_rate_falls_from_one_to_a_twentieth() -> None:
    factors = [cosine(step, 50) for step in range(51)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.05)
    assert factors == sorted(factors, reverse=True)


# Training.


def problem(
    architecture: str = "llama", format_: Format = "w1+1"
) -> tuple[nn.Module, dict[str, Any], Tensor, Tensor, dict[str, Tensor]]:
    """A tiny block after stage 1: student, call, its inputs and targets, stage 1's latents."""
    model, _ = tiny(architecture)
    block = decoder_blocks(model)[1][0].requires_grad_(False)
    sequences = torch.randint(3, VOCABULARY, (48, LENGTH), generator=random())
    inputs, call = first_inputs(model, sequences, 48), capture_calls(model, sequences[:1])[0]
    with torch.no_grad():
        targets = run_block(block, inputs, call)
    fmt = LayerFormat(format=format_, group_size=16, param_bits=16, act_bits=16)
    formats = dict.fromkeys(linear_layers(block), fmt)
    student: nn.Module = share_copy(block)
    meant = all_inputs(block, inputs, call, 48)
    results = list(ptq_block(block, share_copy(block), call, inputs, meant, formats, PtqConfig(), 48))
    for name, _, layer in results:
        student.set_submodule(name, layer)
    return student, call, inputs, targets, {name: result.latent for name, result, _ in results}


def train(
    student: nn.Module,
    call: dict[str, Any],
    inputs: Tensor,
    targets: Tensor,
    latents: dict[str, Tensor],
    config: WatConfig,
    seed: int = 0,
) -> list[Step]:
    return list(wat_block(student, call, inputs, targets, latents, config, seed=seed, autocast=nullcontext))


@torch.no_grad()
def trained_error(student: nn.Module, call: dict[str, Any], inputs: Tensor, targets: Tensor, kind: str) -> float:
    return float(token_error(run_block(student, inputs, call), targets, kind))


CONFIG = WatConfig(epochs=8, batch_tokens=8 * LENGTH, lr_weight=1e-2, lr_levels=1e-2, lr_bitmap=3e-2, reg_weight=30)


@pytest.mark.parametrize(
    ("architecture", "format_", "bitmap"),
    [
        ("llama", "w1+1", "coupled"),
        ("llama", "w1+1", "relaxed"),
        ("llama", "w1", "coupled"),
        ("llama", "w1", "relaxed"),
        ("gpt2", "w1+1", "coupled"),
    ],
)
@pytest.mark.parametrize("loss", ["relative", "mse"])
def test_training_lowers_the_loss_and_ends_with_hard_bits(
    architecture: str, format_: Format, bitmap: str, loss: str
) -> None:
    student, call, inputs, targets, latents = problem(architecture, format_)
    before = trained_error(student, call, inputs, targets, loss)
    dense = {name: p.clone() for name, p in student.named_parameters() if not name.endswith("params")}
    config = CONFIG.model_copy(update={"bitmap": bitmap, "loss": loss})
    steps = train(student, call, inputs, targets, latents, config)
    assert [step.step for step in steps] == list(range(1, 8 * 6 + 1))
    assert all(math.isfinite(step.loss) and step.tokens_per_second > 0 for step in steps)
    polarized = bitmap == "relaxed" and format_ == "w1+1"
    # Towards the end every entry of the bitmap may have become hard.
    assert all((step.reg > 0) == polarized for step in steps[: len(steps) // 2])
    assert trained_error(student, call, inputs, targets, loss) < 0.93 * before
    for layer in binary_layers(student).values():
        assert layer.mode == "frozen"
        assert layer.latent is None
        assert layer.bitmap is None
        assert layer.index.dtype == torch.uint8
        assert int(layer.index.max()) < LEVELS[format_]
        weight = layer.weight()
        for group in weight[0].split(16):
            assert len(group.unique()) <= LEVELS[format_]
    # Norms and biases are the teacher's own and stay.
    assert all(torch.equal(dict(student.named_parameters())[name], tensor) for name, tensor in dense.items())


def test_polarization_leaves_little_to_lose_when_the_bitmap_becomes_hard() -> None:
    student, call, inputs, targets, latents = problem()
    steps = train(student, call, inputs, targets, latents, CONFIG.model_copy(update={"bitmap": "relaxed"}))
    relaxed = sum(step.loss for step in steps[-6:]) / 6
    assert steps[-1].reg < 0.1 * steps[0].reg
    assert block_error(student, inputs, targets, call, 48) < 1.1 * relaxed


@pytest.mark.parametrize(("start", "end"), [(20.0, 2.0), (3.0, 3.0), (2.0, 5.0)])
def test_the_power_of_the_polarization_goes_evenly_from_its_start_to_its_end(start: float, end: float) -> None:
    student, call, inputs, targets, latents = problem()
    values = {"bitmap": "relaxed", "lr_bitmap": 0.0, "beta_start": start, "beta_end": end, "reg_weight": 7.0}
    steps = train(student, call, inputs, targets, latents, CONFIG.model_copy(update=values))
    # A bitmap begins at 0.1 and 0.9, and stays there without a learning rate.
    powers = [start + (end - start) * k / (len(steps) - 1) for k in range(len(steps))]
    assert [step.reg for step in steps] == pytest.approx([7 * (1 - 0.8**power) for power in powers], rel=1e-4)


def test_training_is_reproducible_from_its_seed() -> None:
    states = []
    for seed in (3, 3, 4):
        student, call, inputs, targets, latents = problem()
        train(student, call, inputs, targets, latents, CONFIG.model_copy(update={"epochs": 1}), seed)
        states.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("bitmap", ["coupled", "relaxed"])
def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_layers_usable(bitmap: str) -> None:
    student, call, inputs, targets, latents = problem()
    rows = batch_order(len(inputs), 8, CONFIG.epochs, 0)
    # The third batch meets the bad target.
    targets[rows[2][0], 0, 0] = float("nan")
    steps = train(student, call, inputs, targets, latents, CONFIG.model_copy(update={"bitmap": bitmap}))
    assert len(steps) == 3
    assert [math.isfinite(step.loss) for step in steps] == [True, True, False]
    for layer in binary_layers(student).values():
        assert layer.mode == "frozen"
        assert layer.weight().isfinite().all()
    with torch.no_grad():
        assert run_block(student, inputs, call).isfinite().all()


def test_block_error_is_the_mean_over_all_tokens_whatever_the_batch() -> None:
    student, call, inputs, targets, _ = problem()
    errors = [block_error(student, inputs[:7], targets[:7], call, batch) for batch in (1, 3, 7)]
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-4)
