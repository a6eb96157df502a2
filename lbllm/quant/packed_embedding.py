"""Token embeddings and an output head that stay packed, in 8, 6 or 4 bits a weight.

A head that shares its weights with the embeddings shares their packed rows. The rows of a text's tokens are unpacked
when they are asked for, and the head unpacks a part of its rows at a time; nothing unpacks all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lbllm import kernels
from lbllm.config import setting_name
from lbllm.errors import ConfigError
from lbllm.models.weights import row_parts
from lbllm.quant.embedding_code import SCALE, PackedRows, pack_matrix, row_bytes, unpack_rows
from lbllm.sections import EmbeddingBits, QuantConfig


class PackedTable(nn.Module):
    """Packed rows, uint8 (rows, bytes); ``lbllm.quant.embedding_code`` describes the layout. ``dtype``: that of what is
    computed from them, which changes with the model's. ``column_scale``: the scales of the columns, float16 as bytes
    (columns, 2), which no conversion of the model changes; None with 8 bits."""

    def __init__(self, rows: int, columns: int, bits: EmbeddingBits, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        packed = torch.zeros(rows, row_bytes(columns, bits), dtype=torch.uint8)
        # A parameter, so that it can be tied to another one as transformers ties weights.
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("column_scale", None if bits == 8 else torch.zeros(columns, SCALE, dtype=torch.uint8))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.column_scale: Tensor | None
        self.like: Tensor

    @property
    def scale(self) -> Tensor | None:
        """The scales of the columns, float16 (columns,); None with 8 bits."""
        return None if self.column_scale is None else self.column_scale.view(torch.float16)[:, 0]

    def unpack(self, rows: slice | Tensor) -> Tensor:
        """Return rows (..., columns), float32: those of a slice without step, or with the numbers int64 (...)."""
        if isinstance(rows, slice):
            return unpack_rows(self.weight[rows], self.bits, self.columns, self.scale)
        if self._by_kernels():
            numbers = rows.reshape(-1).contiguous()
            found: Tensor = torch.ops.lbllm.embedding_rows(self.weight, numbers, self.bits, self.columns)
            found = found if self.scale is None else found * self.scale.float()
            return found.view(*rows.shape, self.columns)
        return unpack_rows(nn.functional.embedding(rows, self.weight), self.bits, self.columns, self.scale)

    def pack(self, read: Callable[[slice], Tensor]) -> Self:
        """Pack the weights (rows, columns) that ``read`` gives some rows of."""
        return self.take(pack_matrix(read, (self.rows, self.columns), self.bits))

    def take(self, packed: PackedRows) -> Self:
        """Take the rows and scales of a packed matrix as this one's."""
        self.weight.data.copy_(packed.weight)
        if self.column_scale is not None:
            assert packed.column_scale is not None
            self.column_scale.copy_(packed.column_scale)
        return self

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return all rows (rows, columns) in ``dtype`` on the CPU."""
        weight = torch.empty(self.rows, self.columns, dtype=dtype)
        for part in row_parts((self.rows, self.columns)):
            weight[part] = self.unpack(part)
        return weight

    def _by_kernels(self) -> bool:
        return self.weight.device.type == "cpu" and kernels.ready()

    def extra_repr(self) -> str:
        """Return shape and bits as text."""
        return f"{self.rows}, {self.columns}, {self.bits} bits"


class PackedEmbedding(PackedTable):
    """Token embeddings. ``factor``: what some models multiply them by."""

    def __init__(
        self, rows: int, columns: int, bits: EmbeddingBits, dtype: torch.dtype, factor: float | None = None
    ) -> None:
        super().__init__(rows, columns, bits, dtype)
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (..., columns) of token ids int64 (...)."""
        found = self.unpack(ids).to(self.like.dtype)
        return found if self.factor is None else found * torch.tensor(self.factor, dtype=found.dtype)


