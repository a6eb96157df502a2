"""The methods by name, and a whole model through one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import tee

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbllm.baselines.arb import arb
from lbllm.baselines.billm import billm
from lbllm.baselines.bwa import bwa
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
from lbllm.stages.ptq import input_statistics


@dataclass(frozen=True)
class Method:
    """``calibrated``: whether the Hessian makes a difference."""

    name: str
    quantize: Callable[[Tensor, Tensor, Settings], Quantized]
    calibrated: bool = True


METHODS: dict[str, Method] = {
    "rtn": Method("Round to nearest", rtn, calibrated=False),
    "gptq": Method("GPTQ", gptq),
    "billm": Method("BiLLM", billm),
    "arb-rc": Method("ARB-RC", partial(arb, column_groups=False)),
    "arb": Method("ARB-LLM (RC, CGB)", arb),
    "bwa": Method("BWA", bwa),
}


@dataclass
class StoredLayer:
    """What the quantized layers take: ``bits`` for ``weights``."""

    bits: int = 0
    weights: int = 0

    def add(self, layer: Quantized) -> None:
        """Count a layer."""
        self.bits += layer.bits
        self.weights += layer.weight.numel()

    @property
    def bpw(self) -> float:
        """Stored bits a weight, everything counted."""
        return self.bits / self.weights


def method(name: str) -> Method:
    """Raises ConfigError naming the known ones."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; choose from {', '.join(METHODS)}")
    return METHODS[name]


def quantize_layer(name: str, weight: Tensor, hessian: Tensor, chosen: Method, settings: Settings) -> Quantized:
    """One layer (out, in) by a method. Raises LbllmError naming the layer where that gives no finite weights."""
    try:
        result = chosen.quantize(weight, hessian, settings)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        result = None
    if result is None or not result.weight.isfinite().all():
        raise LbllmError(
            f"{name}: {chosen.name} met values that are not finite, or a Hessian that can't be factorized. The layer's "
            "inputs are degenerate for these texts, or its weights too large for float16 scales: take more tokens, "
            "other text, or more damping"
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

    In order: every layer's Hessian is that of inputs which have come through the blocks and layers quantized before.
    Layers that the blocks never call stay as they are. ``on_block(done, all)`` is called after each block. Raises
    LbllmError naming a layer, ModelError for a model with experts.
    """
    check_supported(model)
    path, blocks = decoder_blocks(model)
    stored = StoredLayer()
    batch = max(1, FORWARD_TOKENS // sequences.shape[1])
    sequences = sequences.to(model.device)
    calls = capture_calls(model, sequences[:1])
    hidden = first_inputs(model, sequences if chosen.calibrated else sequences[:1], batch)
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        hessian = torch.zeros(0)
        for names in shared_inputs(block, hidden[:1], call):
            if chosen.calibrated:
                hessian = input_statistics(*tee(layer_inputs(block, names[0], hidden, call, batch)))[0]
            for name in names:
                layer = block.get_submodule(name)
                result = quantize_layer(f"{path}.{number}.{name}", linear_weight(layer), hessian, chosen, settings)
                set_linear_weight(layer, result.weight)
                stored.add(result)
        hidden = torch.cat(list(run_batches(block, hidden, call, batch)))
        if on_block is not None:
            on_block(number + 1, len(blocks))
    return stored
