"""The baselines that are trained: their layers against formulas in float64, and whole tiny models."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.baselines.efficient_qat import Training, UniformLinear, efficient_qat
from lbllm.baselines.even import EvenLinear, even_stages
from lbllm.baselines.gptq import solve
from lbllm.baselines.layer import Settings
from lbllm.baselines.methods import METHODS, StoredLayer, quantize_blocks
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.sections import E2eConfig, WatConfig
from tests.baselines.test_methods import hessian_of, normal
from tests.helpers.tiny_models import VOCABULARY, tiny

SEQUENCES = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
WAT = WatConfig(epochs=4, batch_tokens=48)
E2E = E2eConfig(seq_len=24, batch_tokens=48, epochs=2)


def linear(rows: int, columns: int) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(normal(rows, columns))
    return layer


def kl(model: PreTrainedModel, teacher: PreTrainedModel) -> float:
    with torch.no_grad():
        p, q = (one(input_ids=SEQUENCES).logits.log_softmax(-1) for one in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_even_layers_have_even_levels_and_their_exact_gradients(bits: int, symmetric: bool) -> None:
    layer, settings = linear(5, 40), Settings(16, bits, symmetric=symmetric)
    solved = solve(layer.weight.detach(), hessian_of(40).float(), settings)
    even = EvenLinear(layer, settings, solved)
    torch.testing.assert_close(even.weight(), solved.value)
    assert even.stored_bits() == 5 * (40 * bits + 3 * 16 * (1 if symmetric else 2))
    even.thaw(solved.latent, "coupled")
    gradient = normal(5, 40, seed=1).float()
    even.gradient = gradient
    even.pass_on()
    assert even.latent is not None
    assert even.params.grad is not None
    torch.testing.assert_close(even.latent.grad, gradient)
    step, low = even.params.detach()[..., 0], -(2 ** (bits - 1)) * even.params.detach()[..., 0]
    if not symmetric:
        low = even.params.detach()[..., 1]
    for row in range(5):
        for group, columns in enumerate(torch.arange(40).split(16)):
            values = solved.latent[row, columns]
            codes = ((values - low[row, group]) / step[row, group]).round().clamp(0, 2**bits - 1)
            of_step = codes - 2 ** (bits - 1) if symmetric else codes
            expected = [float((gradient[row, columns] * of_step).sum())]
            if not symmetric:
                expected.append(float(gradient[row, columns].sum()))
            assert even.params.grad[row, group].tolist() == pytest.approx(expected, abs=1e-4)
    trained = even.weight()
    even.freeze()
    torch.testing.assert_close(even.weight(), trained)


def test_our_stages_train_even_levels() -> None:
    teacher, _ = tiny("llama")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = Settings(16, 2)
    told: list[int] = []
    run = partial(even_stages, teacher, SEQUENCES, settings, seed=0, autocast=nullcontext, on_block=told.append)
    untrained, _ = run(WAT.model_copy(update={"epochs": 1, "lr_weight": 0.0, "lr_levels": 0.0}), None)
    blockwise, _ = run(WAT, None)
    whole, stored = run(WAT, E2E)
    assert told == [1, 2] * 3
    assert kl(whole, teacher) < kl(blockwise, teacher) < kl(untrained, teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    check_layers(whole, settings, stored, 32)


def test_transposed_layers_are_trained_too() -> None:
    teacher, _ = tiny("gpt2")
    settings, once = Settings(16, 3, symmetric=True), WAT.model_copy(update={"epochs": 1})
    found, stored = even_stages(teacher, SEQUENCES, settings, once, None, seed=0, autocast=nullcontext)
    check_layers(found, settings, stored, 16)
    rounded, _ = tiny("gpt2")
    quantize_blocks(rounded, SEQUENCES, METHODS["rtn"], settings)
    assert kl(found, teacher) < kl(rounded, teacher)


def check_layers(model: PreTrainedModel, settings: Settings, stored: StoredLayer, bits_a_group: int) -> None:
    """Each group has at most 2^bits levels, which are even, and every stored bit is counted."""
    bits = weights = 0
    for block in decoder_blocks(model)[1]:
        for layer in linear_layers(block).values():
            weight = linear_weight(layer)
            rows, columns = weight.shape
            for group in weight.split(settings.group_size, 1):
                for row in group[:: max(1, rows // 3)]:
                    levels = row.unique()
                    assert len(levels) <= 2**settings.bits
                    steps = levels.diff() / levels.diff().min() if len(levels) > 1 else levels[:0]
                    torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=0)
            bits += rows * (columns * settings.bits + -(-columns // settings.group_size) * bits_a_group)
            weights += rows * columns
    assert (stored.bits, stored.weights) == (bits, weights)


def test_uniform_layers_have_the_papers_weight_and_gradients() -> None:
    layer = linear(4, 20)
    uniform = UniformLinear(layer, Settings(8, 2)).double()
    with torch.no_grad():
        uniform.step.mul_(0.7)  # so that some weights are outside of their range
    weight, step, zero = (one.detach() for one in (uniform.weight, uniform.step, uniform.zero))
    gradient = normal(4, 20, seed=1)
    value = uniform.quantized()
    (value * gradient).sum().backward()
    assert uniform.weight.grad is not None
    assert uniform.step.grad is not None
    by_step = torch.zeros_like(step)
    for row in range(4):
        for column in range(20):
            s, z = float(step[row, column // 8]), float(zero[row, column // 8].round())
            place = float((weight[row, column] / s).round()) + z
            code = min(max(place, 0.0), 3.0)
            assert float(value[row, column]) == pytest.approx(s * (code - z))
            inside = place == code
            assert float(uniform.weight.grad[row, column]) == pytest.approx(float(gradient[row, column]) * inside)
            slope = code - z - (float(weight[row, column]) / s if inside else 0.0)
            by_step[row, column // 8] += gradient[row, column] * slope
    torch.testing.assert_close(uniform.step.grad, by_step)
    uniform.fix()
    uniform.zero_grad()
    uniform.quantized().sum().backward()
    assert uniform.weight.grad is None
    assert uniform.zero.grad is None


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.soak)])
def test_both_phases_of_efficient_qat_lower_what_they_train_for(architecture: str) -> None:
    teacher, _ = tiny(architecture)
    settings, training = Settings(16, 2), Training(4, 48, end_tokens=48, end_seq_len=24, end_epochs=4)
    first, stored = efficient_qat(teacher, SEQUENCES, settings, replace(training, end_epochs=0), seed=0)
    both, _ = efficient_qat(teacher, SEQUENCES, settings, training, seed=0)
    rounded, _ = tiny(architecture)
    quantize_blocks(rounded, SEQUENCES, METHODS["rtn"], Settings(16, 2, clip=True))
    assert kl(first, teacher) < kl(rounded, teacher)
    losses = [float(model(input_ids=SEQUENCES, labels=SEQUENCES).loss) for model in (first, both)]
    assert losses[1] < losses[0]
    check_layers(both, settings, stored, 18)


def test_nothing_else_of_the_model_changes() -> None:
    teacher, _ = tiny("llama")
    found, _ = efficient_qat(teacher, SEQUENCES, Settings(16, 3), Training(1, 96, end_epochs=0), seed=0)
    path, blocks = decoder_blocks(teacher)
    inside = {f"{path}.{n}.{name}.weight" for n, block in enumerate(blocks) for name in linear_layers(block)}
    others: dict[str, Tensor] = {k: v for k, v in found.state_dict().items() if k not in inside}
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in others.items())
