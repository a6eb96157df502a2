"""Packed layers in llama.cpp's types, each block with its best scale and offset.

A block is a run of neighbouring weights of a row. It has whole-number codes and a scale, and in some types an offset:
weight = scale * code + offset. A converter puts the smallest and the largest weight of a block at the ends of the
codes. Here the few values in a block are known, and how often each occurs. Of several scales the one is taken that
brings these values nearest to codes, by least squares:

    type     weights    bits a weight  codes        scale and offset
    q8_0     32         8.5            -127 .. 127  scale float16
    q4_1     32         5              0 .. 15      both float16
    iq4_nl   32         4.5            a table      scale float16
    q4_k     8 * 32     4.5            0 .. 15      both whole numbers of 6 bits, their units float16

Groups of 16 have four values each, so two groups of a block have eight values on 16 codes; of larger groups four values
have 16 codes to choose from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbllm.errors import ModelError
from lbllm.quant.chunks import FAST_BYTES, row_chunks
from lbllm.quant.embedding_code import GROUPS, pack_matrix
from lbllm.quant.levels import from_groups, params_to_levels, take_levels, to_groups
from lbllm.quant.packed_embedding import PackedTable
from lbllm.quant.packed_layer import PackedLinear

GgufType = Literal["bf16", "q8_0", "q4_1", "iq4_nl", "q4_k"]
# The values that the codes of IQ4_NL stand for.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_BLOCK = 32  # weights that share a scale
# The scales that are tried: those that take a block's range to this share of the codes.
_TRIED = tuple(0.55 + 0.03 * step for step in range(17))


class Shape(NamedTuple):
    """The weights and the bytes of a type's block."""

    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights


SHAPES: dict[GgufType, Shape] = {
    "bf16": Shape(1, 2),
    "q8_0": Shape(32, 34),
    "q4_1": Shape(32, 20),
    "iq4_nl": Shape(32, 18),
    "q4_k": Shape(256, 144),
}
# What rows get that are no whole blocks of a type.
_INSTEAD: dict[GgufType, GgufType] = {"q4_k": "q4_1"}


class Stored(NamedTuple):
    """A matrix of the file: its type, and what makes its blocks, uint8 (rows, bytes)."""

    kind: GgufType
    blocks: Callable[[], Tensor]


def stored_matrices(model: PreTrainedModel, kind: GgufType) -> dict[str, Stored]:
    """The matrices of a packed model that a GGUF file of this type does not have in bfloat16, by the names of their
    weights: its packed layers in this type; with any type but bfloat16 also embeddings, output head and layers that
    were not binarized, in Q8_0. Rows of embeddings that are packed in 8 bits are Q8_0 as they are.

    Layers whose rows are no whole blocks of Q4_K are Q4_1. Raises ModelError, naming the length of the rows, if they
    are no whole blocks of that either, or if no layer is Q4_K.
    """
    found: dict[str, Stored] = {}
    for name, module in model.named_modules():
        key = f"{name}.weight"
        weight = getattr(module, "weight", None)
        if isinstance(module, PackedTable) and is_q8_0(module):
            found[key] = Stored("q8_0", functools.partial(torch.Tensor.detach, module.weight))
        elif kind == "bf16":
            continue
        elif isinstance(module, PackedLinear):
            own = _fitting(name, module.in_features, kind)
            found[key] = Stored(own, functools.partial(pack_layer, module, own))
        elif isinstance(module, PackedTable) and module.columns % _BLOCK == 0:
            read = functools.partial(pack_matrix, module.unpack, (module.rows, module.columns), 8)
            found[key] = Stored("q8_0", lambda read=read: read().weight)
        elif isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] % _BLOCK == 0:
            read = functools.partial(pack_matrix, weight.detach().__getitem__, tuple(weight.shape), 8)
            found[key] = Stored("q8_0", lambda read=read: read().weight)
    if kind not in ("bf16", *(one.kind for one in found.values())):
        lengths = sorted({module.in_features for module in model.modules() if isinstance(module, PackedLinear)})
        raise ModelError(
            f"no layer can be {kind.upper()}: its blocks have {SHAPES[kind].weights} weights, and the rows have "
            f"{' or '.join(map(str, lengths))}; choose {_INSTEAD[kind]}"
        )
    return found


def is_q8_0(table: PackedTable) -> bool:
    """Whether packed rows are whole blocks of Q8_0, which a GGUF file can have as they are."""
    return table.bits == 8 and table.columns % GROUPS[8] == 0


