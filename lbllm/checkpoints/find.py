"""Find a packed checkpoint by its folder, a run's id, or the name of the shipped one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lbllm.checkpoints.hf import is_checkpoint
from lbllm.checkpoints.record import RunRecord, read_record
from lbllm.checkpoints.shipped import shipped_checkpoint
from lbllm.config import SHIPPED
from lbllm.errors import CheckpointError, RunError
from lbllm.events import Evaluated
from lbllm.runs.store import RunStore


@dataclass(frozen=True)
class FoundCheckpoint:
    """A packed checkpoint's folder and what is known of the run that made it."""

    folder: Path
    record: RunRecord


def find(name: str, store: RunStore) -> FoundCheckpoint:
    """The checkpoint that ``name`` means: its folder, a run's folder or id, or "shipped", the one that comes with the
    project. Raises RunError, CheckpointError."""
    folder = Path(name).expanduser()
    if is_checkpoint(folder):
        return FoundCheckpoint(folder, read_record(folder))
    if name == SHIPPED:
        folder = shipped_checkpoint()
        return FoundCheckpoint(folder, read_record(folder))
    try:
        # Both names of a run's folder lead to its id; that of another store is no name of ours.
        run = store.get(folder.name if folder.resolve().parent == store.root else name)
    except RunError:
        if folder.is_dir():
            raise CheckpointError(
                f"{name} is no packed checkpoint and no run's folder; give the folder that `quantize --out` wrote"
            ) from None
        raise RunError(
            f"{name!r} is neither a packed checkpoint's folder nor a run in {store.root}; `python -m lbllm runs list` "
            f"shows the runs, {SHIPPED!r} is the checkpoint that comes with the project"
        ) from None
    if run.state != "done":
        raise RunError(f"run {run.id} is {run.state}; only a finished run has a checkpoint to export")
    checkpoint = run.folder / "checkpoint"
    if not is_checkpoint(checkpoint):
        raise CheckpointError(f"run {run.id} is done, but its checkpoint {checkpoint} is gone; export a copy of it")
    events = (stored.event for stored in store.events(run.id, kinds=("evaluated",)))
    measured = [event for event in events if isinstance(event, Evaluated)]
    return FoundCheckpoint(checkpoint, read_record(checkpoint).with_evaluations(measured, run.id))
