"""The mathematics of the weight format W(1+1): pure functions on groups of weights.

Equation (LBLLM, Song et al. 2026), for each group of ``group_size`` weights along the input dimension:

    W_q = G * (alpha_0 * B + mu_0) + (1 - G) * (alpha_1 * B + mu_1),    B in {-1, +1}, G in {0, 1}

A group therefore has four free levels: mu_0 -+ alpha_0 and mu_1 -+ alpha_1. This module keeps the levels in ascending
order l_0 <= l_1 <= l_2 <= l_3. The outer pair (l_0, l_3) has G = 1: the bitmap marks the weights of large magnitude,
and B is their sign. W1 (sign only) has two levels, mu -+ alpha, and no bitmap. W(1+1+1), three planes and not LBLLM's
own format, has eight levels of one shape for a whole layer, see ``lbllm.quant.table``.

Shapes: a weight (out, in) is viewed as groups (out, n, g) with n = ceil(in / g); the last group is padded with zeros.
Levels are (out, n, K) with K = 8, 4 or 2. Group parameters are (out, n, P) in the order alpha_0, mu_0, alpha_1, mu_1,
P = K, or with three planes one scale, P = 1. Level indices are uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lbllm import kernels
from lbllm.labels import CODE_BITS
from lbllm.quant import chunks
from lbllm.quant.chunks import row_chunks
from lbllm.sections import WHOLE_ROW, Format

LEVELS: dict[Format, int] = {name: 2**planes for name, planes in CODE_BITS.items()}
# Parameters of a group. The levels of three planes are those of the layer's table times the group's scale.
PARAMS: dict[Format, int] = {"w1+1+1": 1, "w1+1": 4, "w1": 2}

# The first clustering of a group works on at most this many runs of neighbouring sorted weights.
POINTS = 16

# Bytes of temporary tensors in ``fit_levels``: for each pair of borders between the runs of a group, and for each
# weight (sorted weights with their order and importance, moments, running sums in float64).
_FIT_PAIR, _FIT_WEIGHT = 40, 80


def group_length(group_size: int, in_features: int) -> int:
    """Return the number of weights in a full group: ``group_size``, at most the row; the whole row for -1."""
    return in_features if group_size == WHOLE_ROW else min(group_size, in_features)


def spans(columns: int, group_size: int) -> Iterator[slice]:
    """Yield the column slices of a row's groups, from left to right; the last group may be shorter."""
    length = group_length(group_size, columns)
    for start in range(0, columns, length):
        yield slice(start, min(start + length, columns))


def to_groups(rows: Tensor, length: int) -> Tensor:
    """View rows (..., in) as groups (..., n, length); if the last group is shorter, return a copy padded with zeros."""
    missing = -rows.shape[-1] % length
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.unflatten(-1, (-1, length))


def from_groups(groups: Tensor, in_features: int) -> Tensor:
    """Return groups (..., n, length) as rows (..., in): the inverse of ``to_groups``."""
    return groups.flatten(-2)[..., :in_features]


def assign(groups: Tensor, levels: Tensor) -> Tensor:
    """E-step: return the index (uint8) of the nearest level of each weight; levels ascend along the last dimension."""
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    index = (groups > middles[..., :1]).to(torch.uint8)
    for k in range(1, middles.shape[-1]):
        index += groups > middles[..., k : k + 1]
    return index


def take_levels(levels: Tensor, index: Tensor) -> Tensor:
    """Return the weights (out, n, g) of level indices (out, n, g)."""
    return levels.gather(-1, index.long())


