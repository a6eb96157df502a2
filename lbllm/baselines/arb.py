"""ARB-LLM_RC (Li et al. 2024): alternating refined binarization with scales for rows and columns.

A part of a block of columns is alpha_r alpha_c^T o B; salient columns are the sum of two of these planes. The method
refines row scales, column scales and, with two planes, their signs in turn. Each step finds the exact optimum while the
others are fixed, so no step increases the squared error. There is no mean: the column scales replace it.

Salient columns and break points are found as in BiLLM. With the column-group bitmap (CGB) the salient weights are also
split by magnitude, so a block has four groups with their own scales; without CGB it has three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lbllm.baselines.billm import large_mask, salient_columns
from lbllm.baselines.layer import HALF, Quantized, Settings, block_by_block, half

ROUNDS = 15


@dataclass
class Plane:
    """``sign`` (out, b): -1 or 1 under the mask, 0 elsewhere; ``row`` (out, 1) and ``column`` (1, b) scales."""

    sign: Tensor
    row: Tensor
    column: Tensor

    def value(self) -> Tensor:
        """Return the plane's weights (out, b)."""
        return self.sign * self.row * self.column


def arb(weight: Tensor, hessian: Tensor, settings: Settings, *, column_groups: bool = True) -> Quantized:
    """Quantize a weight (out, in) in blocks of ``settings.group_size`` columns (paper: 128); ``column_groups``: CGB."""
    return block_by_block(weight, hessian, settings, partial(binarize_block, column_groups=column_groups))


def binarize_block(block: Tensor, inverse: Tensor, *, column_groups: bool) -> Quantized:
    """Quantize one block (out, b); ``inverse`` as for BiLLM."""
    salient = salient_columns(block, inverse)
    value = torch.zeros_like(block)
    for chosen, order in ((salient, 2), (~salient, 1)):
        part = block[:, chosen]
        groups = [torch.ones_like(part)]
        if column_groups or order == 1:
            large = large_mask(part)
            groups = [large, 1 - large]
        for mask in groups:
            for plane in refine(part, mask, order, ROUNDS):
                value[:, chosen] += Plane(plane.sign, half(plane.row), half(plane.column)).value()
    rows, columns = block.shape
    return Quantized(value, stored_bits(rows, columns, int(salient.sum()), column_groups))


def stored_bits(rows: int, columns: int, salient: int, column_groups: bool) -> int:
    """Return the bits of one block: signs, group bitmap, column mask, row and column scales of each group's planes."""
    other = columns - salient
    signs = rows * (2 * salient + other)
    bitmap = rows * (other + (salient if column_groups else 0))
    scales = 2 * (rows + other) if other else 0
    if salient:
        scales += (2 if column_groups else 1) * 2 * (rows + salient)
    return signs + bitmap + columns + HALF * scales


def refine(weight: Tensor, mask: Tensor, order: int, rounds: int) -> list[Plane]:
    """Fit ``order`` planes (1 or 2) to the weights (out, b) where ``mask`` is 1, with ``rounds`` of refinement."""
    target = weight * mask
    planes: list[Plane] = []
    residual = target
    for _ in range(order):
        magnitude = residual.abs()
        row = _ratio(magnitude.sum(1, keepdim=True), mask.sum(1, keepdim=True))
        column = _ratio((magnitude * _ratio(torch.ones_like(row), row)).sum(0, keepdim=True), mask.sum(0, keepdim=True))
        planes.append(Plane(torch.where(residual >= 0, mask, -mask), row, column))
        residual = residual - planes[-1].value()
    for _ in range(rounds):
        for number, plane in enumerate(planes):
            pull = target * plane.sign
            if order == 2:
                pull = pull - planes[1 - number].value() * plane.sign
            plane.row = _ratio((pull * plane.column).sum(1, keepdim=True), (mask * plane.column.square()).sum(1, True))
            plane.column = _ratio((pull * plane.row).sum(0, keepdim=True), (mask * plane.row.square()).sum(0, True))
        if order == 2:  # with one plane the signs don't change: they are the weights' signs, and no scale is negative
            _choose_signs(target, mask, *planes)
    return planes


def _ratio(upper: Tensor, lower: Tensor) -> Tensor:
    """Return upper / lower where lower is positive, and 0 elsewhere."""
    return torch.where(lower > 0, upper / lower, 0)


def _choose_signs(target: Tensor, mask: Tensor, first: Plane, second: Plane) -> None:
    """Set the signs of both planes: for each weight the best of the four pairs of signs."""
    sizes = first.row * first.column, second.row * second.column
    errors, signs = [], []
    for turned in (1.0, -1.0):
        left = target - turned * sizes[1]
        sign = torch.where((left >= 0) == (sizes[0] >= 0), 1.0, -1.0)
        errors.append((left - sign * sizes[0]).square())
        signs.append(sign)
    up = errors[0] <= errors[1]
    first.sign = torch.where(up, signs[0], signs[1]).to(target.dtype) * mask
    second.sign = torch.where(up, 1.0, -1.0).to(target.dtype) * mask
