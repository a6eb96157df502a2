"""Find a model by any of its names and load it. Commands, pages and benchmarks all look names up here.

A name is looked up in this order; the first match counts:

    1. ``shipped``, the packed checkpoint included with the project
    2. a catalogue id, in small or capital letters
    3. a .gguf file, or a folder: a Hugging Face model folder, a packed checkpoint, or a run's folder
    4. a hub id, owner/name
    5. the id of a finished run in the run store

So if a folder has the same name as a catalogue id, give it as ./name. The files of a checkpoint are not searched for
further names. Where a model is run, ":a16" after the name of a packed checkpoint leaves its activations and KV cache
alone, as ``load(folder, activations=False)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.checkpoints.hf import is_checkpoint, load
from lbllm.checkpoints.record import RunRecord, provenance, read_record
from lbllm.checkpoints.seal import CORRUPT, read_document, stated_weights, weights_sha256
from lbllm.checkpoints.shipped import ASSET_FOLDER, check_assets, shipped_checkpoint
from lbllm.config import SHIPPED
from lbllm.errors import CheckpointError, LbllmError, ModelError, RunError
from lbllm.events import Evaluated
from lbllm.json_input import shortened
from lbllm.models.catalogue import MODELS
from lbllm.models.source import TEACHERS, ModelSource, find_source, unknown_name
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.places import home
from lbllm.runs.store import Run, RunStore
from lbllm.sections import QuantConfig

CHECKPOINTS = f"{SHIPPED!r}, the id of a finished run (see `lbllm runs list`), or the folder of a checkpoint or a run"
ALONE = ":a16"  # after a checkpoint's name
_CATALOGUE = {entry.id: entry.id for entry in MODELS}


@dataclass(frozen=True)
class FoundCheckpoint:
    """A packed checkpoint.

    ``stated``: the folder with its config.json and record; for the shipped checkpoint this is not the folder with the
    weights. ``run``, ``model`` and ``evaluations``: the stored run that made it, the model that this run's user chose,
    and what was measured of it. ``activations``: whether they are to be quantized as it states.
    """

    stated: Path
    shipped: bool = False
    run: str | None = None
    model: str | None = None
    evaluations: tuple[Evaluated, ...] = ()
    activations: bool = True

    @property
    def folder(self) -> Path:
        """The folder to load from. The shipped one is assembled at the first call. Raises CheckpointError,
        ModelError."""
        return shipped_checkpoint() if self.shipped else self.stated

    @property
    def name(self) -> str:
        """A name that ``find_model`` finds this checkpoint by, and that a run keeps as its setting ``start``."""
        name = str(self.stated)
        if self.shipped:
            name = SHIPPED
        elif name == SHIPPED or name.lower() in _CATALOGUE:
            name = f"./{name}"
        return name if self.activations else f"{name}{ALONE}"

    @property
    def quantizes(self) -> bool:
        """Whether config.json states less than 16 bits for activations or KV cache. Raises CheckpointError."""
        try:
            stated = QuantConfig.model_validate(read_document(self.stated)["quantization_config"].get("quant"))
        except ValidationError as error:
            raise CheckpointError(
                f"{self.stated}: its format can't be read ({shortened(str(error))}); {CORRUPT}"
            ) from None
        return not stated.weights_alone

    def load(
        self, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, as ``hf.load`` gives them."""
        return load(self.folder, device=device, dtype=dtype, activations=self.activations)

    @property
    def record(self) -> RunRecord:
        """What is known of the run that made it. Raises CheckpointError if its files can't be read."""
        record = read_record(self.stated)
        return record if self.run is None else record.with_evaluations(list(self.evaluations), self.run)


def find_model(name: str, store: RunStore | None = None) -> ModelSource | FoundCheckpoint:
    """Where the name of a teacher or of a packed checkpoint leads. Nothing is loaded or downloaded.

    ``store``: where runs are looked up (default: the usual store), opened only if no earlier rule finds the name.
    Raises ModelError, CheckpointError, RunError.
    """
    found = _find(name, store)
    if found is None:
        known = {SHIPPED: SHIPPED} | _CATALOGUE | _finished(store)
        raise unknown_name(name, known, f"{TEACHERS}, {CHECKPOINTS}")
    return found


def find_teacher(name: str, store: RunStore | None = None) -> ModelSource:
    """Like ``find_model``, but only for a teacher, a full-precision model. Raises ModelError, RunError."""
    found = _find(name, store)
    if found is None:
        raise unknown_name(name, _CATALOGUE, TEACHERS)
    if isinstance(found, FoundCheckpoint):
        raise ModelError(f"{name} is already quantized, a packed checkpoint; a teacher is needed here: give {TEACHERS}")
    return found


def find_checkpoint(name: str, store: RunStore | None = None, *, running: bool = False) -> FoundCheckpoint:
    """Like ``find_model``, but only for a packed checkpoint; ":a16" after its name is refused unless it is for
    ``running`` it. Raises CheckpointError, ModelError, RunError."""
    found = _find(name, store)
    if found is None:
        raise unknown_name(name, {SHIPPED: SHIPPED} | _finished(store), CHECKPOINTS)
    if isinstance(found, ModelSource):
        raise CheckpointError(f"{name} is not a packed checkpoint; give {CHECKPOINTS}")
    if not (found.activations or running):
        raise CheckpointError(
            f"{name}: {ALONE} is for running a checkpoint; give {name.removesuffix(ALONE)}, the checkpoint itself"
        )
    return found


