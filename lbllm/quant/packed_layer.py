"""A linear layer that stores packed bits and computes from them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from lbllm import kernels
from lbllm.errors import CheckpointError
from lbllm.labels import CODE_BITS
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.gpu_trial import on_gpu
from lbllm.quant.levels import (
    LEVELS,
    PARAMS,
    from_groups,
    group_length,
    index_to_planes,
    params_to_levels,
    planes_to_index,
    take_levels,
    to_groups,
)
from lbllm.quant.packing import (
    ParamGrid,
    decode_params,
    encode_params,
    pack_codes,
    pack_plane,
    packed_shape,
    unpack_codes,
    unpack_plane,
)
from lbllm.quant.table import TABLE, TABLE_FAULT, has_table, is_table
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import WHOLE_ROW, LayerFormat

TILE = 32  # rows that the table lookup kernel processes at once
LONGEST = 2048  # largest number of columns in a group whose sum of codes fits into 16 bits
# Held while a layer's bits change their order. One lock for all layers: it is needed once a layer, and a lock inside a
# layer could not be copied or pickled.
_ORDER = threading.RLock()


class Arranged(NamedTuple):
    """A layer's tensors in the order of this processor's kernels.

    ``words``: tiles, uint8 (out / 32, in / 8, planes, 32), for layers that ``packed_lookup`` can compute; for other
    layers the result of ``pack_words``, int32. ``params``: as the kernel of these words reads them. ``scale``: as
    ``PackedLinear.affine`` returns it. ``table``: that of three planes. ``empty``: what stands for the layer's
    ``weight`` meanwhile.
    """

    words: Tensor
    params: Tensor
    scale: Tensor | None
    table: Tensor | None
    empty: Tensor


class PackedLinear(nn.Module):
    """A linear layer that computes from packed bits; ``lbllm.quant.packing`` describes the layout.

    On the CPU the operators of ``lbllm.kernels`` compute the output: at its first call the layer rearranges its bits
    for this processor, and it restores the stored order when it is saved or moved. On a GPU ``lbllm.kernels.gpu``
    reads the bits as stored. On other devices, and without a compiler, the PyTorch reference path expands the weight
    for one call and then drops it, unless ``keep_dense`` was called.

    Threads may share a layer. Its gradients are those of the PyTorch path on every device: straight through the
    rounding of activations inside their clipped range, as in training. The packed weights have no gradient.
    """

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool, tail: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.fmt, self.tail = in_features, out_features, fmt, tail
        self.length = group_length(fmt.group_size, in_features)
        self.range_length = group_length(fmt.act_group_size, in_features)
        self.groups, count, planes = -(-in_features // self.length), PARAMS[fmt.format], CODE_BITS[fmt.format]
        bits, half = fmt.param_bits, torch.float16
        self.register_buffer("weight", torch.zeros(out_features, planes, -(-in_features // 8), dtype=torch.uint8))
        kind = half if bits == 16 else torch.uint8
        self.register_buffer("params", torch.zeros(out_features, *packed_shape(self.groups, count, bits), dtype=kind))
        self.register_buffer("table", torch.zeros(TABLE, dtype=half) if has_table(fmt.format) else None)
        scale = {4: (out_features,), 8: (out_features, count, 2)}.get(bits)
        self.register_buffer("params_scale", None if scale is None else torch.zeros(scale, dtype=half))
        self.register_buffer("params_range", torch.zeros(count, 2, dtype=half) if bits == 4 else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.quantizer: ActQuantizer | None = None
        if fmt.act_bits < 16:
            self.quantizer = ActQuantizer(fmt.act_bits, tail, group_size=fmt.act_group_size).requires_grad_(False)
        self.dense: Tensor | None = None
        self.register_buffer("words", None, persistent=False)
        self._arranged: Arranged | None = None
        self.words: Tensor | None
        self.weight: Tensor
        self.params: Tensor
        self.params_scale: Tensor | None
        self.params_range: Tensor | None
        self.table: Tensor | None

    @classmethod
    def pack(cls, layer: BinaryLinear, tail: int, dtype: torch.dtype) -> PackedLinear:
        """Return the packed form of a frozen layer, on its device; ``dtype`` is the dtype of the bias."""
        packed = cls(
            layer.in_features, layer.out_features, layer.fmt, bias=layer.bias is not None, tail=tail, dtype=dtype
        ).to(layer.index.device)
        planes = index_to_planes(layer.index, LEVELS[layer.fmt.format])
        packed.weight = torch.stack([pack_plane(plane) for plane in planes], 1)
        params = layer.params.detach()
        if layer.table is not None:
            packed.table = layer.table.detach().half()
        if layer.grid is not None:
            packed.params = pack_codes(layer.grid.codes(params))
            packed.params_scale, packed.params_range = layer.grid
        elif layer.fmt.param_bits == 8:
            packed.params, packed.params_scale = encode_params(params)
        else:
            packed.params = params.half()
        if packed.bias is not None:
            assert layer.bias is not None
            packed.bias.data.copy_(layer.bias)
        if packed.quantizer is not None:
            assert layer.quantizer is not None
            packed.quantizer.act.data.copy_(layer.quantizer.act)
        return packed

    def dequantize(self) -> Tensor:
        """Return the weight (out, in), float32, computed from the stored bits and parameters."""
        index, params = self.unpack()
        levels = params_to_levels(params, None if self.table is None else self.table.float())
        return from_groups(take_levels(levels, to_groups(index, self.length)), self.in_features)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Return level indices uint8 (out, in) and group parameters float32 (out, n, K): the inverse of ``pack``."""
        weight, stored = self._stored()
        planes = unpack_plane(weight, self.in_features)
        params = stored if self.grid is None else unpack_codes(stored, self.groups, PARAMS[self.fmt.format])
        return planes_to_index(planes.unbind(1)), decode_params(params, self.affine())

    def check(self, name: str) -> None:
        """Raise CheckpointError, naming the layer, unless its table is one, its scales are finite, and no code of a
        scale is past the end of a row: the kernels would read it."""
        if self.table is None:
            return
        if not is_table(self.table.float()):
            raise CheckpointError(f"{name}.table has {TABLE_FAULT}; copy the checkpoint again, or make it again")
        if self.grid is not None and self.groups % 2 and bool((self.params[:, -1] >> 4).any()):
            raise CheckpointError(f"{name}.params has bits past the end of a row; copy the checkpoint again")
        for key in ("params", "params_scale", "params_range"):
            tensor = getattr(self, key)
            if tensor is not None and not tensor.float().isfinite().all():
                raise CheckpointError(
                    f"{name}.{key} has values that are not finite; copy the checkpoint again, or make it again"
                )

    @property
    def grid(self) -> ParamGrid | None:
        """The possible values of 4-bit parameters; None with 8 and 16 bits."""
        if self.params_scale is None or self.params_range is None:
            return None
        return ParamGrid(self.params_scale, self.params_range)

    def affine(self) -> Tensor | None:
        """Return minimum and step of each row and parameter, float16 (out, K, 2); None with 16-bit parameters."""
        return self.params_scale if self.grid is None else self.grid.affine()

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Expand the weight once for all later passes: faster, same output, but 16 to 32 bits of memory per weight."""
        self.dense = self.dequantize().to(dtype)

    def arranged(self) -> Arranged | None:
        """Return the bits in the order of this processor's kernels. The layer then no longer keeps the stored order.

        None if the layer's tensors were replaced since, for example by ``torch.func.functional_call``: only the PyTorch
        path can compute from these.
        """
        found = self._arranged
        if found is None or not self.holds(found) or (found.words.dtype == torch.uint8) != self.looks_up():
            with _ORDER:
                found = self._arranged
                if found is not None and not self.holds(found):
                    return None
                if found is not None and (found.words.dtype == torch.uint8) != self.looks_up():
                    self._put_back()
                found = self._arranged or self._arrange()
        return found

    def holds(self, arranged: Arranged) -> bool:
        """Return whether ``arranged`` still is what the layer's own tensors say."""
        own = self._buffers
        return own["weight"] is arranged.empty and own["params"] is arranged.params

    def _arrange(self) -> Arranged:
        if self.looks_up():
            rows, planes, columns = self.weight.shape
            halves = self.weight.view(rows // TILE, 2, TILE // 2, planes, columns)
            words = halves.permute(0, 4, 3, 2, 1).contiguous().flatten(-2)
            params = self.params.unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()
        else:
            words = torch.ops.lbllm.pack_words(self.weight, self.in_features, self.length)
            # Copies: a view of a memory-mapped file would keep the whole mapping in memory.
            params = self.params.clone()
            for name in ("params_scale", "params_range", "table"):
                tensor = getattr(self, name)
                setattr(self, name, None if tensor is None else tensor.clone())
        made = Arranged(words, params, self.affine(), self.table, self.weight.new_empty(0))
        self.weight, self.params, self.words = made.empty, params, words
        # Last: another thread that finds it computes from it.
        self._arranged = made
        return made

    def looks_up(self) -> bool:
        """Return whether the layer is computed by table lookup: 4-bit activations with one range per token, float16
        parameters, whole tiles."""
        one_range = self.range_length == self.in_features
        whole = self.in_features % 8 == 0 and self.out_features % TILE == 0
        fits = one_range and whole and self.params_scale is None and self.table is None
        groups = self.length % 8 == 0 and self.length <= LONGEST
        return fits and groups and self.quantizer is not None and self.quantizer.bits == 4

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Return ``weight`` and ``params`` in the stored order, whatever order the layer keeps."""
        with _ORDER:
            found = self._arranged
            if found is None or not self.holds(found):
                return self.weight, self.params
        planes = CODE_BITS[self.fmt.format]
        if found.words.dtype == torch.uint8:
            halves = found.words.view(-1, self.in_features // 8, planes, TILE // 2, 2).permute(0, 4, 3, 2, 1)
            params = found.params.permute(0, 3, 1, 2).flatten(0, 1).contiguous()
            return halves.reshape(self.out_features, planes, -1), params
        return torch.ops.lbllm.unpack_words(found.words, self.in_features, self.length, planes), found.params

    def _put_back(self) -> None:
        """Restore the stored order of the bits, which files and other devices use. The caller holds ``_ORDER``."""
        if self._arranged is not None:
            self.weight, self.params = self._stored()
            self.words = self._arranged = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle of the layer holds: its tensors in the stored order."""
        with _ORDER:
            weight, params = self._stored()
            buffers = self._buffers | {"weight": weight, "params": params, "words": None}
            return self.__dict__ | {"_buffers": buffers, "_arranged": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _ORDER:
            self._put_back()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        with _ORDER:
            self._put_back()
            super()._load_from_state_dict(*args)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move the layer. A new dtype applies to the bias only: stored parameters keep their dtype and values."""
        with _ORDER:
            self._put_back()
            stored = {name: getattr(self, name) for name in ("params", "params_scale", "params_range", "table")}
            act = None if self.quantizer is None else self.quantizer.act.data
            super()._apply(*args, **kwargs)
            if self.dense is not None:
                self.dense = self.dense.to(self.weight.device)
            for name, before in stored.items():
                if before is not None and getattr(self, name).dtype != before.dtype:
                    setattr(self, name, before.to(self.weight.device))
            if self.quantizer is not None and act is not None and self.quantizer.act.dtype != act.dtype:
                self.quantizer.act.data = act.to(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., out) for x (..., in), in x's dtype."""
        if self.dense is None and self._needs_gradient(x):
            quantized = x if self.quantizer is None else self.quantizer(x)
            result: Tensor = _Product.apply(quantized, self.bias, x, self)
            return result
        return self._output(x)

    def _needs_gradient(self, x: Tensor) -> bool:
        """Return whether the output must carry a gradient. The kernels alone would lose it."""
        if forward_ad._current_level >= 0:
            return True  # ``_Product`` has no forward-mode derivative and says so
        parts = (x, self.bias, None if self.quantizer is None else self.quantizer.act)
        return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)

    def _output(self, x: Tensor) -> Tensor:
        # The kernels sum in float32.
        if self.dense is None and x.device.type == "cpu" and x.dtype != torch.float64 and kernels.ready():
            arranged = self.arranged()
            if arranged is not None:
                return self._by_kernels(x, arranged)
        gpu = on_gpu() if self.dense is None and x.device.type == "cuda" and x.dtype != torch.float64 else None
        if gpu is not None:
            return self.by_triton(x, gpu)
        if self.quantizer is not None:
            x = self.quantizer(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.dequantize() if self.dense is None else self.dense
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    def by_triton(self, x: Tensor, gpu: ModuleType) -> Tensor:
        """Return the output for x, computed by ``lbllm.kernels.gpu`` from the bits as stored."""
        if self.quantizer is not None:
            x = self.quantizer.by_triton(x, gpu)
        parts = (self.weight, self.params, self.params_scale, self.params_range, self.table, self.bias)
        result: Tensor = gpu.packed_linear(x, *parts, self.in_features, self.length)
        return result

    def _by_kernels(self, x: Tensor, arranged: Arranged) -> Tensor:
        words, params, scale, table, _ = arranged
        result: Tensor
        if words.dtype == torch.uint8:
            assert self.quantizer is not None
            knee, low, high, _, tail = self.quantizer.settings()
            result = torch.ops.lbllm.packed_lookup(
                x, words, params, self.bias, self.in_features, self.length, knee, low, high, tail
            )
            return result
        if self.quantizer is not None:
            x = self.quantizer.deployed(x, torch.ops.lbllm.quantize_activations)
        result = torch.ops.lbllm.packed_linear(x, words, params, scale, table, self.bias, self.in_features, self.length)
        return result

    def extra_repr(self) -> str:
        """Return the shape and the format as text."""
        return f"{self.in_features}, {self.out_features}, {self.fmt}"


class _Product(torch.autograd.Function):
    """The output of a packed layer for x (..., in), with the gradients of its quantized input and of its bias.

    The expanded weight is made again for the backward pass: the graph of a large model could not hold all of them.
    """

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, bias: Tensor | None, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer._output(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        by_input, by_bias, *_ = ctx.needs_input_grad
        weight = ctx.layer.dequantize().to(grad.dtype) if by_input else None
        bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.layer.bias.dtype) if by_bias else None
        return None if weight is None else grad @ weight, bias, None, None


def named_groups(layers: Sequence[PackedLinear]) -> str:
    """Return the layers' group sizes as text, the largest first. If a range covers less than a token's inputs, the text
    also gives the number of inputs per range."""
    sizes = {layer.fmt.group_size for layer in layers}
    named = " and ".join(str(size) for size in sorted(sizes - {WHOLE_ROW}, reverse=True))
    words = [f"groups of {named}"] if named else []
    groups = " and ".join(words + ["whole rows"] * (WHOLE_ROW in sizes))
    ranges = {
        layer.fmt.act_group_size
        for layer in layers
        if layer.fmt.act_bits < 16 and layer.range_length < layer.in_features
    }
    return groups + "".join(f", ranges of {size} inputs" for size in ranges)
