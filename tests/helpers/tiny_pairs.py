"""A tiny teacher and a packed student of it, loaded, in milliseconds: without a run and without files."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.chat.pool import Loaded
from lbllm.checkpoints.decode import speed_up
from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.microscope.pair import Pair
from lbllm.models.blocks import decoder_blocks, linear_weight
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.levels import LEVELS, assign, fit_levels, from_groups, group_length, levels_to_params, to_groups
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.plan import block_formats
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import LayerFormat, QuantConfig
from tests.helpers.tiny_models import tiny


def as_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, packed: bool) -> Loaded:
    """A model as the pool gives it."""
    return Loaded(model, tokenizer, packed, "test", 1, 1, 0, 2.0)


def tiny_student(teacher: PreTrainedModel, **quant: Any) -> PreTrainedModel:
    """A packed student of a dense model: levels fitted to the weights, and norms a little apart from the teacher's."""
    settings = QuantConfig.model_validate({"group_size": 16, "act_group_size": 16} | quant)
    student = copy.deepcopy(teacher).requires_grad_(False)
    attach_kv_cache(student, KVFormat.of(settings))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1.0625)
            parameter.copy_(parameter.bfloat16())
    student.tie_weights()
    for number, layers in enumerate(block_formats(student, settings)[2]):
        block = decoder_blocks(teacher)[1][number]
        for name, fmt in layers.items():
            packed = _pack(block.get_submodule(name), fmt, settings.tail_steps)
            if packed.quantizer is not None:
                packed.quantizer.act.data.copy_(torch.tensor([0.4, 0.9, 0.95]))
            decoder_blocks_of(student, teacher)[number].set_submodule(name, packed)
    speed_up(student.eval())
    return student


def decoder_blocks_of(student: PreTrainedModel, teacher: PreTrainedModel) -> Any:
    """The blocks of a packed student."""
    return student.get_submodule(decoder_blocks(teacher)[0])


def tiny_pair(architecture: str, *, changes: dict[str, Any] | None = None, **quant: Any) -> Pair:
    """A pair of ``tiny(architecture, **changes)`` and its ``tiny_student(**quant)``."""
    return pair_of(*tiny(architecture, **(changes or {})), **quant)


def pair_of(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **quant: Any) -> Pair:
    """A pair of a dense model and its ``tiny_student(**quant)``."""
    student = tiny_student(teacher.requires_grad_(False), **quant)
    return Pair(as_loaded(teacher, tokenizer, packed=False), as_loaded(student, tokenizer, packed=True))


def _pack(layer: Any, fmt: LayerFormat, tail: int) -> PackedLinear:
    weight = linear_weight(layer).detach()
    length, columns = group_length(fmt.group_size, weight.shape[1]), weight.shape[1]
    groups = to_groups(weight, length)
    levels = fit_levels(groups, to_groups(weight.new_ones(1, columns), length), LEVELS[fmt.format], 3)
    index = from_groups(assign(groups, levels), columns)
    binary = BinaryLinear(layer, fmt, levels_to_params(levels), index)
    if fmt.act_bits < 16:
        binary.quantizer = ActQuantizer(fmt.act_bits, tail, group_size=fmt.act_group_size)
    return PackedLinear.pack(binary, tail, torch.float32)
