"""What the methods have in common: settings, result, and the walk over a layer's blocks of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.quant.levels import spans
from lbllm.stages.ptq import factorize, one_thread

HALF = 16  # bits of a stored scale, mean or minimum


@dataclass(frozen=True)
class Settings:
    """``group_size``: columns that share scales, -1 for the whole row; BiLLM and ARB-LLM call that their block.
    ``bits`` is for RTN and GPTQ, the others have bits of their own. ``damping`` is relative to the mean of the
    Hessian's diagonal."""

    group_size: int = 128
    bits: int = 2
    damping: float = 0.01


@dataclass(frozen=True)
class Quantized:
    """A layer's weight (out, in), float32, as its stored form stands for it; ``bits``: all that this form takes."""

    weight: Tensor
    bits: int


def half(values: Tensor) -> Tensor:
    """Values as they come back from float16, in which every method stores its scales."""
    return values.half().to(values.dtype)


@torch.no_grad()
def block_by_block(
    weight: Tensor, hessian: Tensor, settings: Settings, binarize: Callable[[Tensor, Tensor], Quantized]
) -> Quantized:
    """Quantize a layer one block of columns at a time, the columns after a block absorbing its error.

    ``binarize`` gets the block's compensated weights (out, b) and the squared diagonal (b,) of U, the Cholesky factor
    of the inverse Hessian. A block's values depend on the whole block, so they are fixed before its error is known, and
    what minimizes tr((W - Q) H (W - Q)^T) over all columns after it is W_after - D U_bb^-1 U_b,after with the block's
    difference D. (BiLLM's own program divides by the diagonal of U_bb, which leaves out how the block's columns depend
    on each other.)
    """
    factor = factorize(hessian, settings.damping)[1]
    latent = weight.to(hessian.dtype).clone()
    bits = 0
    with one_thread():
        for span in spans(weight.shape[1], settings.group_size):
            result = binarize(latent[:, span], factor.diagonal()[span].square())
            difference = latent[:, span] - result.weight
            carried = torch.linalg.solve_triangular(factor[span, span], difference, upper=True, left=False)
            latent[:, span.stop :] -= carried @ factor[span, span.stop :]
            latent[:, span] = result.weight
            bits += result.bits
    return Quantized(latent.float(), bits)
