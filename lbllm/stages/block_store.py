"""Crash-safe states of single blocks during a run: one file per stage and block, written atomically.

A file ``<stage>-<block>.safetensors`` holds, for every binarized layer of the block, ``<layer>.params`` (out, n, K)
float32 as they will be stored, ``<layer>.index`` (out, in) uint8 level indices, after stage 1, and stage 4 where they
were trained, also ``<layer>.latent`` (out, in) float16, and after stage 3 ``<layer>.act`` (3,); with 4-bit parameters
``<layer>.scale`` and ``<layer>.ranges``, their ``packing.Grid``; with three planes ``<layer>.table`` (8,). Stage
"start" is the checkpoint that a run goes on from. Its metadata carry the run's fingerprint, the stage with those before
it, and the block: a file of other settings or of another place is never taken over. A hash covers the metadata. Files
of lbllm 0.2 and before have the fingerprint and the hash of the tensors alone, and are read.

Of a block with experts, each expert has a file of its own, ``<stage>-<block>-e<expert>.safetensors``, so that one of
them is in memory at a time. The block's own file, with its other layers, is written after them.

Two numbers after those of the blocks are no blocks: the first is the state of stage 4's unfinished training, the second
has packed embeddings and output head, as stage 4 trained them or the starting checkpoint has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lbllm import ranks
from lbllm.config import RunConfig
from lbllm.errors import CheckpointError, ModelError
from lbllm.files import new_file, write_file
from lbllm.json_input import shortened
from lbllm.models.experts import Experts
from lbllm.models.weights import StoredWeights
from lbllm.sections import WHOLE_ROW, Origin
from lbllm.stages.block_state import BlockState
from lbllm.stages.trained_table import trains_tables

_OTHER_HASH = "its hash differs"
_PLACE = {"stage", "block", "after", "seal"}
_METADATA = _PLACE | {"fingerprint", "sha256", "loss_before", "loss_after", "diverged"}


def fingerprint(config: RunConfig, weights: dict[str, int], corpus_hash: str, precision: str) -> str:
    """What a block's state depends on: all settings, the teacher's weights, the text, the matmul precision. Hex
    SHA-256.

    ``weights``: the hash of each of the teacher's parameters by name."""
    document = config.model_dump(mode="json", exclude={"preset", "device", "stages"})
    if config.start is None:
        del document["start"]  # runs of the time before there was such a setting are resumed, too
    if config.quant.act_group_size == WHOLE_ROW:
        del document["quant"]["act_group_size"]
    if config.quant.kv_group_size == WHOLE_ROW:
        del document["quant"]["kv_group_size"], document["quant"]["kv_first"]
    if config.quant.embedding_bits == 16:
        del document["quant"]["embedding_bits"]
    if config.stream_dtype == "float32":
        del document["stream_dtype"]
    if config.aar.loss == "relative":
        del document["aar"]["loss"]
    if config.wat.streams == "student":
        del document["wat"]["streams"]
    if not trains_tables(config):
        del document["e2e"]["lr_embeddings"]
    if config.e2e.gram_weight == 0:
        del document["e2e"]["gram_weight"]
    text = json.dumps([document, weights, corpus_hash, precision], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_weights(folder: Path, model: str, weights: dict[str, int], files: dict[str, str]) -> None:
    """Keep the hashes of the teacher's ``weights`` in a run's folder, or compare them with those that it began with.

    ``files``: the file of each weight; without one there is nothing to name, and the fingerprint refuses other weights.
    Raises ModelError, with the file, if one has changed.
    """
    path = folder / "teacher.json"
    try:
        known: dict[str, object] = json.loads(path.read_bytes())
        changed = [name for name in files if name in weights and known[name] != weights[name]]
    except (OSError, ValueError, KeyError, TypeError):  # missing, or damaged: the fingerprint still decides
        changed = []
        if files:
            write_file(path, json.dumps(weights).encode())
    if changed and any((folder / "blocks").glob("*.safetensors")):
        raise ModelError(
            f"{model}: {files[changed[0]]} has changed since this run began ({changed[0]}); put back the file that it "
            "began with and resume, or start a new run"
        )
    if changed:
        write_file(path, json.dumps(weights).encode())


def _sha256(names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensor(name).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata_sha256(metadata: dict[str, str]) -> str:
    """The hash of a file's metadata without this hash itself."""
    covered = {key: value for key, value in metadata.items() if key != "seal"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _place(block: int, expert: int | None) -> str:
    """How metadata and messages name a block, or one of its experts."""
    return str(block) if expert is None else f"{block}, expert {expert}"


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({shortened(str(error))}); delete it and resume: the block is done again"
    )


class BlockStore:
    """The block states of one run in its folder's ``blocks``.

    ``mark`` is their fingerprint; None reads those of any run, but not of two. ``stages``: those of the run; a state
    depends on the stages before its own. None: any.
    """

    def __init__(self, folder: Path, mark: str | None, stages: tuple[Origin, ...] | None = None) -> None:
        self.folder, self.mark, self.stages = folder / "blocks", mark, stages
        self._first: tuple[str, Path] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, stage: Origin, block: int, expert: int | None = None) -> Path:
        """Where the state of a block, or of one of its experts, after a stage lies."""
        part = "" if expert is None else f"-e{expert:04d}"
        return self.folder / f"{stage}-{block:04d}{part}.safetensors"

    def save(self, stage: Origin, block: int, state: BlockState, expert: int | None = None) -> None:
        """Write the state of a block or of one of its experts; OSError where the disk doesn't take it. Rank 0 writes,
        and the others wait for it."""
        assert self.mark is not None
        if not ranks.is_first():
            ranks.barrier()
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        metadata = {
            "fingerprint": self.mark,
            "stage": stage,
            "block": _place(block, expert),
            "after": self._before(stage),
            "sha256": _sha256(tensors, tensors.__getitem__),
            "loss_before": repr(state.loss_before),
            "loss_after": repr(state.loss_after),
            "diverged": repr(state.diverged),
        }
        metadata["seal"] = _metadata_sha256(metadata)
        with new_file(self.path(stage, block, expert)) as file:
            save_file(tensors, file, metadata)
        ranks.barrier()

    def _before(self, stage: Origin) -> str:
        """The names of the run's stages before this one, as metadata; empty where they are not known."""
        stages = self.stages or ()
        return "+".join(stages[: stages.index(stage)] if stage in stages else ())

    def load(self, stage: Origin, block: int, expert: int | None = None) -> BlockState | None:
        """The state of a block or of one of its experts; None where it is not finished. Raises CheckpointError for a
        foreign or damaged file."""
        path = self.path(stage, block, expert)
        if not path.exists():
            return None
        try:
            stored = StoredWeights([path])  # which maps no file into memory
            metadata = stored.metadata
            self._check_place(path, metadata, stage, _place(block, expert))
            tensors = {name: stored.read(name) for name in stored.tensors}
            if metadata["sha256"] != _sha256(tensors, tensors.__getitem__):
                raise ValueError(_OTHER_HASH)
            return BlockState(
                tensors,
                float(metadata["loss_before"]),
                float(metadata["loss_after"]),
                metadata["diverged"] == "True",
            )
        except (KeyError, ValueError) as error:
            raise _damaged(path, error) from error

    def stored(self, stage: Origin, block: int, expert: int | None = None) -> StoredWeights:
        """The tensors of the state of a block or of one of its experts, to be read one by one; all of them are read
        once, for their hash. Raises CheckpointError where ``finished`` does, FileFault, OSError."""
        path = self.path(stage, block, expert)
        if not self.has(stage, block, expert):
            raise self._unfinished(stage, _place(block, expert))
        stored = StoredWeights([path])
        if stored.metadata.get("sha256") != _sha256(stored.tensors, stored.read):
            raise _damaged(path, ValueError(_OTHER_HASH))
        return stored

    def has(self, stage: Origin, block: int, expert: int | None = None) -> bool:
        """Whether a block, or one of its experts, has finished a stage. Raises CheckpointError for a foreign file; its
        tensors are not read."""
        path = self.path(stage, block, expert)
        if not path.exists():
            return False
        try:
            self._check_place(path, StoredWeights([path]).metadata, stage, _place(block, expert))
        except (KeyError, ValueError) as error:
            raise _damaged(path, error) from error
        return True

    def _check_place(self, path: Path, metadata: dict[str, str], stage: Origin, block: str) -> None:
        """Raise CheckpointError unless a file is of this run, stage and block; ValueError for damaged metadata."""
        mark = metadata["fingerprint"]
        if self.mark is not None and mark != self.mark:
            raise CheckpointError(
                f"{path} was made with another model, text, settings or precision than this run has; use "
                "another folder or delete this one's blocks to start anew"
            )
        if unknown := metadata.keys() - _METADATA:
            raise ValueError(f"its metadata have {min(unknown)!r}")
        if self._first is None:
            self._first = mark, path
        elif self._first[0] != mark:
            raise CheckpointError(f"{path} and {self._first[1]} are of different runs; put back the files of this run")
        if metadata.keys() != _METADATA:
            if metadata.keys() & _PLACE:
                raise ValueError("its metadata are incomplete")
            return  # of lbllm 0.2 or before
        if metadata["seal"] != _metadata_sha256(metadata):
            raise ValueError("the hash of its metadata differs")
        found = metadata["stage"], metadata["block"]
        if found != (stage, block):
            raise CheckpointError(
                f"{path} is the state of block {found[1]} after stage {found[0]}; put back the right file, or delete "
                "this one and resume: the block is done again"
            )
        if self.stages is not None and metadata["after"] != self._before(stage):
            raise CheckpointError(
                f"{path} was made after the stages {metadata['after'] or '(no other)'}, and this run has "
                f"{self._before(stage) or 'no other'} before {stage}; use another folder, or delete it and resume"
            )

    def finished(self, stage: Origin, block: int, expert: int | None = None) -> BlockState:
        """A state, as ``load`` gives it. Raises CheckpointError where the block is not finished, too."""
        state = self.load(stage, block, expert)
        if state is None:
            raise self._unfinished(stage, _place(block, expert))
        return state

    def experts(self, stage: Origin, block: int) -> Callable[[int], dict[str, Tensor]]:
        """What gives the tensors of each expert of a block, as ``finished`` does."""
        return lambda expert: self.finished(stage, block, expert).tensors

    def whole(self, stage: Origin, block: int, experts: int) -> dict[str, Tensor]:
        """The tensors of a block with those of all its experts, of which there are so many."""
        tensors = self.finished(stage, block).tensors
        for expert in range(experts):
            tensors |= self.finished(stage, block, expert).tensors
        return tensors

    def save_whole(self, stage: Origin, block: int, state: BlockState, experts: tuple[str, Experts] | None) -> None:
        """Write the state of a block and of its ``experts``, if it has some: their path and module."""
        tensors = dict(state.tensors)
        for expert in range(0 if experts is None else experts[1].count):
            assert experts is not None
            start = f"{experts[0]}.{expert}."
            own = {name: tensors.pop(name) for name in [*tensors] if name.startswith(start)}
            self.save(stage, block, replace(state, tensors=own), expert)
        self.save(stage, block, replace(state, tensors=tensors))

    def _unfinished(self, stage: Origin, block: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder.parent}: block {block} has not finished stage {stage}; resume the run first"
        )
