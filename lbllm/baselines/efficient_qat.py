"""EfficientQAT (Chen et al. 2024): even levels, trained by block (Block-AP), then their steps end to end (E2E-QP).

    W_q = s (clamp(round(W / s) + z, 0, 2^bits - 1) - z)

- Block-AP trains the weights W, the steps s and the zero points z of one block at a time. Its input is the output of
  the quantized blocks before it, its target the output of the teacher's block in the teacher; the loss is the mean
  squared error. round has the straight-through gradient, so a weight outside the range has none and s has that of LSQ.
- E2E-QP fixes codes and zero points, and trains the steps alone on the text's next tokens (cross entropy).

AdamW without decay, rates that fall by a cosine to a twentieth. The paper trains with 4,096 sequences of 2,048 tokens,
with rates of 2e-5 for weights and 1e-4 for s and z in Block-AP, and 2e-5 in E2E-QP. Few tokens need larger rates and
more epochs. Rates are relative here: of weights to the standard deviation of a layer's weights, of steps to their mean.
A step is stored in float16, a zero point in as many bits as a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.baselines.grid import LEAST, fit_even_grid, grid_bits
from lbllm.baselines.layer import Settings, half
from lbllm.baselines.methods import StoredLayer
from lbllm.baselines.taught import taught_blocks, with_weights
from lbllm.models.blocks import linear_layers, linear_weight, run_block, share_copy
from lbllm.quant.levels import from_groups, group_length, spans, straight_through, to_groups
from lbllm.stages.distill import batch_order, cosine, token_error


@dataclass(frozen=True)
class Training:
    """``block_*`` is for Block-AP, ``end_*`` for E2E-QP: epochs, tokens of a step, relative learning rates.
    ``end_seq_len``: tokens of a sequence in E2E-QP. No epochs leave a phase out."""

    block_epochs: int = 12
    block_tokens: int = 512
    block_weight_rate: float = 2e-2
    block_grid_rate: float = 5e-3
    end_epochs: int = 2
    end_tokens: int = 1_024
    end_seq_len: int = 256
    end_rate: float = 2e-3


class UniformLinear(nn.Module):
    """A layer in training. ``weight`` (out, in), ``step`` and ``zero`` (out, n, 1); after ``fix`` only the steps can
    train."""

    def __init__(self, source: nn.Module, settings: Settings) -> None:
        super().__init__()
        weight = linear_weight(source).detach().float()
        grids = [fit_even_grid(weight[:, span], settings) for span in spans(weight.shape[1], settings.group_size)]
        self.length, self.last = group_length(settings.group_size, weight.shape[1]), 2**settings.bits - 1
        self.weight = nn.Parameter(weight.clone())
        self.step = nn.Parameter(torch.stack([grid.step for grid in grids], -1)[..., None])
        self.zero = nn.Parameter(torch.stack([grid.zero for grid in grids], -1)[..., None])
        self.bias: nn.Parameter | None = source.bias  # type: ignore[assignment]
        self.codes: Tensor | None = None  # minus the zero point

    def quantized(self) -> Tensor:
        """Return the weight (out, in) with the gradients of the phase."""
        codes = self._codes() if self.codes is None else self.codes
        return from_groups(codes * self.step, self.weight.shape[1])

    def _codes(self) -> Tensor:
        zero = straight_through(self.zero, torch.round).clamp(0, self.last)
        codes = straight_through(to_groups(self.weight, self.length) / self.step, torch.round) + zero
        return codes.clamp(0, self.last) - zero

    @torch.no_grad()
    def fix(self) -> None:
        """Fix codes and zero points, and round the steps to what is stored."""
        self.codes = self._codes()
        self.round_steps()

    @torch.no_grad()
    def round_steps(self) -> None:
        """Round the steps to float16."""
        self.step.copy_(half(self.step).clamp_min(LEAST))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., out) for x (..., in)."""
        return nn.functional.linear(x, self.quantized(), self.bias)


@torch.no_grad()
def efficient_qat(
    model: PreTrainedModel,
    sequences: Tensor,
    settings: Settings,
    training: Training,
    *,
    seed: int,
    autocast: Callable[[], Any] = nullcontext,
    on_block: Callable[[int], None] = lambda done: None,
) -> tuple[PreTrainedModel, StoredLayer]:
    """Quantize a model on token ids (n, T): returns it with dense weights, which shares the others with ``model``, and
    what the layers take. ``settings``: bits, group size, asymmetric."""
    layers: dict[str, UniformLinear] = {}
    student: PreTrainedModel = share_copy(model)
    bits = weights = 0
    for number, block in enumerate(taught_blocks(model, sequences)):
        own = {name: UniformLinear(layer, settings) for name, layer in linear_layers(block.student).items()}
        for name, layer in own.items():
            block.student.set_submodule(name, layer)
            rows, columns = layer.weight.shape
            bits, weights = bits + grid_bits(rows, columns, settings), weights + rows * columns

        def loss(rows: Tensor, block: Any = block) -> Tensor:
            output = run_block(block.student, block.inputs[rows], block.call)
            return token_error(output, block.targets[rows], "mse")

        order = batch_order(
            len(sequences), max(1, training.block_tokens // sequences.shape[1]), training.block_epochs, seed + number
        )
        with torch.enable_grad():
            _train(_block_groups(own.values(), training), order, loss, autocast)
        for name, layer in own.items():
            layer.fix()
            full = f"{block.path}.{name}"
            student.set_submodule(full, layer)
            layers[full] = layer
        on_block(number + 1)
    with torch.enable_grad():
        _end_to_end(student, list(layers.values()), sequences, training, seed, autocast)
    found = {name: layer.quantized() for name, layer in layers.items()}
    return with_weights(model, found), StoredLayer(bits, weights)


def _block_groups(layers: Iterable[UniformLinear], training: Training) -> list[dict[str, Any]]:
    """AdamW's groups of Block-AP. The zero points have the steps' rate, in units of a code."""
    groups: list[dict[str, Any]] = []
    for layer in layers:
        spread, step = float(layer.weight.detach().std()), float(layer.step.detach().mean())
        groups.append({"params": [layer.weight], "lr": training.block_weight_rate * spread})
        groups.append({"params": [layer.step], "lr": training.block_grid_rate * step})
        groups.append({"params": [layer.zero], "lr": training.block_grid_rate})
    return groups


def _end_to_end(
    student: PreTrainedModel,
    layers: list[UniformLinear],
    sequences: Tensor,
    training: Training,
    seed: int,
    autocast: Callable[[], Any],
) -> None:
    """E2E-QP on a student with fixed layers, in place."""
    length = min(training.end_seq_len, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    student.requires_grad_(False)
    groups = [
        {"params": [layer.step.requires_grad_()], "lr": training.end_rate * float(layer.step.mean())}
        for layer in layers
    ]

    def loss(rows: Tensor) -> Tensor:
        logits = student(input_ids=pieces[rows], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), pieces[rows][:, 1:].flatten())

    order = batch_order(len(pieces), max(1, training.end_tokens // length), training.end_epochs, seed)
    _train(groups, order, loss, autocast)
    for layer in layers:
        layer.round_steps()


def _train(
    groups: list[dict[str, Any]], order: list[Tensor], loss: Callable[[Tensor], Tensor], autocast: Callable[[], Any]
) -> None:
    """Train parameter groups with base learning rates; a step whose loss is not finite ends the training."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    for number, rows in enumerate(order):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cosine(number, len(order))
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss(rows)
        if not math.isfinite(float(value)):
            return
        value.backward()
        optimizer.step()
