"""An ordinary dense model from a packed one, for programs that don't know the packed format.

Its weights are the values of the packed bits and levels, rounded to bfloat16. Packed layers quantize their
activations, and the packed cache its entries; this copy has neither, so it answers like the A16 model.

A dense copy takes 2 bytes a weight, on disk too. An export writes its tensors one after the other instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lbllm.models.experts import Experts
from lbllm.models.loading import quiet
from lbllm.quant.packed_embedding import PackedTable
from lbllm.quant.packed_layer import PackedLinear


def dense_structure(packed: PreTrainedModel) -> PreTrainedModel:
    """The dense model of a packed one without its weights: bfloat16 on the meta device."""
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    config.dtype = torch.bfloat16
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.tie_weights()
    model.generation_config = packed.generation_config
    return model.eval()


@torch.no_grad()
def dense_tensors(packed: PreTrainedModel, structure: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed model's ``dense_structure``, one after the other in the order of its state dict, bfloat16
    on the CPU: the packed layers, embeddings and output head expanded, all others as they are."""
    layers = {f"{name}.weight": layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    tables = {f"{name}.weight": table for name, table in packed.named_modules() if isinstance(table, PackedTable)}
    kept = packed.state_dict()
    for name in structure.state_dict():
        if name in layers:
            weight = layers[name].dequantize().cpu().bfloat16()
            transposed = isinstance(structure.get_submodule(name.removesuffix(".weight")), Conv1D)
            yield name, weight.t().contiguous() if transposed else weight
        elif name in tables:
            yield name, tables[name].expanded(torch.bfloat16)
        elif name in kept:
            yield name, kept[name].detach().cpu().bfloat16()
        else:
            path, _, parameter = name.rpartition(".")
            yield name, _fused(packed.get_submodule(path), parameter)


def _fused(experts: nn.Module, name: str) -> Tensor:
    """A parameter in which the structure has the matrices, or the biases, of all experts."""
    assert isinstance(experts, Experts)

    def values(expert: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer_name, layer in expert.named_children():
            if name.endswith("_bias"):
                value: Any = layer.bias
            else:
                value = layer.dequantize() if isinstance(layer, PackedLinear) else layer.weight
            found[layer_name] = value.detach().cpu().bfloat16()
        return found

    return torch.stack([experts.form.fused(name, values(experts.expert(k))) for k in range(experts.count)])


@torch.no_grad()
def dense_copy(packed: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with bfloat16 weights, on the CPU: 2 bytes per weight in memory, in addition to the
    packed ones.

    It is only for writing to disk: buffers that are not saved (the rotary embedding's) are left on the meta device.
    """
    model = dense_structure(packed)
    with quiet():
        model.load_state_dict(dict(dense_tensors(packed, model)), assign=True)
        model.tie_weights()
    return model
