"""Packed layers in llama.cpp's types, each block with its best scale and offset.

A block is a run of neighbouring weights of a row. It has whole-number codes and a scale, and in some types an offset:
weight = scale * code + offset. A converter puts the smallest and the largest weight of a block at the ends of the
codes. Here the few values in a block are known, and how often each occurs. Of several scales the one is taken that
brings these values nearest to codes, by least squares:

    type  weights  bits a weight  codes        scale and offset
    q8_0  32       8.5            -127 .. 127  scale float16
    q5_1  32       6              0 .. 31      both float16
    q4_1  32       5              0 .. 15      both float16
    q5_k  8 * 32   5.5            0 .. 31      both whole numbers of 6 bits, their units float16
    q4_k  8 * 32   4.5            0 .. 15      both whole numbers of 6 bits, their units float16

Two groups of 16 weights in a block have eight values; of larger groups four values have the codes to themselves.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbllm.errors import ModelError
from lbllm.quant.chunks import FAST_BYTES, row_chunks
from lbllm.quant.embedding_code import GROUPS, pack_matrix
from lbllm.quant.levels import from_groups, params_to_levels, take_levels, to_groups
from lbllm.quant.packed_embedding import PackedTable
from lbllm.quant.packed_layer import PackedLinear
from lbllm.share.gguf_names import INSTEAD, SHAPES, GgufType, type_name

_BLOCK = 32  # weights that share a scale
# The scales that are tried: those that take a block's range to this share of the codes.
_TRIED = tuple(0.55 + 0.03 * step for step in range(17))


class Stored(NamedTuple):
    """A matrix of the file: its type, and what makes its blocks, uint8 (rows, bytes)."""

    kind: GgufType
    blocks: Callable[[], Tensor]


def stored_matrices(model: PreTrainedModel, kind: GgufType) -> dict[str, Stored]:
    """The matrices of a packed model that a GGUF file of this type does not have in bfloat16, by the names of their
    weights: its packed layers in this type; with any type but bfloat16 also embeddings, output head and layers that
    were not binarized, in Q8_0. Rows of embeddings that are packed in 8 bits are Q8_0 as they are.

    Layers whose rows are no whole blocks of Q5_K or Q4_K are Q5_1 or Q4_1. Raises ModelError, naming the length of the
    rows, if they are no whole blocks of these either, or if no layer has the type.
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
            found[key] = Stored("q8_0", functools.partial(_eight, module.unpack, (module.rows, module.columns)))
        elif isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] % _BLOCK == 0:
            found[key] = Stored("q8_0", functools.partial(_eight, weight.detach().__getitem__, tuple(weight.shape)))
    if kind not in ("bf16", *(one.kind for one in found.values())):
        lengths = sorted({module.in_features for module in model.modules() if isinstance(module, PackedLinear)})
        raise ModelError(
            f"no layer can be {kind.upper()}: its blocks have {SHAPES[kind].weights} weights, and the rows have "
            f"{' or '.join(map(str, lengths))}; choose the type {INSTEAD[kind]}"
        )
    return found


def told(model: PreTrainedModel, stored: dict[str, Stored]) -> str:
    """What types the matrices of a file have, in words, those of the layers first."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, PackedLinear)}
    counts: dict[GgufType, int] = {}
    for name, layer in layers.items():
        kind = stored[f"{name}.weight"].kind if f"{name}.weight" in stored else "bf16"
        counts[kind] = counts.get(kind, 0) + layer.in_features * layer.out_features
    binarized = " and ".join(f"{number:,} in {type_name(kind)}" for kind, number in counts.items())
    others = sorted({one.kind for key, one in stored.items() if key.removesuffix(".weight") not in layers})
    rest = f"; embeddings and other matrices in {' and '.join(map(type_name, others))}" if others else ""
    return f"{binarized}{rest}"


def is_q8_0(table: PackedTable) -> bool:
    """Whether packed rows are whole blocks of Q8_0, which a GGUF file can have as they are."""
    return table.bits == 8 and table.columns % GROUPS[8] == 0


def _eight(read: Callable[[slice], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The blocks in Q8_0, uint8 (rows, bytes), of a matrix of which ``read`` gives some rows."""
    return pack_matrix(read, shape, 8).weight


