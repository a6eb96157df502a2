"""Round to nearest: 2^bits even levels from each group's minimum to its maximum.

It needs no calibration, so every other method with the same bits has to be better. A minimum and a step are stored for
each group. With ``Settings.clip`` or ``Settings.symmetric`` the grid is GPTQ's instead, ``lbllm.baselines.grid``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbllm.baselines.grid import fit_even_grid, grid_bits
from lbllm.baselines.layer import HALF, Quantized, Settings, half
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight, set_linear_weight, share_copy
from lbllm.quant.levels import assign, spans, take_levels


def even_levels(group: Tensor, bits: int) -> Tensor:
    """Return ascending levels (out, 2^bits) for each row of a group (out, g); minimum and step are float16 values."""
    low, high = group.aminmax(dim=-1, keepdim=True)
    low, steps = half(low), 2**bits - 1
    step = half((high - low) / steps).clamp_min(0)  # a minimum that was rounded up can be above the maximum
    return low + step * torch.arange(steps + 1, dtype=group.dtype, device=group.device)


def even_bits(rows: int, columns: int, settings: Settings) -> int:
    """Return the stored bits of a layer with even levels: codes, and each group's minimum and step."""
    groups = len(list(spans(columns, settings.group_size)))
    return rows * (columns * settings.bits + groups * 2 * HALF)


def rtn(weight: Tensor, hessian: Tensor | None, settings: Settings) -> Quantized:
    """Round each weight (out, in) to the nearest level of its group; the Hessian is not used."""
    rows = weight.float()
    value = torch.empty_like(rows)
    if settings.clip or settings.symmetric:
        for span in spans(rows.shape[1], settings.group_size):
            value[:, span] = fit_even_grid(rows[:, span], settings).round(rows[:, span].t()).t()
        return Quantized(value, grid_bits(rows.shape[0], rows.shape[1], settings))
    for span in spans(rows.shape[1], settings.group_size):
        group, levels = rows[:, None, span], even_levels(rows[:, span], settings.bits)[:, None]
        value[:, span] = take_levels(levels, assign(group, levels))[:, 0]
    return Quantized(value, even_bits(rows.shape[0], rows.shape[1], settings))


@torch.no_grad()
def round_to_nearest(model: PreTrainedModel, bits: int, group_size: int) -> PreTrainedModel:
    """Return a copy of ``model`` with all linear layers of its decoder blocks rounded; it shares all other tensors."""
    student: PreTrainedModel = share_copy(model)
    for block in decoder_blocks(student)[1]:
        for layer in linear_layers(block).values():
            set_linear_weight(layer, rtn(linear_weight(layer), None, Settings(group_size, bits)).weight)
    return student
