"""A step of stages 2 and 3 against plain autograd through the layers' weights and one step of the optimizer for all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lbllm import kernels
from lbllm.quant import training_layer
from lbllm.quant.levels import polarization
from lbllm.quant.training_layer import Mode
from lbllm.sections import AarConfig, LayerFormat, WatConfig
from lbllm.stages import distill as distillation
from lbllm.stages.distill import Step, batch_order, binary_layers, cosine, distill, quantizers_of, token_error
from lbllm.stages.wat import thaw_layers, wat_block
from tests.helpers.cases import cases
from tests.quant.test_layers import binarized, dense, layer_format

WIDTH, LENGTH, TEXTS = 21, 5, 8
WAT = WatConfig(epochs=1, batch_tokens=2 * LENGTH, lr_weight=1e-2, lr_levels=1e-2, lr_bitmap=3e-2)
AAR = AarConfig(epochs=1, batch_tokens=2 * LENGTH, lr_levels=1e-2, lr_act=1e-2)
bfloat16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    """Layers as models have them: two with one input, one stored transposed, one dense, one used ``times`` times."""

    def __init__(self, fmt: LayerFormat, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.left, self.right = (binarized(dense(nn.Linear, rows, WIDTH, bias=False), fmt) for rows in (12, 13))
        self.right.quantizer = self.left.quantizer
        self.out = binarized(dense(Conv1D, WIDTH, 25), fmt)
        self.kept = dense(nn.Linear, WIDTH, WIDTH)
        self.again = binarized(dense(nn.Linear, WIDTH, WIDTH), layer_format("w1", -1))

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = torch.cat((self.left(hidden).tanh(), self.right(hidden)), -1)
        hidden = hidden + self.kept(self.out(mixed))
        for _ in range(self.times):
            hidden = hidden + self.again(hidden)
        return hidden


def streams() -> tuple[Tensor, Tensor]:
    inputs, targets = torch.randn(2, TEXTS, LENGTH, WIDTH, generator=random(3))
    return inputs, targets


def prepared(block: Block, mode: Mode) -> list[dict[str, Any]]:
    """The block's layers in a mode, and the optimizer's groups."""
    layers = binary_layers(block)
    if mode == "frozen":
        return [{"params": [layer.params], "lr": 1e-2} for layer in layers.values()]
    latents = {name: layer.weight().detach() * 1.1 for name, layer in layers.items()}
    return thaw_layers(layers, latents, WAT.model_copy(update={"bitmap": mode}))


def plain_steps(
    block: Block, groups: list[dict[str, Any]], config: WatConfig | AarConfig, autocast: Any
) -> list[tuple[float, float]]:
    """Train as the definition says; returns loss and polarization of each step."""
    inputs, targets = streams()
    layers = list(binary_layers(block).values())
    quantizers = quantizers_of(layers)
    if quantizers:
        groups = [*groups, {"params": [quantizer.act for quantizer in quantizers], "lr": AAR.lr_act}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-10, fused=True)
    rates = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    bitmaps = [layer.bitmap for layer in layers if layer.bitmap is not None]
    order, shown = batch_order(TEXTS, 2, 1, 0), []
    for step, rows in enumerate(order):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cosine(step, len(order))
        with autocast():
            output = block(inputs[rows])
        loss, reg = token_error(output, targets[rows]), torch.zeros(())
        if bitmaps:
            beta = WAT.beta_start + (WAT.beta_end - WAT.beta_start) * step / (len(order) - 1)
            reg = WAT.reg_weight * torch.stack([polarization(bitmap, beta) for bitmap in bitmaps]).mean()
        optimizer.zero_grad()
        (loss + reg).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        for bitmap in bitmaps:
            bitmap.data.clamp_(0, 1)
        for quantizer in quantizers:
            quantizer.bound()
        shown.append((float(loss.detach()), float(reg.detach())))
    return shown


def distilled(
    block: Block, groups: list[dict[str, Any]], config: WatConfig | AarConfig, autocast: Any, *given_streams: Tensor
) -> list[Step]:
    inputs, targets = given_streams or streams()
    options: dict[str, Any] = {"loss_kind": "relative", "seed": 0, "autocast": autocast, "lr_act": AAR.lr_act}
    return list(distill(block, {}, inputs, targets, groups, config, **options))


def parameters(block: Block) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in block.named_parameters() if "kept" not in name}


@pytest.fixture(params=["kernels", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels and gradients that are computed twice, as of a large block; or without both."""
    assert kernels.ready()
    if request.param == "PyTorch":
        monkeypatch.setattr(kernels, "ready", lambda: False)
    else:
        monkeypatch.setattr(distillation, "KEPT_GRADIENTS", 0)


