"""GPTQ (Frantar et al. 2023): round the columns one after the other; later columns absorb the error of each column.

The even levels of a group span its compensated weights. Minimum and step are float16, as in round to nearest. The
authors' grid has an integer zero point instead, which uses one level; with two bits that is one level of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm.baselines.layer import Quantized, Settings
from lbllm.baselines.rtn import even_bits, even_levels
from lbllm.quant.levels import spans
from lbllm.stages.hessians import factorize
from lbllm.stages.ptq import assign_columns, one_thread


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
    """Round a weight (out, in) to even levels so that tr((W - Q) H (W - Q)^T) is small. Columns keep their order."""
    factor = factorize(hessian, settings.damping)[1]
    latent = weight.to(hessian.dtype).t().clone(memory_format=torch.contiguous_format)
    value = torch.empty_like(latent)
    with one_thread():
        for span in spans(weight.shape[1], settings.group_size):
            assign_columns(latent, value, span, factor, even_levels(latent[span].t(), settings.bits))
    return Quantized(value.t().float().contiguous(), even_bits(weight.shape[0], weight.shape[1], settings))
