"""Bit planes and group parameters as they lie in a checkpoint, with exact inverses.

A plane of booleans (out, in) becomes bytes (out, ceil(in / 8)): input column j of a row is bit j % 8, counted from
the least significant, of byte j // 8. Bits past the end of a row are zero. The planes of a layer are stacked:

    weight uint8 (out, 2, ceil(in / 8))        plane 0: B (1 stands for +1), plane 1: G;  W1 has plane 0 alone
    params float16 (out, n, K)                 alpha_0, mu_0[, alpha_1, mu_1] of each of the n groups of a row
    params uint8 (out, n, K) + params_scale float16 (out, K, 2)      the same with 8 bits: minimum and step of each row
    params uint8 (out, n, K / 2) + params_scale float16 (out,) + params_range float16 (K, 2)
                                               the same with 4 bits, two codes a byte, the first in its lower half: the
                                               minimum and step of a layer, in units of each row's scale

A byte order of its own for the kernels is theirs to derive; this one is for storage and is the same on every machine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbllm.sections import ParamBits

# Shares of a layer's parameters that may lie outside the range of 4-bit codes, at either end.
_CUT_OFF = (0.0, 0.0005, 0.002, 0.005, 0.01, 0.02, 0.04)


def pack_plane(plane: Tensor) -> Tensor:
    """Booleans (..., in) to bytes (..., ceil(in / 8)), least significant bit first."""
    missing = -plane.shape[-1] % 8
    bits = torch.nn.functional.pad(plane.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=plane.device)).sum(-1, dtype=torch.uint8)


def unpack_plane(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of ``pack_plane``: bytes (..., ceil(in / 8)) to booleans (..., in)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :in_features].bool()


class ParamGrid(NamedTuple):
    """The values that 4-bit group parameters of a layer can have: ``scale`` float16 (out,), one a row, and ``ranges``
    float16 (K, 2), minimum and step of each parameter in units of it."""

    scale: Tensor
    ranges: Tensor

    def affine(self) -> Tensor:
        """Minimum and step of each row and parameter, float16 (out, K, 2), as 8-bit parameters have them."""
        return (self.scale.float()[:, None, None] * self.ranges.float()).half()

    def round(self, params: Tensor) -> Tensor:
        """The nearest values of the grid to parameters (out, n, K)."""
        return decode_params(self.codes(params), self.affine()).to(params.dtype)

    def codes(self, params: Tensor) -> Tensor:
        """Codes uint8 (out, n, K) of those values, 0 to 15."""
        low, step = self.affine().float()[:, None].unbind(-1)
        return _codes(params.float(), low, step, 15).to(torch.uint8)


def _codes(values: Tensor, low: Tensor, step: Tensor, most: int) -> Tensor:
    """The codes 0 to ``most``, in the values' dtype, of the nearest of  low + code * step."""
    return ((values - low) / step.clamp_min(1e-12)).round_().clamp_(0, most)


@torch.no_grad()
def fit_grid(params: Tensor) -> ParamGrid:
    """A grid for group parameters (out, n, K).

    A row's scale is the root mean square of its alpha_0. Each parameter's range in the layer is, of those that leave
    out few of the least and greatest, the one with the smallest squared error.
    """
    params = params.float()
    scale = params[..., 0].square().mean(1).sqrt().half().clamp_min(torch.finfo(torch.float16).tiny)
    units = (params / scale.float()[:, None, None]).flatten(0, 1)
    weight = scale.float().square().repeat_interleave(params.shape[1])
    ranges = [_best_range(values, weight) for values in units.unbind(-1)]
    return ParamGrid(scale, torch.stack(ranges).half())


def _best_range(values: Tensor, weight: Tensor) -> Tensor:
    """Minimum and step of 16 values for ``values`` (m,) with the smallest squared error, each counted by its
    ``weight``."""
    ordered, last = values.sort().values, len(values) - 1
    best, least = torch.zeros(2, device=values.device), torch.inf
    for below in _CUT_OFF:
        for above in _CUT_OFF:
            low, high = ordered[int(below * last)], ordered[last - int(above * last)]
            found = torch.stack((low, (high - low) / 15)).half().float()
            nearest = found[0] + _codes(values, found[0], found[1], 15) * found[1]
            error = float((weight * (nearest - values).square()).sum())
            if error < least:
                best, least = found, error
    return best


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes uint8 (..., K) to bytes (..., K / 2), the first of two in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def encode_params(params: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit group parameters: float (out, n, K) to codes uint8 (out, n, K) and (minimum, step) float16 (out, K, 2).

    Each parameter of a row has an affine scale over the row's groups; a constant row is exact to float16. Encoding what
    was decoded gives it back unchanged.
    """
    params = params.float()
    least, most = params.amin(1, keepdim=True), params.amax(1, keepdim=True)
    low = least.half().float()
    step = ((most - low) / 255).clamp_min(0).half().float()
    codes = _codes(params, low, step, 255)
    # The ends get the end codes, however minimum and step were rounded: only then do they come out the same once more.
    codes = codes.masked_fill(params == most, 255).masked_fill(params == least, 0)
    return codes.to(torch.uint8), torch.stack((low[:, 0], step[:, 0]), -1).half()


def stored_params(params: Tensor, bits: ParamBits, grid: ParamGrid | None = None) -> Tensor:
    """Group parameters (out, n, K) as a checkpoint stores them, in float32: rounded to float16, to 8 bits and a scale,
    or to a grid of 4 bits, by default the one that fits them."""
    if bits == 4:
        return (grid or fit_grid(params)).round(params.float())
    return decode_params(*encode_params(params)) if bits == 8 else params.half().float()


def decode_params(params: Tensor, affine: Tensor | None) -> Tensor:
    """Group parameters as float32 (out, n, K) from float16 ones, or from codes and their affine scale (out, K, 2)."""
    if affine is None:
        return params.float()
    affine = affine.float()
    return params.float() * affine[:, None, :, 1] + affine[:, None, :, 0]
