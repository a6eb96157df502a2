"""Train a block to match the output of the teacher's block: the loop, the loss, the order of the texts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbllm import ranks
from lbllm.models.blocks import device_of, entering, run_batches, run_block
from lbllm.models.calls import BlockCall
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import polarization
from lbllm.quant.training_layer import BinaryLinear
from lbllm.ranks import Share
from lbllm.sections import AarConfig, WatConfig
from lbllm.stages.probe import Budget, Probe

# Gradients of a block in float32 that take at most so many bytes are computed once a step.
KEPT_GRADIENTS = 64 * 2**20

# The loss of a block before and after a stage is measured on at most this many tokens.
PROBE_TOKENS = 2_048


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number (from 1), losses, learning-rate factor in (0, 1], tokens per second.

    ``probe``: the loss after the step on tokens that the stage doesn't train on, if it was measured at this step.
    """

    step: int
    loss: float
    reg: float
    lr: float
    tokens_per_second: float
    probe: float | None = None


def token_error(output: Tensor, target: Tensor, kind: str = "relative") -> Tensor:
    """Return the reconstruction loss of outputs (..., hidden), a scalar.

    ``mse``: the paper's squared error. ``relative``: each token's squared error divided by the larger of the two
    squared norms, averaged over the tokens. Tokens with massive activations, whose norms are hundreds of times larger,
    then have the same weight as other tokens. If only one of the two outputs has the massive activation, the token's
    error is at most 4.
    """
    output, target = output.float(), target.float()
    error = (output - target).square().sum(-1)
    if kind == "mse":
        return error.mean() / target.shape[-1]
    scale = torch.maximum(target.square().sum(-1), output.detach().square().sum(-1))
    return (error / scale.clamp_min(1e-12)).mean()


@dataclass(frozen=True)
class HeldOut:
    """Inputs and targets (n, T, hidden) of a block for tokens that it doesn't train on, and the time to measure them.

    ``call``: the block's arguments for sequences of length T.
    """

    inputs: Tensor
    targets: Tensor
    call: BlockCall
    budget: Budget


@torch.no_grad()
def block_error(
    block: nn.Module, inputs: Tensor, targets: Tensor, call: BlockCall, batch: int, cache: Any = None
) -> float:
    """Return the mean ``token_error`` of a block over inputs and targets (n, T, hidden), those of all ranks."""
    if not len(inputs):
        return ranks.mean(0.0, 0)
    parts = list(targets.split(batch))
    outputs = zip(run_batches(block, inputs, call, batch, cache), parts, strict=True)
    errors = torch.stack([token_error(output, entering(target, output.device)) for output, target in outputs])
    total = sum(error * len(part) for error, part in zip(errors.tolist(), parts, strict=True))
    return ranks.mean(total / len(inputs), len(inputs))


def cosine(step: int, steps: int) -> float:
    """Return the learning-rate factor of step 0, 1, ...: half a cosine from 1 down to 1/20."""
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))


def batch_order(sequences: int, batch: int, epochs: int, seed: int) -> list[Tensor]:
    """Return the indices of the sequences of every step: one permutation per epoch; a shorter last batch is kept."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for _ in range(epochs):
        order += torch.randperm(sequences, generator=generator).split(batch)
    return order


def binary_layers(block: nn.Module) -> dict[str, BinaryLinear]:
    """Return the ``BinaryLinear`` layers of a block by their name in it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, BinaryLinear)}


def quantizers_of(layers: Iterable[BinaryLinear]) -> list[ActQuantizer]:
    """Return the quantizers of the layers' inputs, each once: layers that read the same input share a quantizer."""
    found = {id(layer.quantizer): layer.quantizer for layer in layers if layer.quantizer is not None}
    return list(found.values())


