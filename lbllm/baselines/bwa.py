"""BWA (Song et al. 2025, "Achieving binary weight and activation for LLMs using post-training quantization"):
W(1+1) by Hessian-weighted EM and compensation, with the most important channels in 8 bits.

It is what LBLLM's stage 1 comes from, so clustering and compensation are those of ``lbllm.stages.ptq``, without
coordinate descent and alignment. The channels whose inputs have the most energy are taken out, groups are formed of the
others in their order, and the 8-bit channels come last: they absorb what is left of the error. The method's binary
activations are not part of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm.baselines.layer import HALF, Quantized, Settings, half
from lbllm.quant.levels import LEVELS, fit_levels, levels_to_params, params_to_levels, spans
from lbllm.stages.ptq import assign_columns, factorize, one_thread

OUTLIERS = 1 / 32  # share of the channels that stay in 8 bits: 128 of 4,096
EM_STEPS = 5
COUNT = LEVELS["w1+1"]


@torch.no_grad()
def bwa(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
    """A weight (out, in) with four free levels a group, and 8-bit outlier channels."""
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
        bits += rows * (8 * (columns - inner) + HALF) + columns  # codes, a scale a row, and which channels they are
    restored = torch.empty_like(value)
    restored[order] = value
    return Quantized(restored.t().float().contiguous(), bits)


def eight_bits(channels: Tensor) -> Tensor:
    """Channels (c, out) as multiples from -127 to 127 of one float16 scale a row of the weight."""
    if not len(channels):
        return channels
    scale = half(channels.abs().amax(0) / 127)
    codes = (channels / scale.clamp_min(torch.finfo(torch.half).tiny)).round().clamp(-127, 127)
    return codes * scale