class PackedHead(PackedTable):
    """An output head; ``bias`` (rows,) or None."""

    def __init__(self, rows: int, columns: int, bits: EmbeddingBits, dtype: torch.dtype, *, bias: bool = False) -> None:
        super().__init__(rows, columns, bits, dtype)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., rows) of x (..., columns), in x's dtype. Its gradient is that of unpacked rows."""
        follows = forward_ad._current_level >= 0 or (torch.is_grad_enabled() and x.requires_grad)
        logits: Tensor = _Logits.apply(x, self) if follows else self.product(x)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return x (..., columns) times the rows, without bias or gradient."""
        if x.device.type == "cpu" and x.dtype != torch.float64 and self._by_kernels():
            scaled = x if self.scale is None else x.float() * self.scale.float()
            result: Tensor = torch.ops.lbllm.embedding_linear(scaled, self.weight, self.bits)
            return result.to(x.dtype)
        logits = x.new_empty(*x.shape[:-1], self.rows)
        for part in row_parts((self.rows, self.columns)):
            logits[..., part] = nn.functional.linear(x, self.unpack(part).to(x.dtype))
        return logits


class _Logits(torch.autograd.Function):
    """The product of a head with x (..., columns), and its gradient: a part of the rows is unpacked at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: PackedHead) -> Tensor:
        ctx.head = head
        return head.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        head: PackedHead = ctx.head
        total = grad.new_zeros(*grad.shape[:-1], head.columns)
        for part in row_parts((head.rows, head.columns)):
            total += grad[..., part] @ head.unpack(part).to(grad.dtype)
        return total, None


def tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with the token embeddings and the output head of a model, dense or packed, by their names in it."""
    wanted = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: module for module in wanted}


def replace_tables(model: PreTrainedModel, quant: QuantConfig) -> None:
    """Replace a model's dense embeddings and output head by empty packed ones, if ``quant`` packs them; what shared its
    weights shares the packed rows. Raises ConfigError for modules of another kind."""
    bits = quant.embedding_bits
    if bits == 16:
        return
    known: dict[int, nn.Parameter] = {}
    for name, module in tables(model).items():
        made = _packed(name, module, bits)
        weight = module.weight
        assert isinstance(weight, Tensor)
        made.weight = known.setdefault(id(weight), made.weight)
        model.set_submodule(name, made)


def leave_file(model: PreTrainedModel) -> None:
    """Copy the packed rows of a loaded model: as views of a mapped file they would keep all of it in memory."""
    for table in model.modules():
        if isinstance(table, PackedTable) and table.weight.device.type == "cpu":
            table.weight.data = table.weight.data.clone()
            table.column_scale = None if table.column_scale is None else table.column_scale.clone()


def _packed(name: str, module: nn.Module, bits: EmbeddingBits) -> PackedTable:
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        factor = getattr(module, "scalar_embed_scale", None)  # of Gemma's
        if type(module) is nn.Embedding or factor is not None:
            rows, columns = module.weight.shape
            return PackedEmbedding(rows, columns, bits, module.weight.dtype, factor)
    if type(module) is nn.Linear:
        rows, columns = module.weight.shape
        return PackedHead(rows, columns, bits, module.weight.dtype, bias=module.bias is not None)
    raise ConfigError(
        f"{name} is a {type(module).__name__}, which can't be packed in {bits} bits; set "
        f"{setting_name('quant.embedding_bits')} to 16"
    )


def table_weights(model: PreTrainedModel) -> int:
    """The number of weights of a dense model's embeddings and output head; what both share counts once."""
    weights = {id(table.weight): table.weight for table in tables(model).values()}
    return sum(weight.numel() for weight in weights.values() if isinstance(weight, Tensor))


def weight_count(model: PreTrainedModel) -> int:
    """The number of a model's parameters outside packed layers; packed embeddings and heads count by their weights."""
    packed = [table for table in model.modules() if isinstance(table, PackedTable)]
    sizes = {id(table.weight): table.rows * table.columns for table in packed}
    return sum(sizes.get(id(parameter), parameter.numel()) for parameter in model.parameters())