def teacher_of(found: FoundCheckpoint, store: RunStore | None = None) -> str:
    """The name of the model that a checkpoint was made from, to be loaded as its teacher.

    A checkpoint can come from anywhere, so a path in it is never followed: it must name a model of the catalogue or
    the hub. Only where the weights are those of a run in the store, that run's own setting counts, and it may be a
    path. Raises ModelError, with the way out, if there is no name to follow or it leads nowhere.
    """
    stated = provenance(found.stated).get("model")
    if not stated:
        raise ModelError(f"{found.name} does not say which model it was made from; give its teacher with --teacher")
    if _is_public(stated):
        return stated
    own = _own_teacher(found, store)
    if own is None and Path(stated).expanduser().exists():
        raise ModelError(
            f"{found.name} names {stated} as the model it was made from. A path in a checkpoint is not followed; if "
            "this is the right model, give it with --teacher"
        )
    name = own or stated
    try:
        find_teacher(name, store)
    except LbllmError:
        raise ModelError(
            f"{found.name} was made from {name}, which is not here; give its place with --teacher"
        ) from None
    return name


def _is_public(name: str) -> bool:
    """Whether this is the name of a model of the catalogue or the hub, and leads to no file or folder."""
    try:
        source = find_source(name)
    except LbllmError:
        return False
    return source is not None and source.kind in ("embedded", "hub")


def _own_teacher(found: FoundCheckpoint, store: RunStore | None) -> str | None:
    """The model of the finished run whose checkpoint this is, or is a copy of."""
    if found.run is not None:
        return found.model
    hashed = weights_sha256(found.folder).items()
    with _opened(store) as runs:
        for run in runs.all():
            if run.state == "done" and hashed <= stated_weights(run.folder / "checkpoint").items():
                return _model_of(run)
    return None


def _model_of(run: Run) -> str | None:
    """A run's model; relative paths begin where the run was started. None if its settings can't be read."""
    try:
        name = run.config.model
    except RunError:
        return None
    path = run.cwd / Path(name).expanduser()
    return str(path) if path.exists() and name.lower() not in _CATALOGUE else name


def find_run(name: str, store: RunStore | None = None) -> FoundCheckpoint | None:
    """The checkpoint of the run with this id; None if the store does not have it. Raises RunError if the run is
    not finished, CheckpointError if its checkpoint is gone."""
    with _opened(store) as runs:
        try:
            run = runs.get(name)
        except RunError:
            return None
        if run.state != "done":
            raise RunError(f"run {run.id} is {run.state}; only a finished run has a checkpoint")
        checkpoint = run.folder / "checkpoint"
        if not is_checkpoint(checkpoint):
            raise CheckpointError(f"run {run.id} is done, but its checkpoint {checkpoint} is gone; use a copy of it")
        events = (stored.event for stored in runs.events(run.id, kinds=("evaluated",)))
        measured = tuple(event for event in events if isinstance(event, Evaluated))
        return FoundCheckpoint(checkpoint, run=run.id, model=_model_of(run), evaluations=measured)


def open_model(
    name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a teacher or a packed checkpoint by any name that ``find_model`` takes. Raises LbllmError."""
    found = find_model(name)
    if isinstance(found, FoundCheckpoint):
        return found.load(device=device, dtype=dtype)
    teacher = load_teacher(name, device=device, dtype=dtype)
    return teacher.model, teacher.tokenizer


def open_teacher(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Teacher:
    """Load a teacher; the name of a packed checkpoint is refused. Raises LbllmError."""
    find_teacher(name)
    return load_teacher(name, device=device, dtype=dtype)


def _find(name: str, store: RunStore | None) -> ModelSource | FoundCheckpoint | None:
    if name == SHIPPED:
        check_assets()
        return FoundCheckpoint(ASSET_FOLDER, shipped=True)
    if name.endswith(ALONE) and not Path(name).exists():
        base = name.removesuffix(ALONE)
        found = _find(base, store)
        if isinstance(found, ModelSource):
            raise ModelError(
                f"{base} is no packed checkpoint, so its activations have no bits of their own; give {base}"
            )
        return None if found is None else replace(found, activations=False)
    source = find_source(name)
    if source is None:
        return find_run(name, store) if name.strip() else None
    if source.kind != "folder":
        return source
    return _in_folder(Path(source.place), store) or source


def _in_folder(folder: Path, store: RunStore | None) -> FoundCheckpoint | None:
    """The packed checkpoint in a folder: the folder itself, or the checkpoint of a run's folder."""
    if is_checkpoint(folder):
        return FoundCheckpoint(folder)
    if folder.resolve().parent == (store.root if store is not None else (home() / "runs").resolve()):
        found = find_run(folder.resolve().name, store)
        if found is not None:
            return found
    # A run's folder has no weights of its own; a teacher's has, whatever else lies in it.
    if is_checkpoint(folder / "checkpoint") and not any(folder.glob("*.safetensors")):
        return FoundCheckpoint(folder / "checkpoint")
    return None


def _finished(store: RunStore | None) -> dict[str, str]:
    """The finished runs as messages name them, by id and by the name that the user gave."""
    with _opened(store) as runs:
        done = [run for run in runs.all() if run.state == "done"]
    return {key: f"{run.id} ({run.name})" for run in done for key in (run.name, run.id)}


@contextmanager
def _opened(store: RunStore | None) -> Iterator[RunStore]:
    """The given store, or the usual one, opened as long as it is needed."""
    if store is not None:
        yield store
        return
    usual = RunStore()
    try:
        yield usual
    finally:
        usual.close()
