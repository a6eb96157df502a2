"""Packed embeddings and an output head in stage 4: the scales of their groups learn, their codes stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lbllm.config import RunConfig
from lbllm.models.weights import row_parts
from lbllm.quant.embedding_code import GROUPS, PackedRows, group_scales, unpack_rows, with_group_scales
from lbllm.sections import EmbeddingBits

# How far a scale may move from where packing put it: such rows are still known as those of their teacher.
LEAST, MOST = 0.85, 1.15


def trains_tables(config: RunConfig) -> bool:
    """Whether stage 4 trains the scales of embeddings and output head; with 6 bits they are better as they are."""
    return config.quant.embedding_bits == 4 and config.e2e.lr_embeddings > 0


class TrainedTable:
    """A packed matrix, on the device that it trains on, and the ``modules`` of a student that have its values.

    ``factors``, float32 (rows, groups): what the scale of each group is multiplied by, the trained parameters.
    ``columns``: weights of a row.
    """

    def __init__(self, packed: PackedRows, bits: EmbeddingBits, columns: int, modules: Sequence[nn.Module]) -> None:
        self.packed, self.bits, self.columns, self.modules = packed, bits, columns, modules
        self.shape = len(packed.weight), columns
        scales = group_scales(packed.weight, bits)
        self.factors = nn.Parameter(torch.ones(scales.shape, device=scales.device))

    @torch.no_grad()
    def expand(self) -> None:
        """Give the modules the present values, as parameters of their precision that collect gradients."""
        dense = torch.empty(self.shape, device=self.factors.device)
        for part in row_parts(self.shape):
            dense[part] = self._unpacked(part) * self._of_weights(self.factors[part])
        known: dict[torch.dtype, nn.Parameter] = {}
        for module in self.modules:
            dtype = module.weight.dtype
            assert isinstance(dtype, torch.dtype)
            module.weight = known.setdefault(dtype, nn.Parameter(dense.to(dtype)))

    @torch.no_grad()
    def collect(self) -> None:
        """Pass the gradients of the modules' values on to the factors; none where no text was seen."""
        grads = [weight.grad for weight in {id(m.weight): m.weight for m in self.modules}.values()]
        found = [grad for grad in grads if isinstance(grad, Tensor)]
        if not found:
            return
        size = GROUPS[self.bits]
        self.factors.grad = torch.empty_like(self.factors)
        for part in row_parts(self.shape):
            product = sum(grad[part].float() for grad in found) * self._unpacked(part)
            padded = nn.functional.pad(product, (0, -self.columns % size))
            self.factors.grad[part] = padded.unflatten(-1, (-1, size)).sum(-1)

    @torch.no_grad()
    def bound(self) -> None:
        """Keep the factors between ``LEAST`` and ``MOST``."""
        self.factors.clamp_(LEAST, MOST)

    @torch.no_grad()
    def freeze(self) -> None:
        """End the training: the scales become those that a checkpoint stores, float16."""
        scales = group_scales(self.packed.weight, self.bits) * self.factors
        self.packed = self.packed._replace(weight=with_group_scales(self.packed.weight, self.bits, scales))
        self.factors.fill_(1)

    def _unpacked(self, rows: slice) -> Tensor:
        return unpack_rows(self.packed.weight[rows], self.bits, self.columns, self.packed.scale)

    def _of_weights(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(GROUPS[self.bits], -1)[:, : self.columns]
