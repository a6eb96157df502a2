"""Pack bit planes and group parameters as a checkpoint stores them, and unpack them exactly.

A plane of booleans (out, in) becomes bytes (out, ceil(in / 8)): input column j of a row is bit j % 8 of byte j // 8,
counted from the least significant bit. Bits past the end of a row are zero. The planes of a layer are stacked:

    weight uint8 (out, 2, ceil(in / 8))        plane 0: B (1 stands for +1), plane 1: G;  W1 has plane 0 only, W(1+1+1)
                                               also plane 2: H
    table  float16 (8,)                        of W(1+1+1) only: the layer's levels in units of a scale, ascending
    params float16 (out, n, K)                 alpha_0, mu_0[, alpha_1, mu_1] of each of the n groups of a row; of
                                               W(1+1+1) the scale, K = 1
    params uint8 (out, n, K) + params_scale float16 (out, K, 2)      8-bit codes; minimum and step of each row
    params uint8 (out, n, K / 2) + params_scale float16 (out,) + params_range float16 (K, 2)
                                               4-bit codes, two per byte, the first in the lower half; the minimum and
                                               step of the layer are in units of each row's scale; of W(1+1+1), which
                                               has one code a group, two groups share a byte: (out, ceil(n / 2), 1), the
                                               half past the end of a row zero

This layout is for storage and is the same on every machine. The kernels derive their own order of bytes from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbllm.quant.chunks import row_chunks
from lbllm.quant.levels import levels_to_params, params_to_levels
from lbllm.sections import ParamBits

# Candidates for the share of a layer's parameters, at each end, that the range of 4-bit codes leaves out.
_CUT_OFF = (0.0, 0.0005, 0.002, 0.005, 0.01, 0.02, 0.04)

# Bytes a group while a grid is fitted: one parameter in units of the row, its sorted copy with the order, errors.
GRID_FIT = 4 + 12 + 4


def pack_plane(plane: Tensor) -> Tensor:
    """Pack booleans (..., in) into bytes (..., ceil(in / 8)), least significant bit first."""
    missing = -plane.shape[-1] % 8
    bits = torch.nn.functional.pad(plane.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=plane.device)).sum(-1, dtype=torch.uint8)


def unpack_plane(packed: Tensor, in_features: int) -> Tensor:
    """Unpack bytes (..., ceil(in / 8)) into booleans (..., in): the inverse of ``pack_plane``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :in_features].bool()


class ParamGrid(NamedTuple):
    """The possible values of a layer's 4-bit group parameters.

    ``scale``: float16 (out,), one per row. ``ranges``: float16 (K, 2), minimum and step of each parameter in units of
    the row's scale.
    """

    scale: Tensor
    ranges: Tensor

    def affine(self) -> Tensor:
        """Return minimum and step of each row and parameter, float16 (out, K, 2), as for 8-bit parameters."""
        return (self.scale.float()[:, None, None] * self.ranges.float()).half()

    def round(self, params: Tensor) -> Tensor:
        """Round parameters (out, n, K) to the nearest values of the grid."""
        return decode_params(self.codes(params), self.affine()).to(params.dtype)

    def codes(self, params: Tensor) -> Tensor:
        """Return the codes uint8 (out, n, K) of the nearest grid values, 0 to 15."""
        low, step = self.affine().float()[:, None].unbind(-1)
        return _codes(params.float(), low, step, 15).to(torch.uint8)


def _codes(values: Tensor, low: Tensor, step: Tensor, most: int) -> Tensor:
    """Return for each value the code 0 to ``most``, in the values' dtype, of the nearest  low + code * step."""
    return ((values - low) / step.clamp_min(1e-12)).round_().clamp_(0, most)


@torch.no_grad()
def fit_grid(params: Tensor) -> ParamGrid:
    """Fit a grid to group parameters (out, n, K).

    A row's scale is the root mean square of its first parameter, which is alpha_0. Candidate ranges of a parameter
    leave out a small share of its smallest and largest values; the candidate with the smallest squared error is used.
    Beside ``params`` it needs ``GRID_FIT`` bytes a group, and a part of the rows (``row_chunks``).
    """
    params = params.float()
    scale = params[..., 0].square().mean(1).sqrt().half().clamp_min(torch.finfo(torch.float16).tiny)
    units = scale.float()[:, None]
    ranges = [_best_range(params[..., k] / units, units.square()) for k in range(params.shape[-1])]
    return ParamGrid(scale, torch.stack(ranges).half())