@cases(60)
@given(
    st.sampled_from(["coupled", "relaxed", "frozen"]),
    st.builds(
        layer_format, st.sampled_from(["w1+1", "w1"]), st.integers(1, 40) | st.just(-1), st.sampled_from([4, 8, 16])
    ),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 40, 2**20]),
    st.booleans(),
)
def test_a_layer_has_the_weight_and_the_gradients_of_plain_autograd_in_any_parts(
    mode: Mode, fmt: LayerFormat, rows: int, columns: int, dtype: torch.dtype, part: int, compiled: bool
) -> None:
    assert kernels.ready()
    if fmt.format == "w1" and mode == "relaxed":
        mode = "coupled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_layer, "CPU_PART", part)
        if not compiled:
            patch.setattr(kernels, "ready", lambda: False)
        layer = binarized(dense(nn.Linear, rows, columns), fmt)
        if mode != "frozen":
            layer.thaw(torch.randn(rows, columns, generator=random()), mode)
            assert layer.index.numel() == 0
        plain = copy.deepcopy(layer)
        grad, slope = torch.randn(rows, columns, generator=random(1)).to(dtype), torch.tensor(0.7)
        weight = plain.weight()
        regular = torch.zeros(()) if plain.bitmap is None else slope * polarization(plain.bitmap, 3.0)
        ((weight * grad.float()).sum() + regular).backward()
        layer.expand_dense(dtype)
        assert layer.dense is not None
        assert torch.equal(layer.dense, weight.to(dtype))
        layer.dense.backward(grad)
        assert layer.dense is None
        layer.pass_on(3.0, slope)
        for found, expected in zip(layer.trained(), plain.trained(), strict=True):
            assert found.grad is not None
            assert expected.grad is not None
            assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("mode", ["coupled", "relaxed", "frozen"])
@pytest.mark.parametrize("autocast", [nullcontext, bfloat16])
@pytest.mark.parametrize("param_bits", [4, 16])
@pytest.mark.usefixtures("way")
def test_training_gives_the_bytes_of_plain_autograd(mode: Mode, autocast: Any, param_bits: int) -> None:
    fmt = layer_format(group_size=8, param_bits=param_bits, act_bits=4 if mode == "frozen" else 16)
    config = AAR if mode == "frozen" else WAT
    block = Block(fmt)
    plain = copy.deepcopy(block)
    expected = plain_steps(plain, prepared(plain, mode), config, autocast)
    steps = distilled(block, prepared(block, mode), config, autocast)
    assert [(step.loss, step.reg) for step in steps] == expected
    for name, parameter in parameters(plain).items():
        assert torch.equal(parameters(block)[name], parameter), name


@pytest.mark.parametrize("mode", ["coupled", "frozen"])
def test_a_layer_that_a_block_uses_twice_gets_the_gradients_of_both(mode: Mode) -> None:
    block = Block(layer_format(group_size=8), times=2)
    plain = copy.deepcopy(block)
    expected = plain_steps(plain, prepared(plain, mode), WAT, nullcontext)
    steps = distilled(block, prepared(block, mode), WAT, nullcontext)
    assert [step.loss for step in steps] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    for name, parameter in parameters(plain).items():
        torch.testing.assert_close(parameters(block)[name], parameter, rtol=1e-4, atol=1e-5)