def _fitting(name: str, columns: int, kind: GgufType) -> GgufType:
    """The type of a layer with rows of ``columns`` weights."""
    if columns % SHAPES[kind].weights == 0:
        return kind
    if kind in _INSTEAD:
        return _fitting(name, columns, _INSTEAD[kind])
    raise ModelError(
        f"{name} has rows of {columns} weights, which are no whole blocks of {SHAPES[kind].weights}, as {kind.upper()} "
        "needs them; choose bf16"
    )


@torch.no_grad()
def pack_layer(layer: PackedLinear, kind: GgufType) -> Tensor:
    """A layer's weight (out, in) as blocks of a type other than bfloat16, uint8 (out, bytes), on the CPU."""
    index, params = (tensor.cpu() for tensor in layer.unpack())
    levels = params_to_levels(params, None if layer.table is None else layer.table.float().cpu())
    shape = SHAPES[kind]
    packed = torch.empty(len(index), layer.in_features // shape.weights * shape.bytes, dtype=torch.uint8)
    for rows in row_chunks(len(index), 64 * layer.in_features, FAST_BYTES):
        groups = to_groups(index[rows], layer.length)
        weights = from_groups(take_levels(levels[rows], groups), layer.in_features)
        values, counts = _values(weights, index[rows], levels[rows], layer.length)
        blocks = _PACK[kind](weights.unflatten(-1, (-1, _BLOCK)), values, counts)
        if not bool(blocks[..., :2].contiguous().view(torch.float16).isfinite().all()):
            raise ModelError(f"a layer has weights that are too large for {kind.upper()}; choose bf16")
        packed[rows] = blocks.flatten(-2)
    return packed


def _values(weights: Tensor, index: Tensor, levels: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The values (r, n, k) in each block of 32 weights and how often they occur, float32. The values of the groups, if
    blocks and groups (``length`` weights) have common borders; else the weights (r, in) themselves."""
    columns, count = weights.shape[-1], levels.shape[-1]
    if length % _BLOCK and _BLOCK % length:
        values = weights.unflatten(-1, (-1, _BLOCK))
        return values, torch.ones_like(values)
    parts = index.unflatten(-1, (-1, min(length, _BLOCK)))
    counts = torch.stack([(parts == level).sum(-1, dtype=torch.float32) for level in range(count)], -1)
    if length > _BLOCK:
        return levels.repeat_interleave(length // _BLOCK, -2)[:, : columns // _BLOCK], counts
    in_block = _BLOCK // length
    return levels.unflatten(-2, (-1, in_block)).flatten(-2), counts.unflatten(-2, (-1, in_block)).flatten(-2)


class _Sums(NamedTuple):
    """What least squares need of codes (..., k) and values: sums over the values of a block, (..., 1)."""

    mass: Tensor
    codes: Tensor
    squares: Tensor
    values: Tensor
    products: Tensor


def _sums(codes: Tensor, values: Tensor, counts: Tensor) -> _Sums:
    weighted = counts * codes
    parts = (counts, weighted, weighted * codes, counts * values, weighted * values)
    return _Sums(*(part.sum(-1, keepdim=True) for part in parts))


def _ratio(values: Tensor, scale: Tensor) -> Tensor:
    return values / torch.where(scale == 0, torch.inf, scale)


def fit_affine(values: Tensor, counts: Tensor, top: int, *, below: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and offset (..., 1), float16, of the smallest squared error among the tried ones, for codes 0 .. ``top`` of
    values (..., k) that occur ``counts`` (..., k) times. ``below``: the offset is not positive."""
    low = torch.where(counts > 0, values, torch.inf).amin(-1, keepdim=True)
    span = torch.where(counts > 0, values, -torch.inf).amax(-1, keepdim=True) - low
    if below:
        span, low = span + low.clamp_min(0), low.clamp_max(0)
    least = torch.full_like(low, torch.inf)
    best = torch.zeros_like(low, dtype=torch.float16), low.half()
    for share in _TRIED:
        sums = _sums(_ratio(values - low, span / (share * top)).round_().clamp_(0, top), values, counts)
        spread = sums.mass * sums.squares - sums.codes.square()
        scale = (sums.mass * sums.products - sums.codes * sums.values) / spread.clamp_min(1e-9)
        offset = (sums.values - scale * sums.codes) / sums.mass
        if below:
            above = offset > 0
            scale = torch.where(above, sums.products / sums.squares.clamp_min(1e-9), scale)
            offset = offset.clamp_max(0)
        found = scale.clamp_min(0).half(), offset.half()
        codes = _affine_codes(values, *found, top)
        error = (counts * (values - found[0].float() * codes - found[1].float()).square()).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1])
    return best


