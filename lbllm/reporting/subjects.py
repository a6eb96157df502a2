"""What a report is about: runs in any state, and packed checkpoints, each with all that is known of it.

subject = find_subject("20261122-103041-1d371b", store)       or a folder, or "shipped"
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lbllm.checkpoints.find import FoundCheckpoint, find_checkpoint, teacher_of
from lbllm.checkpoints.record import RunRecord, checkpoint_name
from lbllm.config import SHIPPED
from lbllm.errors import LbllmError, RunError
from lbllm.models.catalogue import model_title
from lbllm.models.teacher import skeleton
from lbllm.runs.listed import Listed, describe
from lbllm.runs.notes import note_of
from lbllm.runs.repair import RUN_ID
from lbllm.runs.store import Run, RunStore
from lbllm.runs.view import SUMMARY_KINDS, RunView


@dataclass(frozen=True)
class Subject:
    """A run or a checkpoint. ``name``: how an evaluation finds its checkpoint, from any folder; ``record``: what others
    may have of it; ``listed``, ``view``: of a run in the store. ``teacher``: the model that it is measured against, or
    None, and ``problem`` says why. ``disk_bytes``: of its weights; None where there is no checkpoint yet."""

    name: str
    title: str
    record: RunRecord
    listed: Listed | None = None
    view: RunView | None = None
    checkpoint: FoundCheckpoint | None = None
    teacher: str | None = None
    problem: str = ""
    disk_bytes: int | None = None

    @property
    def state(self) -> str:
        """The run's state; "done" for a checkpoint without a run here."""
        return self.listed.run.state if self.listed is not None else "done"

    @property
    def bits(self) -> float | None:
        """Bits per binarized weight, if they are known."""
        return self.record.bpw if self.listed is None or self.listed.bits is None else self.listed.bits


def find_subjects(names: Sequence[str], store: RunStore, teacher: str | None = None) -> list[Subject]:
    """The subjects of these names, each once, with titles that tell them apart. Raises LbllmError."""
    found = {subject.name: subject for subject in (find_subject(name, store, teacher) for name in names)}
    counts = Counter(subject.title for subject in found.values())
    return [
        replace(one, title=f"{one.title} ({_distinction(one)})") if counts[one.title] > 1 else one
        for one in found.values()
    ]


def find_subject(name: str, store: RunStore, teacher: str | None = None) -> Subject:
    """The run of this id or in this folder, in any state, or the checkpoint of this name. ``teacher``: measured against
    this model instead of the one that it was made from. Raises CheckpointError, ModelError, RunError."""
    run = _run(name, store)
    if run is not None:
        return _of_run(run, store, teacher)
    checkpoint = find_checkpoint(name, store)
    absolute = replace(checkpoint, stated=checkpoint.stated.resolve()) if not checkpoint.shipped else checkpoint
    return _with_checkpoint(
        Subject(absolute.name, _title(absolute), absolute.record.public()), absolute, store, teacher
    )


def _run(name: str, store: RunStore) -> Run | None:
    """The run that a name means: its id, its folder, or the folder of its checkpoint."""
    path = Path(name).expanduser()
    places = (path.resolve(), path.resolve().parent) if path.is_dir() else ()
    run_id = next((place.name for place in places if place.parent == store.root), name)
    if not RUN_ID.fullmatch(run_id) or (run_id == name and path.exists()):
        return None
    try:
        return store.get(run_id)
    except RunError:
        return None


def _of_run(run: Run, store: RunStore, teacher: str | None) -> Subject:
    view = RunView(run.id, SUMMARY_KINDS)
    with view.caught_up(store):
        listed = describe(run, view, note_of(store, run.id), time.time())
    newest = {(event.what, event.text): event for event in view.evaluations}
    record = RunRecord(
        settings=listed.config, bpw=listed.bits, evaluations=tuple(newest.values()), precision="as it is stored"
    )
    subject = Subject(run.id, run.name, record.public(), listed, view)
    if run.state != "done":
        return replace(subject, problem=f"The run is {run.state}, so there is no checkpoint to measure yet.")
    try:
        checkpoint = find_checkpoint(run.id, store)
    except LbllmError as error:
        return replace(subject, problem=f"It can't be measured: {error}.")
    return _with_checkpoint(replace(subject, record=checkpoint.record.public()), checkpoint, store, teacher)


def _with_checkpoint(subject: Subject, checkpoint: FoundCheckpoint, store: RunStore, teacher: str | None) -> Subject:
    size = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    found = replace(subject, checkpoint=checkpoint, disk_bytes=size)
    try:
        return replace(found, teacher=teacher or teacher_of(checkpoint, store))
    except LbllmError as error:
        return replace(found, problem=f"It can't be measured beside its teacher: {error}.")


def _title(checkpoint: FoundCheckpoint) -> str:
    if not checkpoint.shipped:
        return checkpoint_name(str(checkpoint.stated))
    base = checkpoint.record.base_model
    return f"{model_title(base)}, binarized ({SHIPPED})" if base else f"The {SHIPPED} checkpoint"


def _distinction(subject: Subject) -> str:
    return subject.name if subject.listed is not None else str(Path(subject.name).parent.name)


def parameters(subject: Subject) -> int | None:
    """The number of the teacher's parameters, from its config; None where it is not known."""
    if subject.teacher is None:
        return None
    try:
        return int(skeleton(subject.teacher).num_parameters())
    except LbllmError:
        return None