def test_streams_in_bfloat16_are_read_as_float32() -> None:
    inputs, targets = (stream.bfloat16() for stream in streams())
    losses = []
    for pair in ((inputs, targets), (inputs.float(), targets.float())):
        block = Block(layer_format(group_size=8))
        losses.append([step.loss for step in distilled(block, prepared(block, "coupled"), WAT, nullcontext, *pair)])
    assert losses[0] == losses[1]


def test_latent_weights_in_float16_are_those_in_float32() -> None:
    losses, inputs, targets = [], *streams()
    for convert in (Tensor.half, lambda latent: latent.half().float()):
        block = Block(layer_format(group_size=8))
        latents = {name: convert(layer.weight().detach()) for name, layer in binary_layers(block).items()}
        steps = wat_block(block, {}, inputs, targets, latents, WAT, seed=0, autocast=nullcontext)
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the copies of values from a tensor to Python."""
    reads = [0]
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        plain = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            reads[0] += 1
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return lambda: reads[0]


@pytest.mark.parametrize("mode", ["coupled", "relaxed", "frozen"])
def test_a_step_reads_one_tensor(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernels for the CPU take knee and clips as numbers.
    monkeypatch.setattr(kernels, "ready", lambda: False)
    block = Block(layer_format(group_size=8, act_bits=4 if mode == "frozen" else 16))
    groups, config = prepared(block, mode), AAR if mode == "frozen" else WAT
    inputs, targets = streams()
    options: dict[str, Any] = {"loss_kind": "relative", "seed": 0, "autocast": nullcontext}
    steps = distill(block, {}, inputs, targets, groups, config, **options)
    next(steps)  # in the first step AdamW makes its state
    reads = count_reads(monkeypatch)
    assert len(list(steps)) == 3
    assert reads() == 3


def test_a_step_without_a_finite_loss_leaves_no_gradient() -> None:
    block = Block(layer_format(group_size=8, act_bits=4))
    before = {name: parameter.detach().clone() for name, parameter in parameters(block).items()}
    inputs, targets = streams()
    (step,) = distilled(block, prepared(block, "frozen"), AAR, nullcontext, inputs, targets * math.nan)
    assert math.isnan(step.loss)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters(block).items())
    assert all(layer.gradient is None for layer in binary_layers(block).values())


def test_a_second_stream_is_in_every_step() -> None:
    """As one process with both streams one after the other, which takes both parts of a sequence in the same step."""
    ends = []
    for both in (False, True):
        block, (inputs, targets) = Block(layer_format("w1+1", 16, 16)), streams()
        others = inputs + 0.1 * torch.randn(inputs.shape, generator=random(7))
        groups = prepared(block, "coupled")
        options: dict[str, Any] = {"loss_kind": "relative", "seed": 0, "autocast": nullcontext}
        if both:
            steps = distill(block, {}, inputs, targets, groups, WAT, teacher_inputs=others, **options)
            losses = [step.loss for step in steps]
        else:
            losses = _on_both(block, inputs, others, targets, groups)
        ends.append((losses, parameters(block)))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-5)
    for name, expected in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], expected, rtol=1e-4, atol=1e-6)


def _on_both(
    block: Block, inputs: Tensor, others: Tensor, targets: Tensor, groups: list[dict[str, Any]]
) -> list[float]:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-10, fused=True)
    rates, shown = [group["lr"] for group in groups], []
    parameters = [parameter for group in groups for parameter in group["params"]]
    order = batch_order(len(inputs), max(1, WAT.batch_tokens // inputs.shape[1]), WAT.epochs, 0)
    for step, rows in enumerate(order):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cosine(step, len(order))
        losses = [token_error(block(one[rows]), targets[rows]) for one in (inputs, others)]
        loss = (losses[0] + losses[1]) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, WAT.grad_clip)
        optimizer.step()
        shown.append(float(loss.detach()))
    return shown