def _affine_codes(values: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    return _ratio(values - offset.float(), scale.float()).round_().clamp_(0, top)


def fit_scale(values: Tensor, counts: Tensor, codes_of: Callable[[Tensor], Tensor], ends: tuple[float, ...]) -> Tensor:
    """The scale (..., 1), float16, of the smallest squared error among the tried ones, for values (..., k) that occur
    ``counts`` times. ``codes_of``: the nearest codes of values in units of the scale; ``ends``: of the codes."""
    used = torch.where(counts > 0, values, 0)
    end = used.gather(-1, used.abs().argmax(-1, keepdim=True))
    least = torch.full_like(end, torch.inf)
    best = torch.zeros_like(end, dtype=torch.float16)
    for code in ends:
        for share in _TRIED:
            sums = _sums(codes_of(_ratio(values, end / (code * share))), values, counts)
            scale = (sums.products / sums.squares.clamp_min(1e-9)).half()
            codes = codes_of(_ratio(values, scale.float()))
            error = (counts * (values - scale.float() * codes).square()).sum(-1, keepdim=True)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _bytes(*parts: Tensor) -> Tensor:
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def _halves(codes: Tensor) -> Tensor:
    """Codes of four bits (..., 32) as bytes (..., 16): code j and code j + 16 in one."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _q8_0(weights: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    def nearest(ratio: Tensor) -> Tensor:
        return ratio.round().clamp_(-127, 127)

    scale = fit_scale(values, counts, nearest, (127,))
    return _bytes(scale, nearest(_ratio(weights, scale.float())).to(torch.int8))


def _q4_1(weights: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    scale, offset = fit_affine(values, counts, 15)
    return _bytes(scale, offset, _halves(_affine_codes(weights, scale, offset, 15)))


def _iq4_nl(weights: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    table = torch.tensor(IQ4_NL, dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2
    scale = fit_scale(
        values, counts, lambda ratio: table[torch.bucketize(ratio, middles)], (IQ4_NL[0], IQ4_NL[-1])
    )  # fmt: skip
    return _bytes(scale, _halves(torch.bucketize(_ratio(weights, scale.float()), middles)))


def _q4_k(weights: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Eight blocks of 32 weights each share two units; a block's scale and offset are whole numbers of 6 bits of them.
    Those numbers are chosen anew for the codes, from the nearest ones and their neighbours."""
    scale, offset = (found.float() for found in fit_affine(values, counts, 15, below=True))
    scale, offset = (part.unflatten(-2, (-1, 8)) for part in (scale, -offset))
    weights, values, counts = (part.unflatten(-2, (-1, 8)) for part in (weights, values, counts))
    unit, unit_below = ((part.amax(-2, keepdim=True) / 63).half() for part in (scale, offset))
    nearest = [
        _ratio(part, of.float()).round().clamp(0, 63) for part, of in ((scale, unit), (offset, unit_below))
    ]  # fmt: skip
    least, best = torch.full_like(scale, torch.inf), nearest
    for step, step_below in ((a, b) for a in (0, -1, 1) for b in (0, -1, 1)):
        tried = [(nearest[0] + step).clamp(0, 63), (nearest[1] + step_below).clamp(0, 63)]
        found, below = unit.float() * tried[0], -unit_below.float() * tried[1]
        error = values - found * _affine_codes(values, found, below, 15) - below
        squared = (counts * error.square()).sum(-1, keepdim=True)
        better = squared < least
        least = torch.where(better, squared, least)
        best = [torch.where(better, new, old) for new, old in zip(tried, best, strict=True)]
    codes = _affine_codes(weights, unit.float() * best[0], -unit_below.float() * best[1], 15).to(torch.uint8)
    (a, b), (c, d) = ([half.squeeze(-1) for half in part.to(torch.uint8).chunk(2, -2)] for part in best)
    numbers = torch.cat((a | b >> 4 << 6, c | d >> 4 << 6, b & 15 | (d & 15) << 4), -1)
    low, high = codes.unflatten(-2, (4, 2)).unbind(-2)
    return _bytes(unit.squeeze(-2), unit_below.squeeze(-2), numbers, (low | high << 4).flatten(-2))


_PACK = {"q8_0": _q8_0, "q4_1": _q4_1, "iq4_nl": _iq4_nl, "q4_k": _q4_k}