def _best_range(values: Tensor, weight: Tensor) -> Tensor:
    """Return minimum and step (2,) of the 16-value range with the smallest squared error for ``values`` (out, n), with
    a ``weight`` (out, 1) for each row."""
    # The ends are copied: sorted values with their order take three times the memory of the values.
    lows, highs = _ends(values.flatten().sort().values)
    best, least = torch.zeros(2, device=values.device), torch.tensor(torch.inf, device=values.device)
    errors, parts = torch.empty_like(values), row_chunks(len(values), 20 * values.shape[1])
    for low in lows:
        for high in highs:
            found = torch.stack((low, (high - low) / 15)).half().float()
            for rows in parts:
                nearest = found[0] + _codes(values[rows], found[0], found[1], 15) * found[1]
                torch.mul(weight[rows], (nearest - values[rows]).square(), out=errors[rows])
            error = errors.sum()
            best, least = torch.where(error < least, found, best), torch.where(error < least, error, least)
    return best


def _ends(ordered: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the smallest and the largest of the ascending values (m,) that each cut leaves."""
    last = len(ordered) - 1
    places = [int(cut * last) for cut in _CUT_OFF]
    return [ordered[place].clone() for place in places], [ordered[last - place].clone() for place in places]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes uint8 (..., K) into bytes (..., K / 2); the first of two codes is in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes (..., K / 2) into 4-bit codes uint8 (..., K): the inverse of ``pack_nibbles``."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def packed_shape(groups: int, count: int, bits: ParamBits) -> tuple[int, int]:
    """Return the shape of a row's ``params`` for ``count`` parameters in each of its ``groups``."""
    if bits != 4:
        return groups, count
    return (-(-groups // 2), 1) if count == 1 else (groups, count // 2)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack 4-bit codes uint8 (out, n, K) into bytes of ``packed_shape``."""
    if codes.shape[-1] > 1:
        return pack_nibbles(codes)
    return pack_nibbles(torch.nn.functional.pad(codes[..., 0], (0, codes.shape[1] % 2)))[..., None]


def unpack_codes(packed: Tensor, groups: int, count: int) -> Tensor:
    """Unpack bytes into 4-bit codes uint8 (out, groups, count): the inverse of ``pack_codes``."""
    if count > 1:
        return unpack_nibbles(packed)
    return unpack_nibbles(packed[..., 0])[:, :groups, None]


def encode_params(params: Tensor) -> tuple[Tensor, Tensor]:
    """Encode group parameters (out, n, K) in 8 bits: codes uint8 (out, n, K), (minimum, step) float16 (out, K, 2).

    Each parameter of a row has an affine scale over the row's groups; a constant row is exact to float16. Decoded
    values that are encoded again give the same codes and scales.
    """
    params = params.float()
    least, most = params.amin(1, keepdim=True), params.amax(1, keepdim=True)
    low = least.half().float()
    step = ((most - low) / 255).clamp_min(0).half().float()
    codes = _codes(params, low, step, 255)
    # Minimum and maximum always get the end codes, even after rounding: otherwise encoding again could change them.
    codes = codes.masked_fill(params == most, 255).masked_fill(params == least, 0)
    return codes.to(torch.uint8), torch.stack((low[:, 0], step[:, 0]), -1).half()


def stored_params(params: Tensor, bits: ParamBits, grid: ParamGrid | None = None) -> Tensor:
    """Round group parameters (out, n, K) to the values that a checkpoint stores; returns float32.

    16 bits: float16. 8 bits: codes with a scale per row. 4 bits: ``grid``, by default one fitted to the parameters.
    """
    if bits == 4:
        grid = grid or fit_grid(params)
    stored = torch.empty_like(params, dtype=torch.float32)
    for rows in row_chunks(len(params), 20 * params[:1].numel()):
        part = params[rows]
        if grid is not None and bits == 4:
            stored[rows] = ParamGrid(grid.scale[rows], grid.ranges).round(part.float())
        else:
            stored[rows] = decode_params(*encode_params(part)) if bits == 8 else part.half().float()
    return stored


def stored_levels(levels: Tensor, bits: ParamBits, table: Tensor | None = None) -> Tensor:
    """Return levels (out, n, K) as a checkpoint gives them back, float32, ascending. ``table`` (8,): of W(1+1+1)."""
    return params_to_levels(stored_params(levels_to_params(levels, table), bits), table).sort(-1).values


def decode_params(params: Tensor, affine: Tensor | None) -> Tensor:
    """Return group parameters as float32 (out, n, K), from float16 or from codes and their affine scale (out, K, 2)."""
    if affine is None:
        return params.float()
    affine = affine.float()
    return params.float() * affine[:, None, :, 1] + affine[:, None, :, 0]
