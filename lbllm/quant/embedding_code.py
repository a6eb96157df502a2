"""Pack token embeddings and output heads in 8, 6 or 4 bits a weight, and unpack them exactly.

A row is cut into groups of neighbouring weights; the last one may have fewer, and is filled with zeros. A group is
stored as its scale, little-endian float16, and then its codes. A weight is the scale of its group times the level of
its code, with 6 and 4 bits also times the scale of its column:

    bits  group  codes of a group, in bytes                                              levels
    8     32     code j is byte j, a signed number                                       -128 .. 127
    6     64     low four bits: of codes j and j + 32 in the halves of byte j, j < 32;   code - 32
                 high two bits: of codes j, j + 16, j + 32, j + 48 in byte 32 + j,
                 lowest first, j < 16
    4     32     codes j and j + 16 are the halves of byte j, the first in the lower     ``LEVELS_4``

The groups of 8 bits are the blocks of Q8_0 in GGUF files. A level is a whole number of at most eight bits, so its
product with the scale of a group is exact in float32. A few columns of embeddings are several times as large as the
others; without a scale of their own they would make the steps of every group coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lbllm.errors import ModelError
from lbllm.models.weights import row_parts
from lbllm.quant.chunks import FAST_BYTES, row_chunks
from lbllm.sections import EmbeddingBits

GROUPS: dict[int, int] = {8: 32, 6: 64, 4: 32}  # weights of a group by bits
SCALE = 2  # bytes
# The levels of the smallest squared error for normal weights in groups of 32, by Lloyd's algorithm.
LEVELS_4 = (-127, -100, -80, -65, -51, -38, -25, -12, 0, 13, 25, 38, 51, 66, 84, 106)
# Scales that are tried: the one that gives a group's largest weight a level at the end, and these shares of it.
_SHARES = tuple(0.76 + 0.03 * step for step in range(13))
# A column's scale is its root mean square, relative to that of all, to this power, within a factor.
_POWER, _FACTOR = 2 / 3, 64.0


class PackedRows(NamedTuple):
    """A packed matrix: its rows, uint8 (rows, ``row_bytes``), and the scales of its columns, float16 (columns,); None
    with 8 bits."""

    weight: Tensor
    scale: Tensor | None

    @property
    def column_scale(self) -> Tensor | None:
        """The scales as a checkpoint stores them, uint8 (columns, 2): no conversion of a model changes bytes."""
        return None if self.scale is None else self.scale[:, None].view(torch.uint8)

    def to(self, device: torch.device) -> PackedRows:
        """Return the same on a device."""
        return PackedRows(self.weight.to(device), None if self.scale is None else self.scale.to(device))


def row_bytes(columns: int, bits: EmbeddingBits) -> int:
    """Return the bytes of a packed row of ``columns`` weights."""
    return -(-columns // GROUPS[bits]) * (SCALE + GROUPS[bits] * bits // 8)


def pack_matrix(read: Callable[[slice], Tensor], shape: tuple[int, ...], bits: EmbeddingBits) -> PackedRows:
    """Pack a matrix of this ``shape`` (rows, columns), of which ``read`` gives some rows; the result is on the CPU.

    With 6 and 4 bits each row is read twice. Raises ModelError as ``pack_rows`` does.
    """
    scale = None if bits == 8 else column_scale(map(read, row_parts(shape)))
    weight = torch.empty(shape[0], row_bytes(shape[1], bits), dtype=torch.uint8)
    for part in row_parts(shape):
        weight[part] = pack_rows(read(part), bits, scale).cpu()
    return PackedRows(weight, None if scale is None else scale.cpu())


def column_scale(parts: Iterable[Tensor]) -> Tensor:
    """Return the scales of the columns, float16 (columns,), of a matrix that comes in ``parts`` (r, columns)."""
    squares: list[Tensor] = []
    count = 0
    for rows in parts:
        squares.append(rows.double().square().sum(0))
        count += len(rows)
    mean = torch.stack(squares).sum(0) / count
    sizes = (mean / mean.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return (sizes**_POWER).clamp(1 / _FACTOR, _FACTOR).half()


def pack_rows(rows: Tensor, bits: EmbeddingBits, scale: Tensor | None) -> Tensor:
    """Pack weights (r, columns) into uint8 (r, ``row_bytes``), on their device; ``scale`` (columns,): those of the
    columns, None with 8 bits.

    8 bits: as Q8_0, a group's scale is its largest magnitude divided by 127. 6 and 4 bits: of several scales the one
    with the smallest squared error. Raises ModelError for weights that are not finite, or too large for a float16
    scale.
    """
    packed = torch.empty(len(rows), row_bytes(rows.shape[1], bits), dtype=torch.uint8, device=rows.device)
    for part in row_chunks(len(rows), 24 * rows.shape[1], FAST_BYTES):
        packed[part] = _pack(rows[part].float(), bits, None if scale is None else scale.to(rows.device).float())
    return packed


def unpack_rows(packed: Tensor, bits: EmbeddingBits, columns: int, scale: Tensor | None) -> Tensor:
    """Unpack uint8 (..., ``row_bytes``) into weights (..., columns), float32. ``scale`` as in ``pack_rows``."""
    groups = packed.unflatten(-1, (-1, SCALE + GROUPS[bits] * bits // 8))
    own = groups[..., :SCALE].contiguous().view(torch.float16).float()
    weights = (_levels(groups[..., SCALE:], bits) * own).flatten(-2)[..., :columns]
    return weights if scale is None else weights * scale.float()


def group_scales(packed: Tensor, bits: EmbeddingBits) -> Tensor:
    """Return the scales of the groups of packed rows, float32 (r, groups)."""
    stored = packed.unflatten(-1, (-1, SCALE + GROUPS[bits] * bits // 8))[..., :SCALE]
    return stored.contiguous().view(torch.float16)[..., 0].float()


def with_group_scales(packed: Tensor, bits: EmbeddingBits, scales: Tensor) -> Tensor:
    """Return packed rows with these ``scales`` (r, groups) of their groups, as float16; their codes are the same."""
    groups = packed.unflatten(-1, (-1, SCALE + GROUPS[bits] * bits // 8)).clone()
    groups[..., :SCALE] = scales.half()[..., None].view(torch.uint8)
    return groups.flatten(-2)


def round_matrix(weight: Tensor, bits: EmbeddingBits) -> Tensor:
    """Return a matrix (rows, columns) as a checkpoint with these bits gives it back, float32; 16 bits are bfloat16."""
    if bits == 16:
        return weight.bfloat16().float()
    packed, scale = pack_matrix(weight.__getitem__, tuple(weight.shape), bits)
    return unpack_rows(packed, bits, weight.shape[1], scale).to(weight.device)


def is_rounding_of(packed: Tensor, rows: Tensor, bits: EmbeddingBits, scale: Tensor | None) -> bool:
    """Whether packed rows uint8 (r, ``row_bytes``) can be those of weights (r, columns): the difference is at most a
    fifth of them. What another model packs differs by more than its own size."""
    if packed.shape != (len(rows), row_bytes(rows.shape[1], bits)):
        return False
    own, found = rows.float(), unpack_rows(packed, bits, rows.shape[1], scale)
    return float((found.to(own.device) - own).norm()) <= 0.2 * float(own.norm())


def _pack(rows: Tensor, bits: EmbeddingBits, columns: Tensor | None) -> Tensor:
    size = GROUPS[bits]

    def grouped(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))

    if columns is None:
        scale, codes = _eight(grouped(rows))
    else:
        scale, codes = _searched(grouped(rows / columns), grouped(columns.square()), bits)
    if not bool(scale.isfinite().all()):
        raise ModelError(
            f"the embeddings or the output head have weights that are not finite, or too large for {bits} bits; set "
            "quant.embedding_bits to 16"
        )
    if bits == 8:
        stored = codes.to(torch.int8).view(torch.uint8)
    else:
        codes = codes.to(torch.uint8)
        low, half = codes & 15, size // 2
        stored = low[..., :half] | low[..., half:] << 4
        if bits == 6:
            high = (codes >> 4).unflatten(-1, (4, -1)) << torch.tensor([[0], [2], [4], [6]], device=codes.device)
            stored = torch.cat((stored, high.sum(-2).to(torch.uint8)), -1)
    return torch.cat((scale.half().view(torch.uint8), stored), -1).flatten(-2)


def _eight(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    return scale, _ratio(groups, scale.float()).round_().clamp_(-127, 127)


def _searched(groups: Tensor, importance: Tensor, bits: EmbeddingBits) -> tuple[Tensor, Tensor]:
    """Return scales (r, n, 1) float16 and codes uint8 of groups (r, n, g), both of the smallest squared error among the
    candidates; ``importance`` (n, g): what an error of a weight counts."""
    end = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, codes = torch.zeros_like(end, dtype=torch.float16), torch.zeros_like(groups, dtype=torch.uint8)
    least = torch.full_like(end, torch.inf)
    ends = (-32, 31) if bits == 6 else (LEVELS_4[0], LEVELS_4[-1])
    for level in ends:
        for share in _SHARES:
            found = _nearest(_ratio(groups, end / level * share), bits)
            levels = _level_of(found, bits)
            # The scale that fits these levels best.
            weighted = importance * levels
            fitted = (groups * weighted).sum(-1, keepdim=True) / (levels * weighted).sum(-1, keepdim=True).clamp_min(
                1e-9
            )
            scale = fitted.half()
            error = (importance * (groups - levels * scale.float()).square()).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best, codes = torch.where(better, scale, best), torch.where(better, found, codes)
    # No candidate of a group that is not finite is better.
    return torch.where(least.isfinite(), best, torch.nan), codes


def _ratio(groups: Tensor, scale: Tensor) -> Tensor:
    return groups / torch.where(scale == 0, torch.inf, scale)


def _nearest(ratio: Tensor, bits: EmbeddingBits) -> Tensor:
    """Return the codes uint8 of the levels nearest to weights in units of their scale."""
    if bits == 6:
        return ratio.round().clamp(-32, 31).add_(32).nan_to_num_(0).to(torch.uint8)
    levels = torch.tensor(LEVELS_4, dtype=torch.float32, device=ratio.device)
    return torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _level_of(codes: Tensor, bits: EmbeddingBits) -> Tensor:
    """Return the levels, float32, of codes uint8 of 6 or 4 bits."""
    if bits == 6:
        return codes.float() - 32
    return torch.tensor(LEVELS_4, dtype=torch.float32, device=codes.device)[codes.long()]


def _levels(stored: Tensor, bits: EmbeddingBits) -> Tensor:
    """Return the levels float32 (..., group) of the stored codes of groups."""
    if bits == 8:
        return stored.contiguous().view(torch.int8).float()
    half = GROUPS[bits] // 2
    codes = torch.cat((stored[..., :half] & 15, stored[..., :half] >> 4), -1)
    if bits == 6:
        shifts = torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8, device=stored.device)
        codes = codes | ((stored[..., None, half:] >> shifts) & 3).flatten(-2) << 4
    return _level_of(codes, bits)
