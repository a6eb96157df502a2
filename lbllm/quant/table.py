"""The mathematics of W(1+1+1), a format with three planes that is not LBLLM's own: pure functions on groups of weights.

    W_q = s * t[k],    k in 0 .. 7

t, the layer's table, has eight ascending values in float16: the shape of the levels, which all weights of the layer
share. s is the scale of a group of weights along the input dimension. The groups are those of W(1+1), and -1, a scale
for each row, costs 16 bits a row. Least squares gives s for known k and t, and t for known k and s.

Shapes are those of ``lbllm.quant.levels``: groups (out, n, g), scales (out, n, 1), importance that broadcasts against
the groups and is zero where they are padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbllm.quant import chunks
from lbllm.quant.chunks import row_chunks
from lbllm.quant.levels import LEVELS, assign, fit_levels, from_groups, group_length, take_levels, to_groups
from lbllm.quant.packing import stored_levels
from lbllm.sections import Format, LayerFormat, PtqConfig

TABLE = 8  # values of a table
TABLE_FAULT = "values that are not finite or not in ascending order"  # of one that is no table

# At most so many weights decide a layer's table: more do not change eight values any more.
SAMPLE = 2**20

_EM_STEPS = PtqConfig().em_steps

# Rounds in which codes, scales and table are fitted in turn.
ROUNDS = 12

# The eight levels with the least squared error for normally distributed weights (Max 1960), from the largest on, as
# shares of the largest one.
_NORMAL = (1.0, 0.6246, 0.3515, 0.1140)

# Scales that the first search tries, relative to the root mean square of a group divided by the largest of the table.
_SCALES = (1.5, 1.8, 2.1, 2.5, 3.0)

# Bytes a weight of the temporary tensors of a fit: some float32 matrices, indices as int64.
_FIT_WEIGHT = 40


def has_table(kind: Format) -> bool:
    """Return whether all levels of a layer in this format are multiples of one table."""
    return kind == "w1+1+1"


def is_table(values: Tensor) -> bool:
    """Return whether values (8,) are finite and ascending."""
    return bool(values.isfinite().all() and (values.diff() >= 0).all())


def sampled(weights: Sequence[Tensor]) -> Tensor:
    """Return at most about ``SAMPLE`` weights, in whole rows (m, in), evenly of all weights (out, in)."""
    step = -(-sum(weight.numel() for weight in weights) // SAMPLE)
    return torch.cat([weight[::step] for weight in weights])


@torch.no_grad()
def fit_table(groups: Tensor, importance: Tensor) -> Tensor:
    """Fit a layer's table (8,) to groups of its weights: float16 values in the weights' dtype, ascending, the largest
    magnitude 1.

    It is a local minimum of sum_j h_j (w_j - s t[k_j])^2 over codes, scales and table.
    """
    half = groups.new_tensor(_NORMAL)
    table = torch.cat((-half, half.flip(0)))
    scales = groups.new_empty(*groups.shape[:2], 1)
    for round_ in range(ROUNDS):
        sums = table.new_zeros(2, TABLE, dtype=torch.float64)
        for rows in row_chunks(len(groups), _FIT_WEIGHT * groups[:1].numel(), chunks.FAST_BYTES):
            part, counted = groups[rows], importance.expand_as(groups)[rows]
            scale = _first_scales(part, counted, table) if round_ == 0 else scales[rows]
            index = assign(part, scale * table)
            scales[rows] = scale = _least_squares(part, counted, table[index.long()])
            share = counted * scale
            for k in range(TABLE):
                member = share * (index == k)
                sums[0, k] += (member * scale).sum(dtype=torch.float64)
                sums[1, k] += (member * part).sum(dtype=torch.float64)
        energy, pull = sums
        found = torch.where(energy > 0, pull / energy.clamp_min(1e-300), table.double()).sort().values
        largest = found.abs().max()
        usable = (largest > 0) & largest.isfinite()  # else all weights are zero, or not numbers, which others report
        found, largest = torch.where(usable, found / largest, table), torch.where(usable, largest, 1.0)
        table, scales = found.to(groups.dtype), scales * largest.to(groups.dtype)
    return table.half().to(groups.dtype)


def fit_format(
    groups: Tensor, importance: Tensor, kind: Format, steps: int, table: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fit the ascending levels (out, n, K) of a format to groups by importance-weighted EM; also return the layer's
    table (8,), ``table`` or else one that is fitted to these groups, or None for a format without."""
    if not has_table(kind):
        return fit_levels(groups, importance, LEVELS[kind], steps), None
    table = fit_table(groups, importance) if table is None else table
    return fit_scales(groups, importance, table, steps) * table, table


@torch.no_grad()
def clustered(weight: Tensor, fmt: LayerFormat) -> Tensor:
    """Return a weight (out, in), float32, whose groups have the levels that fit it best (``fit_format``, every weight
    as important as any other), as a checkpoint stores them."""
    columns = weight.shape[1]
    groups = to_groups(weight.float().contiguous(), group_length(fmt.group_size, columns))
    counted = to_groups(groups.new_ones(1, columns), groups.shape[-1])  # the padding of a last group counts nothing
    levels, table = fit_format(groups, counted, fmt.format, _EM_STEPS)
    levels = stored_levels(levels, fmt.param_bits, table)
    return from_groups(take_levels(levels, assign(groups, levels)), columns)


def fit_scales(groups: Tensor, importance: Tensor, table: Tensor, steps: int) -> Tensor:
    """Fit the scales (out, n, 1) of groups to a table by importance-weighted EM: a local minimum of
    sum_j h_j (w_j - s t[k_j])^2, no scale below zero.

    E-step: nearest level. M-step: least squares. The start is the best of a few multiples of the group's size.
    """
    scales = groups.new_empty(*groups.shape[:2], 1)
    for rows in row_chunks(len(groups), _FIT_WEIGHT * groups[:1].numel(), chunks.FAST_BYTES):
        part, counted = groups[rows], importance.expand_as(groups)[rows]
        scale = _first_scales(part, counted, table)
        for _ in range(steps):
            scale = _least_squares(part, counted, _nearest(part, scale, table))
        scales[rows] = scale
    return scales


def _first_scales(groups: Tensor, importance: Tensor, table: Tensor) -> Tensor:
    """Return for each group the scale among a few multiples of its root mean square that has the least error."""
    tiny = torch.finfo(groups.dtype).tiny
    mass = importance.expand_as(groups).sum(-1, keepdim=True).clamp_min(tiny)
    size = ((importance * groups.square()).sum(-1, keepdim=True) / mass).sqrt() / table.abs().max().clamp_min(tiny)
    best, least = size, torch.full_like(size, torch.inf)
    for factor in _SCALES:
        scale = size * factor
        error = (importance * (groups - scale * _nearest(groups, scale, table)).square()).sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _nearest(groups: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Return for each weight the value of the table whose level is nearest."""
    return table[assign(groups, scale * table).long()]


def _least_squares(groups: Tensor, importance: Tensor, value: Tensor) -> Tensor:
    """Return the scales (out, n, 1) with the least error for known values of the table."""
    energy = (importance * value.square()).sum(-1, keepdim=True)
    pull = (importance * value * groups).sum(-1, keepdim=True)
    return (pull / energy.clamp_min(torch.finfo(groups.dtype).tiny)).clamp_min(0)
