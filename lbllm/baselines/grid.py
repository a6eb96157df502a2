"""Even grids as GPTQ and most other programs have them: a float16 step and an integer zero point for each group.

    value = step * (code - zero),    code = 0 .. 2^bits - 1

Asymmetric: the range of a group's weights, which is made to contain zero, is divided evenly; the zero point is a code.
Symmetric: the zero point is 2^(bits - 1) everywhere, so it is not stored, and the range is twice the largest magnitude.

With clipping, ranges that are smaller by steps of 1% are compared and the one with the smallest error is taken, as in
the program of GPTQ's authors: they shrink a range down to a fifth and compare the sums of |error|^2.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.baselines.layer import HALF, Settings, half
from lbllm.quant.levels import spans

RANGES = [1 - tried / 100 for tried in range(80)]  # shares of a group's range that clipping compares
NORM = 2.4
LEAST = torch.finfo(torch.half).tiny  # of a step


@dataclass(frozen=True)
class EvenGrid:
    """The grid of each row of a group. ``step`` and ``zero`` (out,); the zero points are whole numbers."""

    step: Tensor
    zero: Tensor
    bits: int

    def round(self, values: Tensor) -> Tensor:
        """Return the nearest value on the grid for values (..., out)."""
        codes = torch.round(values / self.step).add_(self.zero).clamp_(0, 2**self.bits - 1)
        return codes.sub_(self.zero).mul_(self.step)


def fit_even_grid(group: Tensor, settings: Settings) -> EvenGrid:
    """Return the grids of a group of weights (out, g), as ``settings`` say: bits, symmetric or not, clipping or not."""
    values = group.t().contiguous()
    low, high = values.amin(0).clamp_max(0), values.amax(0).clamp_min(0)
    if not settings.clip:
        return _grid(low, high, settings)
    best = torch.full_like(low, torch.inf)
    step, zero = torch.ones_like(low), torch.zeros_like(low)
    for share in RANGES:
        grid = _grid(share * low, share * high, settings)
        error = grid.round(values).sub_(values).abs_().pow_(NORM).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        step, zero = torch.where(better, grid.step, step), torch.where(better, grid.zero, zero)
    return EvenGrid(step, zero, settings.bits)


def _grid(low: Tensor, high: Tensor, settings: Settings) -> EvenGrid:
    """The grids of ranges from ``low`` (out,), at most 0, to ``high`` (out,), at least 0."""
    last = 2**settings.bits - 1
    if settings.symmetric:
        step = half(2 * torch.maximum(-low, high) / last).clamp_min(LEAST)
        return EvenGrid(step, torch.full_like(step, (last + 1) // 2), settings.bits)
    step = half((high - low) / last).clamp_min(LEAST)
    return EvenGrid(step, (-low / step).round_().clamp_(0, last), settings.bits)


def grid_bits(rows: int, columns: int, settings: Settings) -> int:
    """Return the stored bits of a layer: codes, and for each group a step and, if asymmetric, a zero point."""
    groups = len(list(spans(columns, settings.group_size)))
    return rows * (columns * settings.bits + groups * (HALF + (0 if settings.symmetric else settings.bits)))
