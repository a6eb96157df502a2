"""A linear layer for training: its weight is binarized anew in every step.

A step of training needs little memory beside the parameters and the optimizer's state:

    layer.expand_dense(dtype)    the fake-quantized weight in the precision of the products, without an autograd graph
    forward and backward pass    ``layer.gradient`` is the gradient of this weight, which is released
    layer.pass_on(...)           from there to the gradients of the layer's parameters
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbllm.models.blocks import linear_weight
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import (
    assign,
    fixed_level,
    fixed_level_backward,
    from_groups,
    group_length,
    index_to_planes,
    levels_to_params,
    nearest_level,
    nearest_level_backward,
    params_to_levels,
    planes_to_index,
    relaxed_level,
    softness,
    straight_through,
    to_groups,
)
from lbllm.quant.packing import ParamGrid, fit_grid, stored_params
from lbllm.sections import LayerFormat

Mode = Literal["coupled", "relaxed", "frozen"]

# A layer is computed in parts of whole rows with at most this many weights: on a CPU its temporary tensors then stay
# in the cache, on a GPU they stay below 1 GB.
CPU_PART, GPU_PART = 2**18, 2**25

# With a table: its learning rate, relative to that of its layer's scales; and that of latent weights, relative to other
# formats, since eight levels lie closer together than four.
TABLE_RATE, TABLE_LATENT_RATE = 1.0, 0.5
_TINY = 1e-12


class BinaryLinear(nn.Module):
    """A linear layer with a fake-quantized weight and, from stage 3 on, a fake-quantized input.

    ``params`` (out, n, P) are alpha_0, mu_0[, alpha_1, mu_1], or the scales with which the ``table`` (8,) of a layer of
    three planes is multiplied, which trains too. Modes: ``coupled`` (``latent`` (out, in) determines B and
    G), ``relaxed`` (the paper's G_fp and a latent weight), ``frozen`` (fixed level indices, for stage 3 and after
    loading). ``index`` is empty while latent weights train. 4-bit parameters are rounded to ``grid`` during training
    too, with the straight-through gradient; if ``grid`` is None, one is fitted to ``params``.
    """

    def __init__(
        self,
        source: nn.Module,
        fmt: LayerFormat,
        params: Tensor,
        index: Tensor,
        grid: ParamGrid | None = None,
        table: Tensor | None = None,
    ) -> None:
        super().__init__()
        weight = linear_weight(source)
        self.fmt, self.out_features, self.in_features = fmt, weight.shape[0], weight.shape[1]
        self.length = group_length(fmt.group_size, self.in_features)
        self.mode: Mode = "frozen"
        self.params = nn.Parameter(params.to(weight.dtype).contiguous())
        self.table = None if table is None else nn.Parameter(table.to(weight.device, weight.dtype, copy=True))
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
        self.gradient: Tensor | None = None
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
        return params_to_levels(self.on_grid(), self.table)

    def of_levels(self) -> list[nn.Parameter]:
        """Return the parameters that decide the levels: those of the groups, and the table if there is one."""
        return [self.params] if self.table is None else [self.params, self.table]

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that train: latent weights, those of the levels, and relaxed bitmap, as far as there
        are any."""
        latent, bitmap = ([] if one is None else [one] for one in (self.latent, self.bitmap))
        return [*latent, *self.of_levels(), *bitmap]

    @property
    def latent_rate(self) -> float:
        """The learning rate of latent weights, relative to what the settings say."""
        return 1.0 if self.table is None else TABLE_LATENT_RATE

    def level_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups of ``of_levels`` for a learning ``rate`` of levels."""
        groups: list[dict[str, Any]] = [{"params": [self.params], "lr": rate}]
        if self.table is not None:
            # A step of the table then moves the levels of a typical group as far as a step of its scale does.
            scale = float(self.params.detach().abs().mean())
            groups.append({"params": [self.table], "lr": TABLE_RATE * rate / max(scale, _TINY)})
        return groups

    def keep_dense(self) -> None:
        """Expand the weight once for all later passes of a frozen layer."""
        self.dense = self.expand(self.params.dtype)

    def thaw(self, latent: Tensor, mode: Mode) -> None:
        """Begin training from a latent weight (out, in) of any float type; a relaxed bitmap starts at 0.9 for G = 1 and
        0.1 for G = 0."""
        self.mode = mode
        self.latent = nn.Parameter(latent.to(self.params.device, self.params.dtype, copy=True))
        if mode == "relaxed":
            bitmap = self.params.new_empty(*self.params.shape[:2], self.length)
            for rows in self._parts():
                outer = index_to_planes(to_groups(self.index[rows], self.length), 4)[1]
                assert outer is not None
                bitmap[rows] = outer.to(bitmap.dtype) * 0.8 + 0.1
            self.bitmap = nn.Parameter(bitmap)
        self.index = self.index.new_empty(0)

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

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the level indices that training found and drop the tensors that only training needs."""
        if self.latent is None:
            return
        params = self.on_grid()
        levels, order = params_to_levels(params, self.table).sort(-1)
        free = self.grid is None and self.table is None
        index = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=params.device)
        for rows in self._parts():
            groups = to_groups(self.latent[rows], self.length)
            if self.bitmap is not None:
                outer = self.bitmap[rows] > 0.5
                middle = torch.where(outer, params[rows, :, 1:2], params[rows, :, 3:4])
                found = planes_to_index((groups > middle, outer))
                found = order[rows].argsort(-1).gather(-1, found.long())
            else:
                found = assign(groups, levels[rows])
            if not free:  # keep the order of the parameters: in another they might not be on the grid
                found = order[rows].gather(-1, found.long())
            index[rows] = from_groups(found, self.in_features).to(torch.uint8)
        if free:
            self.params.copy_(levels_to_params(levels))
        self.index, self.mode, self.latent, self.bitmap = index, "frozen", None, None

    def round_params(self) -> None:
        """Round the group parameters of a frozen layer to the values that a checkpoint stores, see ``stored_params``;
        and those of a table, which is put into ascending order."""
        with torch.no_grad():
            self.params.copy_(stored_params(self.params, self.fmt.param_bits, self.grid))
            if self.table is None:
                return
            table, order = self.table.half().sort(stable=True)
            self.table.copy_(table)
            place, index = order.argsort().to(torch.uint8), torch.empty_like(self.index)
            for rows in self._parts():
                index[rows] = place[self.index[rows].long()]
            self.index = index

    def weight(self) -> Tensor:
        """Return the fake-quantized weight (out, in), differentiable in the parameters where gradients are enabled."""
        if torch.is_grad_enabled():
            return self._fake_quantized(self.on_grid(), self.index, self.latent, self.bitmap)
        return self.expand(self.params.dtype)

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> Tensor:
        """Return the fake-quantized weight (out, in) in ``dtype`` without gradients, computed part by part."""
        params = self.on_grid()
        weight = params.new_empty(self.out_features, self.in_features, dtype=dtype)
        for rows in self._parts():
            others = [tensor if tensor is None else tensor[rows] for tensor in (self.index, self.latent, self.bitmap)]
            weight[rows] = self._fake_quantized(params[rows], *others)
        return weight

    def expand_dense(self, dtype: torch.dtype) -> None:
        """Expand the weight in ``dtype`` for one forward and backward pass, which leaves its gradient in
        ``gradient``."""
        self.gradient, self.dense = None, self.expand(dtype).requires_grad_()
        self.dense.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, dense: Tensor) -> None:
        # The gradient is whole, so all products with the weight are done; autograd keeps the tensor, but not its data.
        self.gradient, dense.grad, self.dense = dense.grad, None, None
        dense.data = dense.new_empty(0)

    @torch.no_grad()
    def pass_on(self, beta: float = 0.0, slope: Tensor | None = None) -> None:
        """Set the gradients of ``trained()`` from ``gradient`` (out, in), that of the weight, in any float type.

        For a relaxed bitmap, ``slope`` is the derivative of the loss by the layer's ``polarization`` with power
        ``beta``, a scalar. Gradients of group parameters that are already set are kept.
        """
        assert self.gradient is not None
        if self.bitmap is not None:
            self._pass_on_relaxed(beta, slope)
            return
        if self.params.grad is None:
            with torch.enable_grad():
                levels = self.levels() if self.latent is None else self.levels().sort(-1).values
            by_levels = torch.empty_like(levels)
            for rows in self._parts():
                grad = to_groups(self.gradient[rows].to(levels.dtype), self.length)
                if self.latent is None:
                    index = to_groups(self.index[rows], self.length)
                    by_levels[rows] = fixed_level_backward(grad, index, levels.shape[-1])
                else:
                    groups = to_groups(self.latent[rows], self.length)
                    by_levels[rows] = nearest_level_backward(grad, groups, levels[rows])
            levels.backward(by_levels)
        if self.latent is not None:
            self.latent.grad = self.gradient.to(self.latent.dtype)

    def _pass_on_relaxed(self, beta: float, slope: Tensor | None) -> None:
        assert self.gradient is not None
        assert self.latent is not None
        assert self.bitmap is not None
        with torch.enable_grad():
            params = self.on_grid()
        by_params, self.latent.grad, self.bitmap.grad = map(torch.empty_like, (params, self.latent, self.bitmap))
        for rows in self._parts():
            leaves = [tensor.detach()[rows].requires_grad_() for tensor in (self.latent, self.bitmap, params)]
            with torch.enable_grad():
                results = [relaxed_level(to_groups(leaves[0], self.length), *leaves[1:])]
                grads = [to_groups(self.gradient[rows].to(params.dtype), self.length)]
                if slope is not None:
                    results.append(softness(leaves[1], beta))
                    grads.append((slope / self.bitmap.numel()).expand_as(leaves[1]))
            found = torch.autograd.grad(results, leaves, grads)
            self.latent.grad[rows], self.bitmap.grad[rows], by_params[rows] = found
        self.params.grad = None
        params.backward(by_params)

    def _parts(self) -> Iterator[slice]:
        most = CPU_PART if self.params.device.type == "cpu" else GPU_PART
        rows = max(1, most // self.in_features)
        for start in range(0, self.out_features, rows):
            yield slice(start, min(start + rows, self.out_features))

    def _fake_quantized(
        self, params: Tensor, index: Tensor | None, latent: Tensor | None, bitmap: Tensor | None
    ) -> Tensor:
        """Return the weight for ``on_grid()`` parameters; all of them are those of the layer or of some of its rows."""
        levels = params_to_levels(params, self.table)
        if latent is None:
            assert index is not None
            groups = fixed_level(levels, to_groups(index, self.length))
        elif bitmap is not None:
            groups = relaxed_level(to_groups(latent, self.length), bitmap, params)
        else:
            groups = nearest_level(to_groups(latent, self.length), levels.sort(-1).values)
        return from_groups(groups, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., out) for x (..., in)."""
        if self.quantizer is not None:
            x = self.quantizer(x)
        weight = self.weight() if self.dense is None else self.dense
        return nn.functional.linear(x, weight, self.bias)
