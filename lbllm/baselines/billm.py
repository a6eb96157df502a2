"""BiLLM (Huang et al. 2024): two residual binarizations for salient columns, one binarization in two groups for others.

In each block of columns, the salient columns have the largest sensitivity w^2 / [H^-1]_jj. Their number is chosen so
that binarizing them separately gives the smallest error. A salient row segment is mu + alpha_1 B_1 + alpha_2 B_2. The
other weights are split by magnitude into a concentrated and a sparse group, at a break point that is searched for each
block; each row has mu + alpha B for each of the two groups. Compensation passes a block's error to later columns.

The searches compare squared errors of the weights, as in the paper's equations (the authors' program compares squared
errors of the sensitivities). Stored are two signs for a salient weight, a sign and a group bit for any other weight, a
salience bit per column, and means and scales in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm.baselines.layer import HALF, Quantized, Settings, block_by_block, half

MOST_SALIENT = 50  # maximum number of salient columns in a block
SHARES = torch.linspace(0.1, 0.9, 81)  # candidate break points: the share of the weights below them


def billm(weight: Tensor, hessian: Tensor, settings: Settings) -> Quantized:
    """Quantize a weight (out, in) in blocks of ``settings.group_size`` columns (paper: 128)."""
    return block_by_block(weight, hessian, settings, binarize_block)


def binarize_block(block: Tensor, inverse: Tensor) -> Quantized:
    """Quantize one block (out, b).

    ``inverse`` (b,): for each column its diagonal entry in the inverse Hessian of this and all later columns.
    """
    salient = salient_columns(block, inverse)
    value = torch.empty_like(block)
    value[:, salient] = approximate(block[:, salient], torch.ones_like(block[:, salient]), 2)
    rest = block[:, ~salient]
    large = large_mask(rest)
    value[:, ~salient] = approximate(rest, large, 1) + approximate(rest, 1 - large, 1)
    return Quantized(value, stored_bits(block.shape[0], block.shape[1], int(salient.sum())))


def stored_bits(rows: int, columns: int, salient: int) -> int:
    """Return the bits of one block: planes and group bitmap (2 per weight), column mask, three and four numbers per
    row."""
    numbers = (3 if salient else 0) + (4 if salient < columns else 0)
    return 2 * rows * columns + columns + numbers * HALF * rows


def approximate(weight: Tensor, mask: Tensor, order: int) -> Tensor:
    """Return mu + alpha_1 B_1 [+ alpha_2 B_2] of each row's weights (out, b) where ``mask`` is 1, and 0 elsewhere.

    Each binarization uses the mean and the mean magnitude of the remaining residual; mu is the sum of the means.
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
    """Return a boolean mask (b,) of the salient columns of a block (out, b); at least one is salient."""
    order = (block.square().sum(0) / inverse).argsort(descending=True)
    ordered, columns = block[:, order], block.shape[1]

    def explained(part: Tensor) -> float:
        """Return the sum of squares that mu + alpha B explains; the rest of the part's squares is the error."""
        mean = part.mean(1, keepdim=True)
        return part.shape[1] * float((mean.square() + (part - mean).abs().mean(1, keepdim=True).square()).sum())

    def both(count: int) -> float:
        return explained(ordered[:, :count]) + (explained(ordered[:, count:]) if count < columns else 0)

    mask = torch.zeros(columns, dtype=torch.bool, device=block.device)
    mask[order[: max(range(1, max(2, min(MOST_SALIENT, columns))), key=both)]] = True
    return mask


def large_mask(part: Tensor) -> Tensor:
    """Return 1 where the magnitude of a weight (out, b) is at least the break point, and 0 elsewhere."""
    return (part.abs() >= break_point(part)).to(part.dtype)


def break_point(part: Tensor) -> Tensor:
    """Return the magnitude (a scalar) that splits the weights (out, b) into two groups with the least squared error.

    Each row and group is approximated by mu + alpha B. The small weights are an interval of a row's sorted weights, so
    running sums give the mean and mean magnitude of every group for all candidate points at once.
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
        """Return the sum of squares that mu + alpha B explains for the weights in the intervals, per row and point."""
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
