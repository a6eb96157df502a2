"""BWA (Song et al. 2025, "Achieving binary weight and activation for LLMs using post-training quantization"):
W(1+1) with Hessian-weighted EM and compensation; the most important channels have 8 bits.

LBLLM's stage 1 is based on this method, so clustering and compensation are those of ``lbllm.stages.ptq``, without
coordinate descent and alignment. The channels whose inputs have the most energy are separated. Groups consist of the
other channels in their order. The 8-bit channels come last and absorb the remaining error. Their inputs keep 8 bits
where the others have 4: they are the large ones, so in one range with the others they would leave these no steps. Of
the method's activations only this is included, not that it splits the 4-bit ones into binary planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm.baselines.layer import HALF, Quantized, Settings, half
from lbllm.quant.levels import LEVELS, fit_levels, levels_to_params, params_to_levels, spans
from lbllm.stages.hessians import factorize
from lbllm.stages.ptq import assign_columns, one_thread

OUTLIERS = 1 / 32  # share of the 8-bit channels: 128 of 4,096
EM_STEPS = 5
COUNT = LEVELS["w1+1"]


@torch.no_grad()
def bwa(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
    """Quantize a weight (out, in) to four free levels per group, with 8-bit outlier channels."""
    rows, columns = weight.shape
    inner = columns - int(OUTLIERS * columns)
    ranked = hessian.diagonal().argsort(stable=True)
    order = torch.cat((ranked[:inner].sort().values, ranked[inner:]))
    factor = factorize(hessian[order][:, order], settings.damping)[1]
    importance = factor.diagonal().square().reciprocal()
    latent = weight.to(hessian.dtype)[:, order].t().contiguous()
    value = torch.empty_like(latent)
    groups = list(spans(inner, settings.group_size))
    with one_thread():
        for span in groups:
            levels = fit_levels(latent[span].t().contiguous(), importance[span], COUNT, EM_STEPS)
            stored = params_to_levels(half(levels_to_params(levels))).sort(-1).values
            assign_columns(latent, value, span, factor, stored)
    value[inner:] = eight_bits(latent[inner:])
    bits = rows * (2 * inner + len(groups) * COUNT * HALF)
    if inner < columns:
        bits += rows * (8 * (columns - inner) + HALF) + columns  # codes, one scale per row, a mask of the channels
    restored = torch.empty_like(value)
    restored[order] = value
    return Quantized(restored.t().float().contiguous(), bits, order[inner:])


def eight_bits(channels: Tensor) -> Tensor:
    """Round channels (c, out) to multiples -127 to 127 of a scale, float16, one per row of the weight."""
    if not len(channels):
        return channels
    scale = half(channels.abs().amax(0) / 127)
    codes = (channels / scale.clamp_min(torch.finfo(torch.half).tiny)).round().clamp(-127, 127)
    return codes * scale
