"""What can be done with a deleted run: bring it back, or remove it for good.

``RunStore.delete`` only moves a run's folder to root/deleted; its events stay in the store.
"""

from __future__ import annotations

import shutil

from lbllm.errors import RunError
from lbllm.files import write_errors
from lbllm.runs.repair import DELETED
from lbllm.runs.store import Run, RunStore


def restore(store: RunStore, run_id: str) -> Run:
    """Bring a deleted run back. Raises RunError where it isn't deleted or where its place is taken, ResourceError."""
    run = _deleted(store, run_id)
    place = store.root / run_id
    if place.exists():
        raise RunError(f"run {run_id} can't be brought back: {place} exists; move it away")
    with write_errors(store.root):
        if any(run.folder.iterdir()):
            run.folder.rename(place)
        else:  # its folder was missing when it was deleted
            run.folder.rmdir()
    return store.get(run_id)


def remove(store: RunStore, run_id: str) -> None:
    """Remove a deleted run for good: its folder and its events. Raises RunError where it isn't deleted, ResourceError.

    The folder itself goes last: until then the run counts as deleted, and removing it can be repeated. Of a folder that
    is a link only the link is removed.
    """
    folder = _deleted(store, run_id).folder
    with write_errors(store.root):
        for path in () if folder.is_symlink() else folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with store.database.transaction() as db:
            db.execute("DELETE FROM events WHERE run_id = ?", (run_id,))
            db.execute("DELETE FROM runs WHERE id = ?", (run_id,))
        if folder.is_symlink():
            folder.unlink()
        else:
            folder.rmdir()


def _deleted(store: RunStore, run_id: str) -> Run:
    for run in store.deleted():
        if run.id == run_id:
            return run
    raise RunError(f"run {run_id!r} is not among the deleted runs in {store.root / DELETED}")
