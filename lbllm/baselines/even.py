"""A control for the weight format: even levels instead of free ones, trained by our own stages.

W(1+1) has four free levels for each group. Here a group has 2^bits even ones, as in GPTQ and in nearly every deployed
format; all else is as in stages 1, 2 and 4: alignment and error compensation, block by block training of latent weights
and levels with the relative loss, and at the end the levels by the teacher's logits. So the difference to a run with
W(1+1), at equal bits and from equal tokens, is what the free levels bring, and the rest is what the training brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.baselines.gptq import Solved, solve
from lbllm.baselines.layer import HALF, Settings
from lbllm.baselines.methods import StoredLayer
from lbllm.baselines.taught import TaughtBlock, taught_blocks, with_weights
from lbllm.models.blocks import layer_inputs, linear_weight, share_copy
from lbllm.quant.levels import from_groups, to_groups
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import E2eConfig, LayerFormat, PtqConfig, WatConfig
from lbllm.stages.distill import block_error
from lbllm.stages.e2e import EndToEnd
from lbllm.stages.hessians import align, correction_, input_statistics
from lbllm.stages.wat import wat_block


class EvenLinear(BinaryLinear):
    """A layer in training whose levels are even: ``low + step * code`` with codes from 0 to 2^bits - 1.

    ``params`` (out, n, 2) are step and low; of a symmetric grid (out, n, 1), the step alone, with low = -step *
    2^(bits - 1). ``index`` holds the codes.
    """

    def __init__(self, source: nn.Module, settings: Settings, solved: Solved) -> None:
        fmt = LayerFormat(format="w1+1", group_size=settings.group_size, param_bits=16, act_bits=16)
        step, zero = (torch.stack([getattr(grid, name) for grid in solved.grids], -1) for name in ("step", "zero"))
        params = step[..., None] if settings.symmetric else torch.stack((step, -step * zero), -1)
        super().__init__(source, fmt, params, torch.empty(0, dtype=torch.uint8))
        self.bits = settings.bits
        self.index = self._index(solved.value.to(self.params.dtype))

    def stored_bits(self) -> int:
        """The bits of the codes and of the float16 parameters."""
        return self.out_features * self.in_features * self.bits + HALF * self.params.numel()

    @torch.no_grad()
    def _codes(self, params: Tensor, latent: Tensor) -> Tensor:
        """The nearest codes (rows, n, g) of latent weights (rows, in)."""
        step, low = self._step_low(params)
        codes = (to_groups(latent, self.length) - low).div_(step.clamp_min(1e-8))
        return codes.round_().clamp_(0, 2**self.bits - 1)

    def _index(self, latent: Tensor) -> Tensor:
        return from_groups(self._codes(self.params, latent), self.in_features).to(torch.uint8)

    def _step_low(self, params: Tensor) -> tuple[Tensor, Tensor]:
        step = params[..., :1]
        return step, params[..., 1:] if params.shape[-1] == 2 else -(2 ** (self.bits - 1)) * step

    def _fake_quantized(
        self, params: Tensor, index: Tensor | None, latent: Tensor | None, bitmap: Tensor | None
    ) -> Tensor:
        step, low = self._step_low(params)
        if latent is None:
            assert index is not None
            codes = to_groups(index, self.length).to(params.dtype)
        else:
            codes = self._codes(params, latent)
        return from_groups(low + step * codes, self.in_features)

    @torch.no_grad()
    def pass_on(self, beta: float = 0.0, slope: Tensor | None = None) -> None:
        """As in ``BinaryLinear``: the latent weights get the gradient of the weight, the parameters their exact one."""
        assert self.gradient is not None
        if self.params.grad is None:
            with torch.enable_grad():
                weight = self._fake_quantized(self.params, self.index, self.latent, None)
            weight.backward(self.gradient.to(weight.dtype))
        if self.latent is not None:
            self.latent.grad = self.gradient.to(self.latent.dtype)

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the codes that training found."""
        if self.latent is not None:
            self.index, self.mode, self.latent = self._index(self.latent), "frozen", None


