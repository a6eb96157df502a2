"""What the layers of a checkpoint were before training, and their latent weights.

Where the checkpoint lies in the folder of its run, and the run kept the states of its blocks, "before training" is the
state after stage 1, or the starting checkpoint; else the teacher's weights are clustered anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lbllm.errors import CheckpointError
from lbllm.models.experts import expert_number
from lbllm.models.loading import FileFault
from lbllm.models.streamed import Rows
from lbllm.models.weights import StoredWeights
from lbllm.quant.levels import LEVELS, PARAMS, assign, from_groups, group_length, params_to_levels, to_groups
from lbllm.quant.table import TABLE, fit_format, has_table
from lbllm.sections import LayerFormat, Origin, PtqConfig, stage_name
from lbllm.stages.block_store import BlockStore

EM_STEPS = PtqConfig().em_steps
_FIRST: dict[Origin, str] = {
    "ptq": f"after {stage_name('ptq').lower()} of its run",
    "start": "the checkpoint that its run started from",
}
_LATENT: dict[Origin, str] = {
    "e2e": f"after {stage_name('e2e').lower()} of its run",
    "ptq": _FIRST["ptq"],
    "start": "those that its run started from",
}
CLUSTERED = f"the teacher's weights clustered anew (fit_levels, {EM_STEPS} EM steps)"


def clustered(weight: Tensor, fmt: LayerFormat) -> tuple[Tensor, Tensor]:
    """Levels (rows, n, K) and level indices uint8 (rows, in) of whole rows of a weight, float32 (rows, in): clustered
    by ``fit_levels`` without calibration text, each weight as important as the others."""
    length = group_length(fmt.group_size, weight.shape[1])
    groups = to_groups(weight, length)
    importance = to_groups(torch.ones_like(weight[:1]), length)  # zero for what pads the last group
    levels, _ = fit_format(groups, importance, fmt.format, EM_STEPS)
    return levels, from_groups(assign(groups, levels), weight.shape[1])


@dataclass
class Before:
    """``stage``: the stage whose states are those before training, None: the teacher's weights are clustered anew.
    ``latent``: the stage whose latent weights are shown, None: there are none."""

    store: BlockStore | None = None
    stage: Origin | None = None
    latent: Origin | None = None
    _opened: dict[tuple[Origin, int, int | None], StoredWeights] = field(default_factory=dict)

    @classmethod
    def find(cls, run: Path, blocks: int) -> Before:
        """Look for the states of all blocks in a run's folder. Raises CheckpointError for a damaged or foreign file."""
        if not (run / "blocks").is_dir():
            return cls()
        store = BlockStore(run, None)
        stages: list[Origin] = [
            one for one in ("ptq", "start", "e2e") if all(store.has(one, block) for block in range(blocks))
        ]
        found = cls(store, next((one for one in stages if one in _FIRST), None))
        found.latent = next((one for one in _LATENT if one in stages and found._has_latents(one)), None)
        return found

    @property
    def words(self) -> str:
        """What "before training" is, as a part of a sentence."""
        return CLUSTERED if self.stage is None else _FIRST[self.stage]

    @property
    def latent_words(self) -> str:
        """From when the latent weights are; empty if there are none."""
        return "" if self.latent is None else _LATENT[self.latent]

    def rows(self, block: int, layer: str, fmt: LayerFormat, weight: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Levels (rows, n, K) and level indices (rows, in) of some rows of a layer; ``weight``: the teacher's, float32
        (out, in). Raises CheckpointError if the state of the block is damaged or does not fit."""
        if self.stage is None:
            return clustered(weight[rows], fmt)
        columns, table = weight.shape[1], None
        groups = -(-columns // group_length(fmt.group_size, columns))
        with self._state(self.stage, block, layer) as stored:
            self._fits(stored, f"{layer}.params", (len(weight), groups, PARAMS[fmt.format]), block)
            self._fits(stored, f"{layer}.index", tuple(weight.shape), block)
            params, index = stored.read(f"{layer}.params", rows), stored.read(f"{layer}.index", rows)
            if has_table(fmt.format):
                self._fits(stored, f"{layer}.table", (TABLE,), block)
                table = stored.read(f"{layer}.table").float()
        if index.dtype != torch.uint8 or int(index.max()) >= LEVELS[fmt.format]:
            raise self._other(f"{layer}.index", block)
        return params_to_levels(params.float(), table), index

    def latents(self, block: int, layer: str, shape: tuple[int, int], rows: Rows | None = None) -> Tensor | None:
        """The latent weights of a layer, or of some rows, float32; None if there are none."""
        if self.latent is None:
            return None
        with self._state(self.latent, block, layer) as stored:
            self._fits(stored, f"{layer}.latent", shape, block)
            return stored.read(f"{layer}.latent", rows).float()

    def _has_latents(self, stage: Origin) -> bool:
        assert self.store is not None
        return any(name.endswith(".latent") for name in StoredWeights([self.store.path(stage, 0)]).tensors)

    @contextmanager
    def _state(self, stage: Origin, block: int, layer: str) -> Iterator[StoredWeights]:
        assert self.store is not None
        key = stage, block, expert_number(layer)
        try:
            if key not in self._opened:
                self._opened[key] = self.store.stored(*key)
            yield self._opened[key]
        except (FileFault, OSError) as fault:
            raise CheckpointError(f"{self.store.folder}: {fault}; open the checkpoint again") from None

    def _fits(self, stored: StoredWeights, name: str, shape: tuple[int, ...], block: int) -> None:
        if name not in stored.tensors or stored.tensors[name].shape != shape:
            raise self._other(name, block)

    def _other(self, name: str, block: int) -> CheckpointError:
        assert self.store is not None
        return CheckpointError(
            f"{self.store.folder}: {name} of block {block} is not that of this checkpoint; move the folder away and "
            "open the checkpoint again"
        )
