"""The methods by name, and the quantization of a whole model with one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.baselines.arb import arb
from lbllm.baselines.billm import billm
from lbllm.baselines.bwa import bwa
from lbllm.baselines.experts import quantize_experts
from lbllm.baselines.gptq import gptq
from lbllm.baselines.layer import Quantized, Settings
from lbllm.baselines.rtn import rtn
from lbllm.errors import ConfigError, LbllmError
from lbllm.models.blocks import (
    FORWARD_TOKENS,
    capture_calls,
    check_supported,
    decoder_blocks,
    first_inputs,
    layer_inputs,
    linear_weight,
    run_batches,
    set_linear_weight,
    shared_inputs,
)
from lbllm.models.experts import silent, split_experts
from lbllm.stages.hessians import input_statistics


@dataclass(frozen=True)
class Method:
    """A quantization method. ``name``: for display; ``calibrated``: whether the method uses the Hessian; ``usual``: the
    settings that it is used with, where they differ from the defaults."""

    name: str
    quantize: Callable[[Tensor, Tensor, Settings], Quantized]
    calibrated: bool = True
    usual: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, **chosen: Any) -> Settings:
        """The method's usual settings with other values for the ``chosen`` ones."""
        return Settings(**{**self.usual, **chosen})


METHODS: dict[str, Method] = {
    "rtn": Method("Round to nearest", rtn, calibrated=False),
    "gptq": Method("GPTQ", gptq, usual={"clip": True, "act_order": True}),
    "billm": Method("BiLLM", billm),
    "arb-rc": Method("ARB-RC", partial(arb, column_groups=False)),
    "arb": Method("ARB-LLM (RC, CGB)", arb),
    "bwa": Method("BWA", bwa),
}


@dataclass
class StoredLayer:
    """The size of the quantized layers: stored ``bits`` for the number of ``weights``. ``wide``: ``Quantized.wide`` of
    the layers that have such channels, by the layer's full name."""

    bits: int = 0
    weights: int = 0
    wide: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, layer: Quantized) -> None:
        """Add a layer's bits and weights."""
        self.bits += layer.bits
        self.weights += layer.weight.numel()
        if layer.wide is not None:
            self.wide[name] = layer.wide

    @property
    def bpw(self) -> float:
        """Stored bits per weight, with scales and masks."""
        return self.bits / self.weights


def method(name: str) -> Method:
    """Return a method by name. Raises ConfigError, which lists the known names."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
    return METHODS[name]


def quantize_layer(name: str, weight: Tensor, hessian: Tensor, chosen: Method, settings: Settings) -> Quantized:
    """Quantize one layer (out, in) with a method. Raises LbllmError, with the layer's name, for non-finite weights."""
    try:
        result = chosen.quantize(weight, hessian, settings)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        result = None
    if result is None or not result.weight.isfinite().all():
        raise LbllmError(
            f"{name}: {chosen.name} found values that are not finite, or a Hessian that can't be factorized. The "
            "layer's inputs are degenerate for these texts, or its weights are too large for float16 scales: use more "
            "tokens, other text, or more damping"
        )
    return result


@torch.no_grad()
def quantize_blocks(
    model: PreTrainedModel,
    sequences: Tensor,
    chosen: Method,
    settings: Settings,
    *,
    on_block: Callable[[int, int], None] | None = None,
) -> StoredLayer:
    """Quantize all linear layers of the decoder blocks of ``model`` in place, calibrated on token ids (n, T).

    The layers are quantized in order: the inputs for each layer's Hessian come from the already quantized blocks and
    layers before it. Layers that the blocks never call don't change. ``on_block(done, all)`` is called after each
    block. Raises LbllmError with the layer's name, ModelError.
    """
    split_experts(model)
    check_supported(model)
    path, blocks = decoder_blocks(model)
    stored = StoredLayer()
    batch = max(1, FORWARD_TOKENS // sequences.shape[1])
    sequences = sequences.to(model.device)
    calls = capture_calls(model, sequences[:1])
    hidden = first_inputs(model, sequences if chosen.calibrated else sequences[:1], batch)
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        hessian = torch.zeros(0)

        def quantize(name: str, layer: nn.Module, hessian: Tensor, number: int = number) -> None:
            full = f"{path}.{number}.{name}"
            result = quantize_layer(full, linear_weight(layer), hessian, chosen, settings)
            set_linear_weight(layer, result.weight)
            stored.add(full, result)

        with silent(block):
            for names in shared_inputs(block, hidden[:1], call):
                if chosen.calibrated:
                    hessian = input_statistics(*tee(layer_inputs(block, names[0], hidden, call, batch)))[0]
                for name in names:
                    quantize(name, block.get_submodule(name), hessian)
        quantize_experts(block, hidden, call, batch, quantize)
        hidden = torch.cat(list(run_batches(block, hidden, call, batch)))
        if on_block is not None:
            on_block(number + 1, len(blocks))
    return stored
