"""The common parts of the methods: settings, result, and the loop over a layer's blocks of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.quant.levels import spans
from lbllm.stages.hessians import factorize
from lbllm.stages.ptq import one_thread

HALF = 16  # bits of a stored scale, mean or minimum


@dataclass(frozen=True)
class Settings:
    """The settings of a method.

    ``group_size``: columns that share scales, -1 for the whole row; BiLLM and ARB-LLM call it the block. ``damping``:
    relative to the mean of the Hessian's diagonal. For RTN and GPTQ only, because the other methods have a fixed
    format: ``bits``; ``symmetric``: the grid's zero is its middle; ``clip``: search each group's range. For GPTQ only:
    ``act_order``, the columns with the largest inputs first.
    """

    group_size: int = 128
    bits: int = 2
    damping: float = 0.01
    symmetric: bool = False
    clip: bool = False
    act_order: bool = False


@dataclass(frozen=True)
class Quantized:
    """A layer's dequantized weight (out, in), float32, and ``bits``, the size of its stored form.

    ``wide``: the input channels, int64, that keep 8 bits where the other inputs have 4.
    """

    weight: Tensor
    bits: int
    wide: Tensor | None = None


def half(values: Tensor) -> Tensor:
    """Round values to float16, the format of every stored scale; returns the original dtype."""
    return values.half().to(values.dtype)


@torch.no_grad()
def block_by_block(
    weight: Tensor, hessian: Tensor, settings: Settings, binarize: Callable[[Tensor, Tensor], Quantized]
) -> Quantized:
    """Quantize a layer one block of columns at a time; later columns absorb the error of each block.

    ``binarize`` gets the block's compensated weights (out, b) and the squared diagonal (b,) of U, the Cholesky factor
    of the inverse Hessian. A block's values depend on the whole block, so they are fixed before its error is known.
    With the block's difference D, W_after - D U_bb^-1 U_b,after then minimizes tr((W - Q) H (W - Q)^T) over all later
    columns. (BiLLM's own program divides by the diagonal of U_bb, which ignores the dependence between the block's
    columns.)
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
