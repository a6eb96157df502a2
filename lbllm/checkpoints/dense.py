"""An ordinary dense model from a packed one, for programs that don't know the packed format.

Its weights are the values of the packed bits and levels, rounded to bfloat16. Packed layers quantize their
activations, and the packed cache its entries; this copy has neither, so it answers like the A16 model.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lbllm.models.loading import quiet
from lbllm.quant.packed_layer import PackedLinear


@torch.no_grad()
def dense_copy(packed: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with bfloat16 weights, on the CPU: 2 bytes per weight in memory, in addition to the
    packed ones.

    It is only for writing to disk: buffers that are not saved (the rotary embedding's) are left on the meta device.
    """
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    config.dtype = torch.bfloat16
    with quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.load_state_dict(_tensors(packed, model), assign=True)
        model.tie_weights()
    model.generation_config = packed.generation_config
    return model.eval()


def _tensors(packed: PreTrainedModel, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``model`` by name, bfloat16 on the CPU: the packed layers expanded, all others as they are."""
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    tensors = {}
    for name, tensor in packed.state_dict().items():
        owner, _, last = name.rpartition(".")
        if last != "bias" and any(path in layers for path in (owner, owner.removesuffix(".quantizer"))):
            continue
        tensors[name] = tensor.detach().cpu().bfloat16()
    for name, layer in layers.items():
        weight = layer.dequantize().cpu().bfloat16()
        transposed = isinstance(model.get_submodule(name), Conv1D)
        tensors[f"{name}.weight"] = weight.t().contiguous() if transposed else weight
    return tensors