def refit(groups: Tensor, importance: Tensor, levels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """M-step: return ascending levels (out, n, K), each the importance-weighted mean of its weights, and the index
    (uint8) of each weight's level among them.

    A level without weights keeps its value. ``importance`` broadcasts against ``groups`` (out, n, g). ``fit_levels``
    does the same in one pass over sorted weights.
    """
    member = torch.nn.functional.one_hot(index.long(), levels.shape[-1]).to(groups.dtype)
    share = importance.expand_as(groups)[..., None] * member
    mass, first = share.sum(-2), (share * groups[..., None]).sum(-2)
    means = torch.where(mass > 0, first / mass.clamp_min(torch.finfo(groups.dtype).tiny), levels)
    ascending, order = means.sort(dim=-1, stable=True)
    return ascending, order.argsort(-1).gather(-1, index.long()).to(torch.uint8)


def fit_levels(groups: Tensor, importance: Tensor, count: int, steps: int) -> Tensor:
    """Fit levels to each group by importance-weighted EM: ascending levels (out, n, count).

    They are a local minimum of sum_j h_j (w_j - l)^2. E-step: nearest level. M-step: importance-weighted mean of each
    cluster; an empty cluster keeps its level. The start is the best clustering of runs of the sorted weights, see
    ``_best_split``. Padding has importance zero. ``importance`` broadcasts against ``groups``. The rows are fitted in
    parts of ``FAST_BYTES``, see ``row_chunks``.
    """
    importance, length = importance.expand_as(groups), groups.shape[-1]
    row_bytes = groups[:1].numel() // length * (_FIT_PAIR * (POINTS + 1) ** 2 + _FIT_WEIGHT * length)
    parts = row_chunks(len(groups), row_bytes, chunks.FAST_BYTES)
    return torch.cat([_fit_part(groups[rows], importance[rows], count, steps) for rows in parts])


def _fit_part(groups: Tensor, importance: Tensor, count: int, steps: int) -> Tensor:
    """``fit_levels`` of some rows."""
    ordered, order = groups.sort(-1)
    weight = importance.gather(-1, order)
    tiny = torch.finfo(groups.dtype).tiny
    mean = (ordered * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(tiny)
    ordered -= mean
    levels = _best_split(ordered, weight, count)
    if steps:
        # A cluster is a run of the sorted weights, so differences of running sums give its mass and mean.
        sums = _running(torch.stack((weight, weight * ordered), -2).double())
        ends = ordered.shape[-1] * torch.ones_like(levels[..., :1], dtype=torch.long)
    for _ in range(steps):
        cuts = torch.searchsorted(ordered, (levels[..., 1:] + levels[..., :-1]) / 2, right=True)
        borders = torch.cat((torch.zeros_like(ends), cuts, ends), -1)
        mass, first = _between(sums, borders).unbind(-2)
        means = torch.where(mass > 0, first / mass.clamp_min(tiny), levels)
        levels = means.to(levels.dtype).sort(-1).values
    return levels + mean


def _running(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, 2, ... values along the last dimension."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def _between(sums: Tensor, borders: Tensor) -> Tensor:
    """Return the sums (out, n, m, b - 1) between neighbouring ``borders`` (out, n, b) from running sums
    (out, n, m, g + 1)."""
    return sums.gather(-1, borders[..., None, :].expand(*sums.shape[:-1], borders.shape[-1])).diff(dim=-1)


def _best_split(ordered: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return ascending levels (out, n, count) of a good first clustering of ascending values; ``count`` is 2 or 4.

    In one dimension the optimal clusters are intervals. The values are first grouped into at most ``POINTS`` runs of
    equal length; then the best division of these runs into intervals is found exactly.
    """
    size, tiny = -(-ordered.shape[-1] // POINTS), torch.finfo(ordered.dtype).tiny
    # Mass, first and second moment of all runs up to each border; differences give the moments of an interval.
    moments = torch.stack((weight, weight * ordered, weight * ordered.square()), -2)
    sums = _running(to_groups(moments, size).sum(-1))
    between = sums[..., None, :] - sums[..., :, None]
    mass, first, second = between.unbind(-3)
    cost = (second - first.square() / mass.clamp_min(tiny)).clamp_min(0)
    borders = torch.arange(cost.shape[-1], device=ordered.device)
    cost = cost.masked_fill(borders[:, None] > borders, torch.inf)

    def halve(start: Tensor, end: Tensor) -> Tensor:
        """Return the border (out, n) that best divides the interval from border ``start`` to ``end``, both (out, n)."""
        pick = [one[..., None, None].expand(*one.shape, 1, cost.shape[-1]) for one in (start, end)]
        left, right = cost.gather(-2, pick[0]), cost.transpose(-1, -2).gather(-2, pick[1])
        return (left + right).squeeze(-2).argmin(-1)

    edges = [torch.zeros_like(sums[..., 0, 0], dtype=torch.long)]
    last = edges[0] + len(borders) - 1
    if count == 2:
        edges += [halve(edges[0], last), last]
    else:
        before = (cost[..., 0, :, None] + cost).amin(-2)
        after = (cost + cost[..., None, :, -1]).amin(-1)
        middle = (before + after).argmin(-1)
        edges += [halve(edges[0], middle), middle, halve(middle, last), last]
    mass, first, _ = _between(sums, torch.stack(edges, -1)).unbind(-2)
    return torch.where(mass > 0, first / mass.clamp_min(tiny), 0).sort(-1).values


def levels_to_params(levels: Tensor, table: Tensor | None = None) -> Tensor:
    """Return the group parameters (..., P) of ascending levels (..., K): alpha_0, mu_0 of the outer pair, then alpha_1,
    mu_1 of the inner pair; with a ``table`` (8,) the scale of which they are multiples."""
    if table is not None:
        largest = table.abs().argmax()[None]
        return levels.index_select(-1, largest) / table[largest]
    low, high = levels[..., 0], levels[..., -1]
    params = [(high - low) / 2, (high + low) / 2]
    if levels.shape[-1] == 4:
        params += [(levels[..., 2] - levels[..., 1]) / 2, (levels[..., 2] + levels[..., 1]) / 2]
    return torch.stack(params, -1)


def params_to_levels(params: Tensor, table: Tensor | None = None) -> Tensor:
    """Return the levels (..., K) of group parameters, in the order (G=1,B=-1), (G=0,B=-1), (G=0,B=+1), (G=1,B=+1); with
    a ``table`` (8,) in its order."""
    if table is not None:
        return params * table
    outer = params[..., 1] - params[..., 0], params[..., 1] + params[..., 0]
    if params.shape[-1] == 2:
        return torch.stack(outer, -1)
    inner = params[..., 3] - params[..., 2], params[..., 3] + params[..., 2]
    return torch.stack((outer[0], *inner, outer[1]), -1)


def index_to_planes(index: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the bit planes of level indices: B (True: +1, the upper half of the levels); with four levels G (True: the
    outer pair); with eight G (True: the outer half of a side's four levels) and H (True: the outer one of that half).
    """
    sign = index >= count // 2
    if count == 2:
        return (sign,)
    if count == 4:
        return sign, (index == 0) | (index == 3)
    # The place of the level on its side, counted from the middle.
    place = torch.where(sign, index, 7 - index) & 3
    return sign, place >= 2, (place & 1).bool()


def planes_to_index(planes: Sequence[Tensor]) -> Tensor:
    """Return the level indices (uint8) of bit planes: the inverse of ``index_to_planes``."""
    sign, *others = planes
    if not others:
        return sign.to(torch.uint8)
    if len(others) == 1:
        return (sign == others[0]).to(torch.uint8).add_(sign, alpha=2)
    place = others[1].to(torch.uint8).add_(others[0], alpha=2)
    return torch.where(sign, 4 + place, 3 - place)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(value: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``rounded(value)`` with the gradient of ``value``."""
    result: Tensor = _StraightThrough.apply(value, rounded)
    return result


def float_mask(compare: Callable[..., Tensor], left: Tensor, right: Tensor | float) -> Tensor:
    """Return a comparison as 0 and 1 in ``left``'s dtype; on a CPU several times faster than converting a mask."""
    out: Tensor = compare(left, right, out=torch.empty_like(left))
    return out


class _NearestLevel(torch.autograd.Function):
    """w -> nearest level. Gradients: straight through for latent weights, exact (sums per cluster) for levels."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(groups, levels)
        if _compiled(groups):
            return torch.ops.lbllm.nearest_level(groups.contiguous(), levels.contiguous())
        return take_levels(levels, assign(groups, levels))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], nearest_level_backward(grads[0], *ctx.saved_tensors)


def _compiled(groups: Tensor) -> bool:
    """Return whether ``lbllm.kernels`` can process these groups."""
    return groups.device.type == "cpu" and groups.dtype == torch.float32 and kernels.ready()


def nearest_level(groups: Tensor, levels: Tensor) -> Tensor:
    """Fake-quantize with coupled planes: one latent weight determines both B and G (as RaBiT does for two planes).

    ``groups`` (out, n, g) latent weights, ``levels`` (out, n, K) ascending. Differentiable in both.
    """
    value: Tensor = _NearestLevel.apply(groups, levels)
    return value


def nearest_level_backward(grad: Tensor, groups: Tensor, levels: Tensor) -> Tensor:
    """Return the gradient (out, n, K) of the levels in ``nearest_level`` for that of the weights (out, n, g).

    The gradient of the latent weights is ``grad`` itself.
    """
    if _compiled(groups):
        by_levels: Tensor = torch.ops.lbllm.nearest_level_backward(grad, groups.contiguous(), levels.contiguous())
        return by_levels
    return fixed_level_backward(grad, assign(groups, levels), levels.shape[-1])


class _FixedLevel(torch.autograd.Function):
    """Weights of fixed level indices; only the levels get a gradient."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = levels.shape[-1]
        wide = index.to(levels.dtype)
        value = levels[..., :1] * float_mask(torch.eq, wide, 0.0)
        for k in range(1, levels.shape[-1]):
            value.addcmul_(float_mask(torch.eq, wide, float(k)), levels[..., k : k + 1])
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return fixed_level_backward(grads[0], index, ctx.count), None


def fixed_level_backward(grad: Tensor, index: Tensor, count: int) -> Tensor:
    """Return the gradient (out, n, count) of the levels in ``fixed_level`` for that of the weights (out, n, g): its
    sums over the weights of each level."""
    wide = index.to(grad.dtype)
    sums = [torch.linalg.vecdot(grad, float_mask(torch.eq, wide, float(k))) for k in range(count)]
    return torch.stack(sums, -1)


def fixed_level(levels: Tensor, index: Tensor) -> Tensor:
    """Return ``take_levels(levels, index)``, differentiable in the levels."""
    value: Tensor = _FixedLevel.apply(levels, index)
    return value


class _Sign(torch.autograd.Function):
    """The sign, with B(0) = -1 and the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return (value > 0).to(value.dtype) * 2 - 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def relaxed_level(groups: Tensor, bitmap: Tensor, params: Tensor) -> Tensor:
    """Fake-quantize with the paper's relaxed bitmap: G_fp (out, n, g) in [0, 1] blends the two pairs of levels.

    B is the sign of the latent weight minus the blended mu; the latent weight gets the straight-through gradient.
    """
    alpha_0, mu_0, alpha_1, mu_1 = params.unsqueeze(-2).unbind(-1)
    alpha = bitmap * alpha_0 + (1 - bitmap) * alpha_1
    middle = bitmap * mu_0 + (1 - bitmap) * mu_1
    sign: Tensor = _Sign.apply((groups - middle.detach()) / alpha.detach().clamp_min(1e-8))
    return alpha * sign + middle


def softness(bitmap: Tensor, beta: float) -> Tensor:
    """Return 1 - |2 G_fp - 1|^beta of each entry of the bitmap: zero only where it is 0 or 1."""
    return 1 - (2 * bitmap - 1).abs().pow(beta)


def polarization(bitmap: Tensor, beta: float) -> Tensor:
    """Return L_reg = mean(1 - |2 G_fp - 1|^beta), a scalar (LBLLM, after AdaRound).

    It is zero only if every entry of the bitmap is 0 or 1.
    """
    return softness(bitmap, beta).mean()
