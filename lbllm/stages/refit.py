"""The levels of one group given the level of each of its weights: a step of stage 1's coordinate descent."""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm.quant.levels import levels_to_params, params_to_levels
from lbllm.quant.packing import ParamGrid


def on_grid(levels: Tensor, grid: ParamGrid | None, table: Tensor | None = None) -> Tensor:
    """The nearest ascending levels (out, K) of one group that 4-bit parameters can give."""
    if grid is None:
        return levels
    return params_to_levels(grid.round(levels_to_params(levels, table)[:, None]), table)[:, 0].sort(-1).values


def free_levels(levels: Tensor, index: Tensor, local: Tensor, pull: Tensor) -> Tensor:
    """The levels (out, K) of one group that are best for its level indices (out, g), by least squares under the
    Hessian ``local`` (g, g); ``pull`` (g, out) is the target."""
    count = levels.shape[-1]
    member = torch.stack([index == k for k in range(count)], -1).to(local.dtype)
    spread = (local @ member.transpose(0, 1).flatten(1)).view(len(local), *levels.shape).transpose(0, 1)
    normal = member.transpose(1, 2) @ spread
    right = (member.transpose(1, 2) @ pull.t()[..., None])[..., 0]
    # A small ridge keeps unused and nearly equal levels close to their present values.
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(torch.finfo(local.dtype).tiny)
    return torch.linalg.solve_ex(normal + torch.diag_embed(ridge.expand_as(right)), right + ridge * levels).result


def scaled_levels(levels: Tensor, index: Tensor, local: Tensor, pull: Tensor, table: Tensor) -> Tensor:
    """The same for levels that are multiples of a table (8,): their scale is fitted, and kept where the best one is
    not above zero."""
    value = table[index.long()].t()
    normal, right = (value * (local @ value)).sum(0), (value * pull).sum(0)
    scale = (right / normal.clamp_min(torch.finfo(local.dtype).tiny))[:, None]
    return torch.where(scale > 0, scale * table, levels)