def distill(
    block: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    groups: list[dict[str, Any]],
    config: WatConfig | AarConfig,
    *,
    loss_kind: str,
    seed: int,
    autocast: Any,
    lr_act: float = 0.0,
    cache: Any = None,
    held_out: HeldOut | None = None,
    share: Share | None = None,
    teacher_inputs: Tensor | None = None,
) -> Iterator[Step]:
    """Train a block on inputs and targets (n, T, hidden); yields each step. Of several ranks, each has its ``share`` of
    the stage's sequences, and a step is that of one process with all of them.

    ``groups`` are AdamW's parameter groups with base learning rates. The quantizers of the block's layers train with
    them, at the rate ``lr_act``. ``cache`` replaces the block's KV cache. With ``teacher_inputs`` (n, T, hidden) every
    step trains on a second stream, too: the same sequences as they enter the teacher's block, with the same targets.
    Some steps also measure the loss on ``held_out``. If the loss of a step is not finite, the step is yielded but not
    applied, and the training ends.
    """
    if not groups:
        return  # a block that stays dense has nothing to train
    layers, device = list(binary_layers(block).values()), device_of(block)
    quantizers = quantizers_of(layers)
    if quantizers:
        groups = [*groups, {"params": [quantizer.act for quantizer in quantizers], "lr": lr_act}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-10, fused=True)
    base = [group["lr"] for group in optimizer.param_groups]
    batch = max(1, config.batch_tokens // inputs.shape[1])
    share = share or Share(len(inputs))
    order = batch_order(share.total, batch, config.epochs, seed)
    dtypes = [product_dtype(autocast, layer.params) for layer in layers]
    bitmaps = [layer.bitmap for layer in layers if layer.bitmap is not None]
    probe = None
    if held_out is not None:
        measure = partial(_held_out_loss, block, held_out, loss_kind, autocast, cache)
        probe = Probe(measure, len(order), held_out.budget)
    for step, rows in enumerate(order):
        began = time.perf_counter()
        factor = cosine(step, len(order))
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        mine, loss = share.mine(rows), torch.zeros((), device=device)
        if len(mine):
            for layer, dtype in zip(layers, dtypes, strict=True):
                layer.expand_dense(dtype)
            seen, wanted = inputs[mine], targets[mine]
            if teacher_inputs is not None:
                seen, wanted = torch.cat([seen, teacher_inputs[mine]]), torch.cat([wanted, wanted])
            with autocast():
                output = run_block(block, entering(seen, device), call, cache)
            loss = token_error(output, entering(wanted, device), loss_kind) * (len(mine) / len(rows))
            loss.backward()
        # From here to the clip, the gradients of the loss are in ``layer.gradient`` and ``quantizer.act.grad``; those
        # of all other parameters follow from them.
        loss = loss.detach()
        _sum_over_ranks(loss, layers, quantizers, dtypes)
        reg, beta = loss.new_zeros(()), 0.0
        if bitmaps:
            # AdaRound's annealing: first a high power, so that middle values of the bitmap can move freely, then a low
            # one, which drives them to 0 or 1.
            assert isinstance(config, WatConfig)
            beta = config.beta_start + (config.beta_end - config.beta_start) * step / max(1, len(order) - 1)
            with torch.no_grad():
                reg = config.reg_weight * torch.stack([polarization(bitmap, beta) for bitmap in bitmaps]).mean()
        shown_loss, shown_reg = torch.stack((loss, reg)).tolist()  # the only copy from the device in a step
        finite = math.isfinite(shown_loss)
        if finite:
            slope = (
                loss.new_full((), config.reg_weight) / len(bitmaps)
                if isinstance(config, WatConfig) and bitmaps
                else None
            )
            update_layers(layers, quantizers, optimizer, config.grad_clip, beta, slope)
        speed = rows.numel() * inputs.shape[1] / (time.perf_counter() - began)
        measured = probe.after(step + 1) if probe is not None and finite else None
        for layer in layers:
            layer.gradient = layer.dense = None  # an expert that no token has reached still has its expanded weight
        yield Step(step + 1, shown_loss, shown_reg, factor, speed, measured)
        if not finite:
            return


def _sum_over_ranks(
    loss: Tensor, layers: Sequence[BinaryLinear], quantizers: Sequence[ActQuantizer], dtypes: Sequence[torch.dtype]
) -> None:
    """Replace loss and gradients of this rank's rows by those of the whole step; a rank without rows adds zeros."""
    if ranks.count() == 1:
        return
    for layer, dtype in zip(layers, dtypes, strict=True):
        if layer.gradient is None:
            layer.gradient = layer.params.new_zeros(len(layer.params), layer.in_features, dtype=dtype)
    gradients = [layer.gradient for layer in layers if layer.gradient is not None]
    ranks.sum_(loss, *gradients, *ranks.gradients([quantizer.act for quantizer in quantizers]))


@torch.no_grad()
def update_layers(
    layers: Sequence[BinaryLinear],
    quantizers: Sequence[ActQuantizer],
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    beta: float,
    slope: Tensor | None,
) -> None:
    """Clip the gradients to a norm of ``grad_clip`` over the whole block, then step and bound all parameters.

    The wide gradients of a layer, in float32, exist only while the norm and then the step is computed for this layer,
    unless those of the whole block are small: they are then kept in between. ``beta`` and ``slope``: see
    ``BinaryLinear.pass_on``.
    """
    layers = [layer for layer in layers if layer.gradient is not None]
    keep = 4 * sum(parameter.numel() for layer in layers for parameter in layer.trained()) <= KEPT_GRADIENTS
    norms: list[Tensor] = []
    narrow: list[list[Tensor | None]] = []
    for layer in layers:
        layer.pass_on(beta, slope)
        norms += _norms(layer.trained())
        narrow.append([parameter.grad for parameter in layer.of_levels()])
        for parameter in () if keep else layer.trained():
            parameter.grad = None
    acts = [quantizer.act for quantizer in quantizers]
    norms += _norms(acts)
    norm = torch.linalg.vector_norm(torch.stack(norms))

    def apply(parameters: list[nn.Parameter]) -> None:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        optimizer.step()  # parameters without a gradient stay as they are
        for parameter in parameters:
            parameter.grad = None

    apply([*acts, *(parameter for layer in layers for parameter in layer.trained())] if keep else acts)
    for quantizer in quantizers:
        quantizer.bound()
    for layer, of_levels in zip(layers, narrow, strict=True):
        if not keep:
            for parameter, grad in zip(layer.of_levels(), of_levels, strict=True):
                parameter.grad = grad
            layer.pass_on(beta, slope)
            apply(layer.trained())
        layer.gradient = None
        if layer.bitmap is not None:
            layer.bitmap.clamp_(0, 1)


def _norms(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [torch.linalg.vector_norm(parameter.grad) for parameter in parameters if parameter.grad is not None]


def product_dtype(autocast: Any, parameter: Tensor) -> torch.dtype:
    """Return the type in which ``autocast`` computes matrix products of a parameter."""
    one = parameter.detach().new_ones(1, 1)
    with autocast():
        return torch.mm(one, one).dtype


@torch.no_grad()
def _held_out_loss(block: nn.Module, held_out: HeldOut, kind: str, autocast: Any, cache: Any) -> float:
    with autocast():
        output = run_block(block, entering(held_out.inputs, device_of(block)), held_out.call, cache)
    return float(token_error(output, entering(held_out.targets, output.device), kind))