@torch.no_grad()
def even_stages(
    model: PreTrainedModel,
    sequences: Tensor,
    settings: Settings,
    wat: WatConfig,
    e2e: E2eConfig | None,
    *,
    seed: int,
    autocast: Any,
    on_block: Callable[[int], None] = lambda done: None,
) -> tuple[PreTrainedModel, StoredLayer]:
    """Quantize a model to even levels by stages 1 and 2, and 4 if ``e2e`` is given, on token ids (n, T).

    Returns the model with dense weights, which shares the others with ``model``, and what the layers take. The
    sections' own numbers of tokens do not count: all sequences are used.
    """
    student: PreTrainedModel = share_copy(model)
    layers: dict[str, EvenLinear] = {}
    for number, block in enumerate(taught_blocks(model, sequences)):
        own, latents = _start(block, settings)
        before = block_error(block.student, block.inputs, block.targets, block.call, block.batch)
        started = {name: (layer.params.detach().clone(), layer.index) for name, layer in own.items()}
        for layer in own.values():
            layer.dense = None
        block_seed = (seed * 1_000_003 + number) * 2
        with torch.enable_grad():
            for _ in wat_block(
                block.student, block.call, block.inputs, block.targets, latents, wat, seed=block_seed, autocast=autocast
            ):
                pass
        for layer in own.values():
            layer.round_params()
            layer.keep_dense()
        after = block_error(block.student, block.inputs, block.targets, block.call, block.batch)
        for name, layer in own.items():
            if not after <= before:  # as in a run, a block that training made worse keeps its start
                layer.params.copy_(started[name][0])
                layer.index = started[name][1]
                layer.round_params()
                layer.keep_dense()
            full = f"{block.path}.{name}"
            student.set_submodule(full, layer)
            layers[full] = layer
        on_block(number + 1)
    if e2e is not None:
        with torch.enable_grad():
            _end_to_end(model, student, layers, sequences, e2e, seed, autocast)
    stored = StoredLayer(
        sum(layer.stored_bits() for layer in layers.values()),
        sum(layer.out_features * layer.in_features for layer in layers.values()),
    )
    weights = {name: layer.expand(torch.float32) for name, layer in layers.items()}
    return with_weights(model, weights), stored


def _start(block: TaughtBlock, settings: Settings) -> tuple[dict[str, EvenLinear], dict[str, Tensor]]:
    """Stage 1 with even levels: puts the layers into the student's block and returns them with their latent weights."""
    config = PtqConfig()
    layers: dict[str, EvenLinear] = {}
    latents: dict[str, Tensor] = {}
    for names in block.sharing:
        seen = layer_inputs(block.student, names[0], block.inputs, block.call, block.batch)
        hessian, drift = input_statistics(seen, block.meant[names[0]])
        correction = correction_(hessian, drift, config)
        for name in names:
            source = block.teacher.get_submodule(name)
            weight = align(linear_weight(source).to(hessian.dtype), correction, config)
            solved = solve(weight, hessian, replace(settings, damping=config.damping))
            layers[name], latents[name] = EvenLinear(source, settings, solved), solved.latent
            layers[name].round_params()
            layers[name].keep_dense()
            block.student.set_submodule(name, layers[name])
    return layers, latents


def _end_to_end(
    model: PreTrainedModel,
    student: PreTrainedModel,
    layers: dict[str, EvenLinear],
    sequences: Tensor,
    config: E2eConfig,
    seed: int,
    autocast: Any,
) -> None:
    """Stage 4 on the layers in place."""
    length = min(config.seq_len, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    for layer in layers.values():
        layer.dense = None
    training = EndToEnd(student, model, list(layers.values()), pieces, config, seed=seed, autocast=autocast)
    started = [layer.params.detach().clone() for layer in layers.values()]
    before = training.loss(pieces)
    for _ in training.steps():
        pass
    training.freeze()
    if not training.loss(pieces) <= before or math.isnan(before):
        for layer, params in zip(layers.values(), started, strict=True):
            layer.params.data.copy_(params)