def _fitting(name: str, columns: int, kind: GgufType) -> GgufType:
    """The type of a layer with rows of ``columns`` weights."""
    if columns % SHAPES[kind].weights == 0:
        return kind
    if kind in INSTEAD:
        return _fitting(name, columns, INSTEAD[kind])
    raise ModelError(
        f"{name} has rows of {columns} weights, which are no whole blocks of {SHAPES[kind].weights}, as {kind.upper()} "
        "needs them; choose the type bf16"
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
            raise ModelError(f"a layer has weights that are too large for {kind.upper()}; choose the type bf16")
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


def fit_scale(values: Tensor, counts: Tensor, top: int) -> Tensor:
    """The scale (..., 1), float16, of the smallest squared error among the tried ones, for codes -``top`` .. ``top`` of
    values (..., k) that occur ``counts`` (..., k) times."""
    largest = torch.where(counts > 0, values, 0).abs().amax(-1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest, dtype=torch.float16)
    for share in _TRIED:
        sums = _sums(_signed_codes(values, largest / (share * top), top), values, counts)
        scale = (sums.products / sums.squares.clamp_min(1e-9)).half()
        error = (counts * (values - scale.float() * _signed_codes(values, scale, top)).square()).sum(-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _signed_codes(values: Tensor, scale: Tensor, top: int) -> Tensor:
    return _ratio(values, scale.float()).round_().clamp_(-top, top)


def _bytes(*parts: Tensor) -> Tensor:
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def _q8_0(weights: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    scale = fit_scale(values, counts, 127)
    return _bytes(scale, _signed_codes(weights, scale, 127).to(torch.int8))


def _affine(weights: Tensor, values: Tensor, counts: Tensor, *, bits: int) -> Tensor:
    """Q4_1 and Q5_1: the low four bits of codes j and j + 16 share a byte; before them, the fifth bits in order."""
    top = 2**bits - 1
    scale, offset = fit_affine(values, counts, top)
    codes = _affine_codes(weights, scale, offset, top).to(torch.uint8)
    low, high = (codes & 15).chunk(2, -1)
    fifth = [_bits(codes.unflatten(-1, (-1, 8)) >> 4)] if bits == 5 else []
    return _bytes(scale, offset, *fifth, low | high << 4)


def _bits(planes: Tensor) -> Tensor:
    """Bits (..., 8) as bytes (...), the first one lowest."""
    return (planes << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _units(weights: Tensor, values: Tensor, counts: Tensor, *, bits: int) -> Tensor:
    """Q4_K and Q5_K: eight blocks of 32 weights share two units; a block's scale and offset are whole numbers of 6 bits
    of them. These numbers are the nearest ones to the best scale and offset, or their neighbours, where the error is
    smaller."""
    top = 2**bits - 1
    scale, offset = (found.float() for found in fit_affine(values, counts, top, below=True))
    scale, offset = (part.unflatten(-2, (-1, 8)) for part in (scale, -offset))
    weights, values, counts = (part.unflatten(-2, (-1, 8)) for part in (weights, values, counts))
    units = [(part.amax(-2, keepdim=True) / 63).half() for part in (scale, offset)]
    nearest = [
        _ratio(part, unit.float()).round().clamp_(0, 63) for part, unit in zip((scale, offset), units, strict=True)
    ]
    least, best = torch.full_like(scale, torch.inf), nearest
    for steps in itertools.product((0, -1, 1), repeat=2):
        tried = [(number + step).clamp_(0, 63) for number, step in zip(nearest, steps, strict=True)]
        found, below = units[0].float() * tried[0], -units[1].float() * tried[1]
        error = values - found * _affine_codes(values, found, below, top) - below
        squared = (counts * error.square()).sum(-1, keepdim=True)
        better = squared < least
        least = torch.where(better, squared, least)
        best = [torch.where(better, new, old) for new, old in zip(tried, best, strict=True)]
    codes = _affine_codes(weights, units[0].float() * best[0], -units[1].float() * best[1], top).to(torch.uint8)
    (a, b), (c, d) = ([half.squeeze(-1) for half in number.to(torch.uint8).chunk(2, -2)] for number in best)
    numbers = torch.cat((a | b >> 4 << 6, c | d >> 4 << 6, b & 15 | (d & 15) << 4), -1)
    fifth = [_bits(codes.transpose(-2, -1) >> 4)] if bits == 5 else []
    low, high = (codes & 15).unflatten(-2, (4, 2)).unbind(-2)
    return _bytes(*(unit.squeeze(-2) for unit in units), numbers, *fifth, (low | high << 4).flatten(-2))


_PACK: dict[GgufType, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q5_1": functools.partial(_affine, bits=5),
    "q4_1": functools.partial(_affine, bits=4),
    "q5_k": functools.partial(_units, bits=5),
    "q4_k": functools.partial(_units, bits=4),
}
