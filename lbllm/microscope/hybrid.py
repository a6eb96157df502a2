"""Hybrids: one model whose blocks and layers are partly the teacher's and partly the student's.

    model = hybrid(pair, Dense(14))                         the student, block 14 dense again
    model = hybrid(pair, Only(14, "mlp.down_proj"))         the teacher, one layer binarized
    model = hybrid(pair, FirstBlocks(10))                   blocks 0 to 9 the student's, the rest the teacher's
    model = hybrid(pair, Edited(address, levels))           the student, the levels of one group changed
    model = hybrid(pair, Bits(14, "mlp.down_proj", 3))      the student, one layer quantized anew

No weight is copied. The modules that contain others are new; linear layers, norms and embeddings are the very modules
of the two loaded models, which other sessions use at the same time and which stay as they are.

What is whose, besides the linear layers with their biases and the quantizers of their inputs:

                    norms of a block        embeddings, last norm, head     keys and values of a block are quantized
    Dense           the student's           the student's                   unless the whole block is dense
    Only            the teacher's           the teacher's                   if the whole block is binarized
    FirstBlocks     as the block            the teacher's, except with      as the block
                                            all blocks: the student's
    Edited, Bits    the student's           the student's                   as in the student
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.baselines.layer import Settings
from lbllm.baselines.rtn import rtn
from lbllm.errors import ConfigError
from lbllm.microscope.address import EXAMPLE, Address
from lbllm.microscope.mixed_cache import keep_bits_of
from lbllm.microscope.pair import Pair, Side
from lbllm.microscope.passes import view
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import (
    LEVELS,
    group_length,
    params_to_levels,
    spans,
)
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.table import clustered
from lbllm.sections import LayerFormat

_MOST_BITS = 8
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Dense:
    """The student with these layers dense again, as in the teacher. ``block`` None: in all blocks; ``layer`` None: all
    layers."""

    block: int | None = None
    layer: str | None = None


@dataclass(frozen=True)
class Only:
    """The teacher with only these layers binarized. ``block`` None: in all blocks; ``layer`` None: all layers."""

    block: int | None = None
    layer: str | None = None


@dataclass(frozen=True)
class FirstBlocks:
    """Blocks 0 to ``count`` - 1 are the student's; 0: the teacher itself, all blocks: the student itself."""

    count: int


@dataclass(frozen=True)
class Edited:
    """The student with the levels of one group changed. ``address``: "14/mlp.up_proj/211/7"; ``levels``: 4 (W1: 2)
    values in the order of ``params_to_levels``, which is that of ``GroupView.levels``."""

    address: Address | str
    levels: tuple[float, ...]


@dataclass(frozen=True)
class Bits:
    """The student with one layer's weight made anew from the teacher's, without training.

    ``format``: a number of bits, 1 to 8, for round-to-nearest in the groups of the student's layer; or a LayerFormat,
    whose levels are fitted to the weights (``fit_levels``). The inputs are quantized as in the student, with a
    LayerFormat only if its act_bits is less than 16.
    """

    block: int
    layer: str
    format: int | LayerFormat


Choice = Dense | Only | FirstBlocks | Edited | Bits


def hybrid(pair: Pair, choice: Choice) -> PreTrainedModel:
    """Return the model of a choice, in eval mode; it shares all weights with the pair, so don't change it.

    ``FirstBlocks`` of none and of all blocks are the loaded models themselves. Raises ConfigError for a block, layer,
    row, group, level or number of bits that can't be.
    """
    if isinstance(choice, FirstBlocks):
        return _first_blocks(pair, choice.count)
    made: PreTrainedModel = view(pair.model(started_from(choice)))
    if isinstance(choice, Dense | Only):
        _exchange(pair, made, choice)
    elif isinstance(choice, Edited):
        _put(pair, made, *edited_place(choice), _edited(pair, choice))
    else:
        _put(pair, made, choice.block, choice.layer, _made_anew(pair, choice))
    return made


def started_from(choice: Choice) -> Side:
    """The side that a choice changes something of: its blocks before the first change are the hybrid's."""
    return "teacher" if isinstance(choice, Only | FirstBlocks) else "student"


def first_change(pair: Pair, choice: Choice) -> int:
    """The number of the first block in which the hybrid differs from ``started_from``."""
    if isinstance(choice, Dense | Only):
        return pair.places(choice.block, choice.layer)[0][0]
    if isinstance(choice, FirstBlocks):
        return 0
    return choice.block if isinstance(choice, Bits) else edited_place(choice)[0]


def edited_place(choice: Edited) -> tuple[int, str]:
    """Block and layer of the group. Raises ConfigError if the address is not one of a group."""
    address = Address.parse(str(choice.address))
    if address.block is None or address.layer is None or address.row is None or address.group is None:
        raise ConfigError(
            f"{str(choice.address)!r} is not the address of a group; write block/layer/row/group: {EXAMPLE}"
        )
    return address.block, address.layer


def _put(pair: Pair, made: PreTrainedModel, block: int, layer: str, module: nn.Module) -> None:
    made.set_submodule(f"{pair.path}.{block}.{layer}", module)


def _exchange(pair: Pair, made: PreTrainedModel, choice: Dense | Only) -> None:
    source: Side = "teacher" if isinstance(choice, Dense) else "student"
    places = pair.places(choice.block, choice.layer)
    for block, layer in places:
        _put(pair, made, block, layer, pair.layer(source, block, layer))
    if choice.layer is None:
        whole = {block for block, _ in places}
        packed = [(number in whole) == isinstance(choice, Only) for number in range(pair.blocks)]
        keep_bits_of(pair, made, packed)


