"""BiLLM (Huang et al. 2024): salient columns by two residual binarizations, the others by one in two groups.

In each block of columns the salient ones are those of the largest sensitivity w^2 / [H^-1]_jj; their number is the one
at which binarizing them apart from the rest leaves the least error. A salient row segment is mu + alpha_1 B_1 +
alpha_2 B_2. The other weights are split by magnitude at a break point, one a block and searched, into a concentrated
and a sparse group, and each row has mu + alpha B for each of the two. Compensation carries a block's error on.

Searches compare squared errors of the weights, as the paper's equations do (the authors' program compares those of the
sensitivities). Stored: two signs of a salient weight; a sign and a bit of the group of any other; a bit a column for
its salience; means and scales in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm.baselines.layer import HALF, Quantized, Settings, block_by_block, half

MOST_SALIENT = 50  # columns of a block that can be salient
SHARES = torch.linspace(0.1, 0.9, 81)  # of the weights that lie below the break points tried


def billm(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
    """A weight (out, in), ``settings.group_size`` columns a block (the paper has 128)."""
    return block_by_block(weight, hessian, settings, binarize_block)


def binarize_block(block: Tensor, inverse: Tensor) -> Quantized:
    """One block (out, b); ``inverse`` (b,): the diagonal of the inverse Hessian of the columns from each one on."""
    salient = salient_columns(block, inverse)
    value = torch.empty_like(block)
    value[:, salient] = approximate(block[:, salient], torch.ones_like(block[:, salient]), 2)
    rest = block[:, ~salient]
    large = large_mask(rest)
    value[:, ~salient] = approximate(rest, large, 1) + approximate(rest, 1 - large, 1)
    return Quantized(value, stored_bits(block.shape[0], block.shape[1], int(salient.sum())))


def stored_bits(rows: int, columns: int, salient: int) -> int:
    """Bits of one block: planes and group bitmap (2 for each weight), column mask, three and four numbers a row."""
    numbers = (3 if salient else 0) + (4 if salient < columns else 0)
    return 2 * rows * columns + columns + numbers * HALF * rows


def approximate(weight: Tensor, mask: Tensor, order: int) -> Tensor:
    """mu + alpha_1 B_1 [+ alpha_2 B_2] for each row's weights (out, b) under a mask of ones and zeros; 0 elsewhere.

    Each binarization takes the mean and the mean magnitude of what the one before has left; the means add up to mu.
    """
    count = mask.sum(1, keepdim=True).clamp_min(1)
    residual, mean, planes = weight, torch.zeros_like(count), torch.zeros_like(weight)
    for _ in range(order):
        centre = (residual * mask).sum(1, keepdim=True) / count
        residual = residual - centre
        scale = half((residual.abs() * mask).sum(1, keepdim=True) / count)
        plane = torch.where(residual >= 0, scale, -scale)
        residual, mean, planes = residual - plane, mean + centre, planes + plane
    return planes.add_(half(mean)).mul_(mask)


def salient_columns(block: Tensor, inverse: Tensor) -> Tensor:
    """Which columns (b,) of a block (out, b) are salient; at least one is."""
    order = (block.square().sum(0) / inverse).argsort(descending=True)
    ordered, columns = block[:, order], block.shape[1]

    def explained(part: Tensor) -> float:
        """What of the part's squares mu + alpha B takes up: its error is the rest."""
        mean = part.mean(1, keepdim=True)
        return part.shape[1] * float((mean.square() + (part - mean).abs().mean(1, keepdim=True).square()).sum())

    def both(count: int) -> float:
        return explained(ordered[:, :count]) + (explained(ordered[:, count:]) if count < columns else 0)

    mask = torch.zeros(columns, dtype=torch.bool, device=block.device)
    mask[order[: max(range(1, max(2, min(MOST_SALIENT, columns))), key=both)]] = True
    return mask


def large_mask(part: Tensor) -> Tensor:
    """Ones where a weight (out, b) is as large as the break point or larger, zeros elsewhere."""
    return (part.abs() >= break_point(part)).to(part.dtype)


def break_point(part: Tensor) -> Tensor:
    """The magnitude (a scalar) at which the weights (out, b) fall into two groups that mu + alpha B, for each row and
    group, approximates with the least squared error.

    Of a row's sorted weights the small ones are an interval, so running sums give every group's mean and mean
    magnitude for all points at once.
    """
    if not part.numel():
        return part.new_zeros(())
    magnitudes = part.abs().flatten().sort().values
    points = magnitudes[(SHARES * (len(magnitudes) - 1)).long()].unique()
    ordered = part.double().sort(1).values
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    tried = points.double().expand(len(part), -1).contiguous()
    start, stop = torch.searchsorted(ordered, -tried, right=True), torch.searchsorted(ordered, tried)
    stop = torch.maximum(start, stop)
    end = torch.full_like(stop, part.shape[1])

    def explained(*intervals: tuple[Tensor, Tensor]) -> Tensor:
        """What of the squares of the weights in some intervals, a row and point each, mu + alpha B takes up."""
        count = torch.stack([b - a for a, b in intervals]).sum(0).clamp_min(1)
        total = torch.stack([sums.gather(1, b) - sums.gather(1, a) for a, b in intervals]).sum(0)
        mean = total / count
        below = torch.searchsorted(ordered, mean)
        deviation = torch.zeros_like(mean)
        for a, b in intervals:
            middle = below.clamp(a, b)
            low, mid, high = (sums.gather(1, edge) for edge in (a, middle, b))
            deviation += (high - mid) - (b - middle) * mean + (middle - a) * mean - (mid - low)
        return count * (mean.square() + (deviation / count).square())

    gain = explained((start, stop)) + explained((torch.zeros_like(start), start), (stop, end))
    return points[gain.sum(0).argmax()]
