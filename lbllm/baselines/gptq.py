"""GPTQ (Frantar et al. 2023): round the columns one after the other; later columns absorb the error of each column.

The levels are an even grid with an integer zero point, see ``lbllm.baselines.grid``; ``Settings.clip`` searches its
range. In the given order of the columns, a group's grid is that of its compensated weights. With
``Settings.act_order`` the columns with the largest Hessian diagonal come first. The groups are then static, as in the
authors' program: neighbouring columns in the layer's own order, with the grid of their original weights, so no order
has to be stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.baselines.grid import EvenGrid, fit_even_grid, grid_bits
from lbllm.baselines.layer import Quantized, Settings
from lbllm.quant.levels import spans
from lbllm.stages.hessians import factorize
from lbllm.stages.ptq import one_thread, round_columns

BLOCK = 128  # columns whose errors are passed on together, where groups don't decide it


@dataclass(frozen=True)
class Solved:
    """A layer after GPTQ. ``latent`` (out, in): the compensated weight that each column had when it was rounded to
    ``value`` (out, in); ``grids``: of each group, from left to right."""

    latent: Tensor
    value: Tensor
    grids: list[EvenGrid]


def gptq(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
    """Round a weight (out, in) to even levels so that tr((W - Q) H (W - Q)^T) is small."""
    value = solve(weight, hessian, settings).value
    return Quantized(value.float(), grid_bits(weight.shape[0], weight.shape[1], settings))


@torch.no_grad()
def solve(weight: Tensor, hessian: Tensor, settings: Settings) -> Solved:
    """GPTQ for a weight (out, in) and its Hessian (in, in); computes in the Hessian's dtype."""
    columns = weight.shape[1]
    source, groups = weight.to(hessian.dtype), list(spans(columns, settings.group_size))
    order, blocks, grids = torch.arange(columns, device=hessian.device), groups, []
    with one_thread():
        if settings.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            blocks = list(spans(columns, BLOCK))
            grids = [fit_even_grid(source[:, span], settings) for span in groups]
        factor = factorize(hessian[order][:, order], settings.damping)[1]
        latent = source[:, order].t().contiguous()
        value, length, places = torch.empty_like(latent), groups[0].stop, order.tolist()
        for span in blocks:
            if not settings.act_order:
                grids.append(fit_even_grid(latent[span].t(), settings))
            round_columns(
                latent, value, span, factor, lambda column: grids[places[column] // length].round(latent[column])
            )
    back = order.argsort()
    return Solved(latent[back].t().contiguous(), value[back].t().contiguous(), grids)
