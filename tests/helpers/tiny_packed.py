"""A packed checkpoint of a tiny model beside its teacher, in a fraction of a second: clustered, not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.checkpoints.hf import LbllmConfig, LbllmQuantizer, save_packed
from lbllm.models.blocks import linear_layers, linear_weight
from lbllm.models.experts import split_experts
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import (
    LEVELS,
    assign,
    from_groups,
    group_length,
    levels_to_params,
    params_to_levels,
    to_groups,
)
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.packing import fit_grid, stored_params
from lbllm.quant.plan import block_formats
from lbllm.quant.table import fit_format
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import LayerFormat, QuantConfig
from tests.helpers.tiny_models import tiny


def tiny_checkpoint(
    folder: Path, architecture: str, quant: QuantConfig, *, largest: int = 10**9, **changes: Any
) -> tuple[Path, Path]:
    """Write the model to ``folder``/teacher and its packed form to ``folder``/packed; returns both. ``largest``: bytes
    of a file of weights; ``changes``: as of ``save_tiny``."""
    return checkpoint_of(folder, *tiny(architecture, **changes), quant, largest=largest)


def checkpoint_of(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quant: QuantConfig,
    *,
    largest: int = 10**9,
) -> tuple[Path, Path]:
    """``tiny_checkpoint`` of a model in memory, which becomes the packed one."""
    teacher = folder / "teacher"
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    split_experts(model)
    _, blocks, formats = block_formats(model, quant)
    packed = [
        {name: packed_layer(linear_layers(block)[name], fmt, quant) for name, fmt in of_block.items()}
        for block, of_block in zip(blocks, formats, strict=True)
    ]
    stated = LbllmConfig(quant=quant.model_dump(mode="json"), bpw=2.0, provenance={"model": str(teacher)})
    model.bfloat16().config.quantization_config = stated
    model.hf_quantizer = LbllmQuantizer(stated)  # type: ignore[assignment]
    for block, of_packed in zip(blocks, packed, strict=True):
        for name, layer in of_packed.items():
            block.set_submodule(name, layer)
    tokenizer.save_pretrained(folder / "packed")
    save_packed(model, folder / "packed", max_shard_size=largest)
    return folder / "packed", teacher


@torch.no_grad()
def packed_layer(layer: torch.nn.Module, fmt: LayerFormat, quant: QuantConfig) -> PackedLinear:
    """The packed form of a linear layer, its groups clustered."""
    weight = linear_weight(layer)
    length = group_length(fmt.group_size, weight.shape[1])
    groups = to_groups(weight, length)
    importance = to_groups(torch.ones_like(weight), length)
    levels, table = fit_format(groups, importance, fmt.format, 2)
    params = levels_to_params(levels, table)
    grid = fit_grid(params) if fmt.param_bits == 4 else None
    params = stored_params(params, fmt.param_bits, grid)
    index = from_groups(assign(groups, params_to_levels(params, table)), weight.shape[1])
    # Some bits as training would have changed them.
    index[::3, ::5] = (index[::3, ::5] + 1) % LEVELS[fmt.format]
    binary = BinaryLinear(layer, fmt, params, index, grid, table)
    if fmt.act_bits < 16:
        binary.quantizer = ActQuantizer(fmt.act_bits, quant.tail_steps, group_size=fmt.act_group_size)
        binary.quantizer.act.data.copy_(torch.tensor([0.4, 0.9, 0.8]))
    return PackedLinear.pack(binary, quant.tail_steps, torch.bfloat16)