def _first_blocks(pair: Pair, count: int) -> PreTrainedModel:
    if not 0 <= count <= pair.blocks:
        raise ConfigError(
            f"{count} blocks can't be binarized: the models have {pair.blocks}; choose 0 to {pair.blocks}"
        )
    if count in (0, pair.blocks):
        loaded: PreTrainedModel = pair.model("student" if count else "teacher")
        return loaded
    made: PreTrainedModel = view(pair.teacher.model)
    for number in range(count):
        name = f"{pair.path}.{number}"
        made.set_submodule(name, view(pair.student.model.get_submodule(name)))
    keep_bits_of(pair, made, [number < count for number in range(pair.blocks)])
    return made


class _Edited(nn.Module):
    """A packed layer with other levels in one group: its output, and what the difference adds to one of its rows.

    ``delta`` (g,): the new weights minus the old ones at ``columns``."""

    def __init__(self, layer: PackedLinear, row: int, columns: slice, delta: Tensor) -> None:
        super().__init__()
        self.layer, self.row, self.columns = layer, row, columns
        self.register_buffer("delta", delta)
        self.delta: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., out) for x (..., in)."""
        output: Tensor = self.layer(x)
        inputs = x if self.layer.quantizer is None else self.layer.quantizer(x)
        added = torch.zeros_like(output)
        added[..., self.row] = inputs[..., self.columns] @ self.delta.to(x.dtype)
        return output + added


def _edited(pair: Pair, choice: Edited) -> nn.Module:
    block, name = edited_place(choice)
    layer, address = pair.packed(block, name), Address.parse(str(choice.address))
    row, group = address.row, address.group
    assert row is not None
    assert group is not None
    columns = list(spans(layer.in_features, layer.fmt.group_size))
    if row >= layer.out_features or group >= len(columns):
        raise ConfigError(
            f"{choice.address}: {block}/{name} has rows 0 to {layer.out_features - 1} of groups 0 to {len(columns) - 1}"
        )
    count = LEVELS[layer.fmt.format]
    if len(choice.levels) != count:
        raise ConfigError(f"{choice.address}: {len(choice.levels)} levels are given; a group here has {count}")
    new = torch.tensor(choice.levels, dtype=torch.float32)
    if not new.isfinite().all():
        bad = next(level for level in choice.levels if not math.isfinite(level) or abs(level) > _LARGEST)
        raise ConfigError(f"{choice.address}: the level {bad} is not a finite float32 number; give another")
    index, params = layer.unpack()
    old = params_to_levels(params[row, group], None if layer.table is None else layer.table.float())
    delta = (new.to(old.device) - old)[index[row, columns[group]].long()]
    return _Edited(layer, row, columns[group], delta)


class _MadeAnew(nn.Module):
    """A layer with a dense weight (out, in), and the quantizer and bias of another."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantizer: ActQuantizer | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., out) for x (..., in)."""
        inputs = x if self.quantizer is None else self.quantizer(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(inputs, self.weight.to(x.dtype), bias)


def _made_anew(pair: Pair, choice: Bits) -> nn.Module:
    layer, weight = pair.packed(choice.block, choice.layer), pair.weight(choice.block, choice.layer)
    quantizer = layer.quantizer
    if isinstance(choice.format, int):
        if not 1 <= choice.format <= _MOST_BITS:
            raise ConfigError(
                f"{choice.block}/{choice.layer}: {choice.format} bits a weight are not possible here; choose 1 to "
                f"{_MOST_BITS}"
            )
        made = rtn(weight, None, Settings(layer.fmt.group_size, choice.format)).weight
    else:
        made = fitted(weight, choice.format, f"{choice.block}/{choice.layer}")
        quantizer = _same_quantizer(layer, choice)
    if not made.isfinite().all():
        raise ConfigError(f"{choice.block}/{choice.layer}: its weights are too large for this format; choose another")
    return _MadeAnew(made, layer.bias, quantizer)


@torch.no_grad()
def fitted(weight: Tensor, fmt: LayerFormat, name: str) -> Tensor:
    """Return a weight (out, in), float32, whose groups have the levels that fit it best (``fit_format``, every weight
    as important as any other), with parameters as a checkpoint stores them. ``name``: the layer's, for errors.

    Raises ConfigError if a group is longer than a row.
    """
    columns = weight.shape[1]
    if fmt.group_size > columns:
        raise ConfigError(f"{name}: a group of {fmt.group_size} is longer than a row of {columns} weights")
    return clustered(weight, fmt)


def _same_quantizer(layer: PackedLinear, choice: Bits) -> ActQuantizer | None:
    fmt, own = choice.format, layer.fmt
    assert isinstance(fmt, LayerFormat)
    if fmt.act_bits == 16:
        return None
    ranges = group_length(fmt.act_group_size, layer.in_features)
    if fmt.act_bits != own.act_bits or ranges != layer.range_length:
        there = f"{own.act_bits} bits" + (f" in ranges of {layer.range_length}" if own.act_bits < 16 else "")
        raise ConfigError(
            f"{choice.block}/{choice.layer}: a quantizer of inputs is trained, and the student has one for {there}; "
            "give the same act_bits and act_group_size, or act_bits 16"
        )
    return layer.quantizer
