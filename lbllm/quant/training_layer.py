"""A linear layer for training: every forward pass binarizes its weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lbllm.models.blocks import linear_weight
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import (
    assign,
    fixed_level,
    from_groups,
    group_length,
    index_to_planes,
    levels_to_params,
    nearest_level,
    params_to_levels,
    planes_to_index,
    relaxed_level,
    straight_through,
    to_groups,
)
from lbllm.quant.packing import ParamGrid, fit_grid, stored_params
from lbllm.sections import LayerFormat

Mode = Literal["coupled", "relaxed", "frozen"]


class BinaryLinear(nn.Module):
    """A linear layer with a fake-quantized weight and, from stage 3 on, a fake-quantized input.

    ``params`` (out, n, K) are alpha_0, mu_0[, alpha_1, mu_1]. Modes: ``coupled`` (``latent`` (out, in) determines B and
    G), ``relaxed`` (the paper's G_fp and a latent weight), ``frozen`` (fixed level indices, for stage 3 and after
    loading). 4-bit parameters are rounded to ``grid`` during training too, with the straight-through gradient; if
    ``grid`` is None, one is fitted to ``params``.
    """

    def __init__(
        self, source: nn.Module, fmt: LayerFormat, params: Tensor, index: Tensor, grid: ParamGrid | None = None
    ) -> None:
        super().__init__()
        weight = linear_weight(source)
        self.fmt, self.out_features, self.in_features = fmt, weight.shape[0], weight.shape[1]
        self.length = group_length(fmt.group_size, self.in_features)
        self.mode: Mode = "frozen"
        self.params = nn.Parameter(params.to(weight.dtype).contiguous())
        self.register_buffer("index", index)
        if fmt.param_bits == 4 and grid is None:
            grid = fit_grid(self.params)
        self.register_buffer("scale", None if grid is None else grid.scale)
        self.register_buffer("ranges", None if grid is None else grid.ranges)
        self.scale: Tensor | None
        self.ranges: Tensor | None
        self.bias: nn.Parameter | None = source.bias  # type: ignore[assignment]
        self.latent: nn.Parameter | None = None
        self.bitmap: nn.Parameter | None = None
        self.quantizer: ActQuantizer | None = None
        self.dense: Tensor | None = None
        self.index: Tensor

    @property
    def grid(self) -> ParamGrid | None:
        """The possible values of 4-bit parameters; None with 8 and 16 bits."""
        return None if self.scale is None or self.ranges is None else ParamGrid(self.scale, self.ranges)

    def on_grid(self) -> Tensor:
        """Return the parameters (out, n, K); 4-bit parameters are rounded to their grid, with the gradient of
        ``params``."""
        return self.params if self.grid is None else straight_through(self.params, self.grid.round)

    def levels(self) -> Tensor:
        """Return the levels (out, n, K) of ``on_grid()``, in the order of ``params_to_levels``."""
        return params_to_levels(self.on_grid())

    def keep_dense(self) -> None:
        """Expand the weight once for all later passes of a frozen layer."""
        self.dense = self.weight().detach()

    def thaw(self, latent: Tensor, mode: Mode) -> None:
        """Begin training from a latent weight (out, in); a relaxed bitmap starts at 0.9 for G = 1 and 0.1 for G = 0."""
        self.mode = mode
        self.latent = nn.Parameter(latent.to(self.params).clone())
        if mode == "relaxed":
            bitmap = index_to_planes(to_groups(self.index, self.length), 4)[1]
            assert bitmap is not None
            self.bitmap = nn.Parameter(bitmap.to(self.params.dtype) * 0.8 + 0.1)

    @torch.no_grad()
    def nearest_to(self, latent: Tensor) -> Tensor:
        """Return a latent weight (out, in) that gives the frozen layer's level indices.

        Where ``latent`` already gives the layer's level, its value is kept; elsewhere the result is the level itself.
        """
        weight = self.weight()
        latent = latent.to(weight)
        levels = self.levels().sort(-1).values
        nearest = from_groups(nearest_level(to_groups(latent, self.length), levels), self.in_features)
        return torch.where(nearest == weight, latent, weight)

    def freeze(self) -> None:
        """Fix the level indices that training found and drop the tensors that only training needs."""
        if self.latent is None:
            return
        with torch.no_grad():
            groups = to_groups(self.latent, self.length)
            if self.mode == "relaxed":
                assert self.bitmap is not None
                outer = self.bitmap > 0.5
                params = self.on_grid()
                middle = torch.where(outer, params[..., 1:2], params[..., 3:4])
                index = planes_to_index(groups > middle, outer)
                levels, order = self.levels().sort(-1)
                index = order.argsort(-1).gather(-1, index.long()).to(torch.uint8)
            else:
                levels, order = self.levels().sort(-1)
                index = assign(groups, levels)
            if self.grid is None:
                self.params.copy_(levels_to_params(levels))
            else:  # keep the order of the parameters: in another order they might not be on the grid
                index = order.gather(-1, index.long()).to(torch.uint8)
            self.index = from_groups(index, self.in_features).contiguous()
        self.mode, self.latent, self.bitmap = "frozen", None, None

    def round_params(self) -> None:
        """Round the group parameters to the values that a checkpoint stores; see ``stored_params``."""
        with torch.no_grad():
            self.params.copy_(stored_params(self.params, self.fmt.param_bits, self.grid))

    def weight(self) -> Tensor:
        """Return the fake-quantized weight (out, in)."""
        levels = self.levels()
        if self.mode == "frozen":
            return from_groups(fixed_level(levels, to_groups(self.index, self.length)), self.in_features)
        assert self.latent is not None
        groups = to_groups(self.latent, self.length)
        if self.mode == "relaxed":
            assert self.bitmap is not None
            return from_groups(relaxed_level(groups, self.bitmap, self.on_grid()), self.in_features)
        return from_groups(nearest_level(groups, levels.sort(-1).values), self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., out) for x (..., in)."""
        if self.quantizer is not None:
            x = self.quantizer(x)
        weight = self.weight() if self.dense is None else self.dense
        return nn.functional.linear(x, weight, self.bias)
