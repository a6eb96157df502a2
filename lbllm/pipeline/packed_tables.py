"""Embeddings and output head of a run with less than 16 bits: made of the teacher's weights, taken over from the
checkpoint that the run goes on from, or trained in stage 4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lbllm.models.streamed import BlockModel, Rows
from lbllm.quant.embedding_code import PackedRows, pack_matrix, unpack_rows
from lbllm.sections import EmbeddingBits, Origin
from lbllm.stages.block_state import BlockState
from lbllm.stages.block_store import BlockStore

_COLUMNS = ".columns"  # what follows a matrix's name for the scales of its columns


class PackedTables:
    """The packed embeddings and output head after a stage, by their names in the model, as "lm_head.weight"; what is
    tied is one. Each is made when it is asked for."""

    def __init__(self, teacher: BlockModel, bits: EmbeddingBits, store: BlockStore, stage: Origin) -> None:
        self.teacher, self.bits = teacher, bits
        self._known: dict[int, PackedRows] = {}
        for origin in ("start", "e2e") if stage == "e2e" else ("start",):
            state = store.load(origin, _place(teacher))
            found = {} if state is None else state.tensors
            for name in (key for key in found if f"{key}{_COLUMNS}" in found):
                self._known[self._own(name)] = PackedRows(found[name], found[f"{name}{_COLUMNS}"])

    def _own(self, name: str) -> int:
        return id(self.teacher.model.get_parameter(name))

    def packed(self, name: str) -> PackedRows:
        """The packed form of the matrix with this ``name``, on the CPU. If it is made of the teacher's own weights,
        these were not rounded before, and they are read in parts."""
        own = self._own(name)
        if own not in self._known:
            if name in self.teacher.matrices:
                shape = self.teacher.matrices[name]
                self._known[own] = pack_matrix(lambda rows: self.teacher.rows(name, rows), shape, self.bits)
            else:
                weight = self.teacher.model.get_parameter(name).detach()
                self._known[own] = pack_matrix(weight.__getitem__, tuple(weight.shape), self.bits)
        return self._known[own]

    def unpacked(self, name: str, rows: Rows = slice(None)) -> Tensor:
        """Some rows (r, columns) of the matrix with this ``name``, float32 on the teacher's device."""
        found = self.packed(name)
        columns = (self.teacher.matrices.get(name) or self.teacher.model.get_parameter(name).shape)[1]
        return unpack_rows(found.weight[rows], self.bits, columns, found.scale).to(self.teacher.device)


def save_tables(store: BlockStore, stage: Origin, teacher: BlockModel, tables: Mapping[str, PackedRows]) -> None:
    """Keep matrices of 6 or 4 bits, by name, as they are after a stage."""
    tensors: dict[str, Tensor] = {}
    for name, (weight, scale) in tables.items():
        assert scale is not None
        tensors |= {name: weight, f"{name}{_COLUMNS}": scale.to(torch.float16)}
    store.save(stage, _place(teacher), BlockState(tensors, 0.0, 0.0, False))


def _place(teacher: BlockModel) -> int:
    """Where they lie among the states of the blocks; the one before is that of unfinished training."""
    return len(teacher.blocks) + 1
