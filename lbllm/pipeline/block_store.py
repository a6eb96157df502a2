"""Crash-safe states of single blocks during a run: one file per stage and block, written atomically.

A file ``<stage>-<block>.safetensors`` holds, for every binarized layer of the block, ``<layer>.params`` (out, n, K)
float32 as they will be stored, ``<layer>.index`` (out, in) uint8 level indices, after stage 1, and stage 4 where they
were trained, also ``<layer>.latent`` (out, in) float16, and after stage 3 ``<layer>.act`` (3,); with 4-bit parameters
``<layer>.scale`` and ``<layer>.ranges``, their ``packing.Grid``. Stage "start" is the
checkpoint that a run goes on from. Its metadata carry the run's fingerprint: a file of other settings is never taken
over.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lbllm.config import RunConfig
from lbllm.errors import CheckpointError
from lbllm.files import write_file
from lbllm.json_input import shortened
from lbllm.sections import WHOLE_ROW, Origin
from lbllm.stages.block_state import BlockState


def fingerprint(config: RunConfig, teacher: nn.Module, corpus_hash: str, precision: str) -> str:
    """What a block's state depends on: all settings, the teacher's weights, the text, the matmul precision. Hex
    SHA-256."""
    document = config.model_dump(mode="json", exclude={"preset", "device", "stages"})
    if config.start is None:
        del document["start"]  # runs of the time before there was such a setting are resumed, too
    if config.quant.act_group_size == WHOLE_ROW:
        del document["quant"]["act_group_size"]
    weights = {name: torch.hash_tensor(w).view(torch.int64).item() for name, w in teacher.named_parameters()}
    text = json.dumps([document, weights, corpus_hash, precision], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class BlockStore:
    """The block states of one run in its folder's ``blocks``; ``mark`` is their fingerprint, None reads those of any
    run."""

    def __init__(self, folder: Path, mark: str | None) -> None:
        self.folder, self.mark = folder / "blocks", mark
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, stage: Origin, block: int) -> Path:
        """Where the state of a block after a stage lies."""
        return self.folder / f"{stage}-{block:04d}.safetensors"

    def save(self, stage: Origin, block: int, state: BlockState) -> None:
        """Write a block's state; OSError where the disk doesn't take it."""
        assert self.mark is not None
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        metadata = {
            "fingerprint": self.mark,
            "sha256": _sha256(tensors),
            "loss_before": repr(state.loss_before),
            "loss_after": repr(state.loss_after),
            "diverged": repr(state.diverged),
        }
        write_file(self.path(stage, block), save(tensors, metadata))

    def load(self, stage: Origin, block: int) -> BlockState | None:
        """A block's state, or None where the block is not finished. Raises CheckpointError for a foreign or damaged
        file."""
        path = self.path(stage, block)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                if self.mark is not None and metadata.get("fingerprint") != self.mark:
                    raise CheckpointError(
                        f"{path} was made with another model, text, settings or precision than this run has; use "
                        "another folder or delete this one's blocks to start anew"
                    )
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            if metadata["sha256"] != _sha256(tensors):
                raise ValueError("its hash differs")
            return BlockState(
                tensors,
                float(metadata["loss_before"]),
                float(metadata["loss_after"]),
                metadata["diverged"] == "True",
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({shortened(str(error))}); delete it and resume: the block is done again"
            ) from error

    def finished(self, stage: Origin, block: int) -> BlockState:
        """A block's state, as ``load`` gives it. Raises CheckpointError where the block is not finished, too."""
        state = self.load(stage, block)
        if state is None:
            raise CheckpointError(
                f"{self.folder.parent}: block {block} has not finished stage {stage}; resume the run first"
            )
        return state
