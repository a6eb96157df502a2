"""Stored evaluations: one folder each, and a process of its own that works on it. Many processes use them at once.

    root/<id>/job.json        what is measured
    root/<id>/alive.lock      locked as long as the evaluation's worker lives
    root/<id>/progress.json   how far it is; not there while it waits for its turn
    root/<id>/cancel          somebody asked it to end
    root/<id>/end.json        how the last worker ended
    root/<id>/worker.log      what it printed
    root/<id>/...             finished parts, see ``lbllm.evaluation.parts``

The state follows from these files. The kernel drops the lock with the process, however that ends: an evaluation whose
worker was killed is interrupted, and goes on after its finished parts when it is continued.

Evaluations and runs take turns on a device (``lbllm.runs.turn``): two at once would slow each other down.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from lbllm.errors import ConfigError, RunError
from lbllm.files import is_held, try_lock, write_errors, write_file
from lbllm.json_input import decode_object
from lbllm.places import home
from lbllm.starting import start_worker

if TYPE_CHECKING:
    from lbllm.evaluation.job import EvaluationJob

State = Literal["queued", "running", "done", "cancelled", "failed", "interrupted"]
ACTIVE: tuple[State, ...] = ("queued", "running")
_ENDS: tuple[State, ...] = ("done", "cancelled", "failed")
_LARGEST_JOB = 20_000_000  # bytes of job.json
_LARGEST_STATE = 100_000
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


@dataclass(frozen=True)
class Progress:
    """How far a worker is: ``done`` of ``total`` units, of which ``before`` were finished when it began ``started``
    (seconds since the epoch); ``what`` it does."""

    what: str
    done: int
    total: int
    before: int
    started: float

    @property
    def share(self) -> float:
        """The finished share, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def seconds_left(self, now: float) -> float | None:
        """About how many seconds it still takes, at the pace so far; None before there is anything to go by."""
        made = self.done - self.before
        if made <= 0 or self.total <= self.done:
            return None
        return max(1.0, (now - self.started) / made * (self.total - self.done))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it was when it was read. ``message``: why it failed, or what of it could not be measured."""

    id: str
    folder: Path
    state: State
    progress: Progress | None
    message: str

    @property
    def created(self) -> float:
        """When it was made, in seconds since the epoch."""
        return time.mktime(time.strptime(self.id[:15], "%Y%m%d-%H%M%S"))

    @property
    def job(self) -> EvaluationJob:
        """What is measured. Raises ConfigError if the file is gone or damaged."""
        from lbllm.evaluation.job import read_job  # late: a waiting worker needs neither torch nor its memory

        path = self.folder / "job.json"
        try:
            with path.open("rb") as file:
                return read_job(file.read(_LARGEST_JOB))
        except OSError as error:
            raise ConfigError(f"{path} can't be read ({error.strerror}); delete this evaluation") from None
        except ConfigError as error:
            raise ConfigError(f"{path} {error}; delete this evaluation") from None

    @property
    def can_continue(self) -> bool:
        """Whether something is left to be measured and nobody works on it."""
        return self.state in ("cancelled", "failed", "interrupted") or (self.state == "done" and bool(self.message))

    @property
    def is_ending(self) -> bool:
        """Whether its worker was asked to end and has not yet."""
        return self.state in ACTIVE and (self.folder / "cancel").exists()


class EvaluationStore:
    """The evaluations under ``root``, by default ``home() / "evaluations"``. Any process may have a store; it holds
    nothing.

    Raises RunError for an unknown id, ResourceError where the folder can't be written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home() / "evaluations").resolve()

    def create(self, job: EvaluationJob) -> Evaluation:
        """Store a new evaluation; ``start`` puts it into the queue."""
        with write_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
            folder = self.root / name
            folder.mkdir()
            write_file(folder / "job.json", (job.model_dump_json(indent=1) + "\n").encode())
        return self.get(name)

    def get(self, name: str) -> Evaluation:
        """The evaluation with this id, as it is now."""
        folder = self.root / name
        if not _ID.fullmatch(name) or not folder.is_dir():
            raise RunError(f"no evaluation {name[:100]!r} in {self.root}")
        progress = _progress(folder)
        if is_held(folder / "alive.lock"):
            return Evaluation(name, folder, "running" if progress is not None else "queued", progress, "")
        end = _read(folder / "end.json")
        state: State = next((one for one in _ENDS if one == end.get("state")), "interrupted")
        message = end.get("message")
        return Evaluation(name, folder, state, progress, message if isinstance(message, str) else "")

    def all(self) -> list[Evaluation]:
        """All evaluations, oldest first."""
        try:
            names = sorted(path.name for path in self.root.iterdir() if _ID.fullmatch(path.name) and path.is_dir())
        except OSError:
            return []
        return self.those(names)

    def those(self, names: Iterable[str]) -> list[Evaluation]:
        """The evaluations with these ids that are still there, in this order."""
        found = []
        for name in names:
            try:
                found.append(self.get(name))
            except RunError:  # deleted meanwhile
                continue
        return found

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Put an evaluation into the queue: a new one, or one that ended early, whose finished parts stay.

        Raises RunError if it has a worker or nothing is left to do.
        """
        folder = self.get(name).folder
        with self.enqueue(name) as lock:
            return start_worker("lbllm.evaluation", folder, lock)

    def enqueue(self, name: str) -> IO[bytes]:
        """Lock an evaluation for a new worker; the lock lasts as long as the file is open."""
        folder = self.get(name).folder
        with write_errors(folder):
            lock = try_lock(folder / "alive.lock")
        if lock is None:
            raise RunError(f"evaluation {name} is at work or waits for its turn")
        end = _read(folder / "end.json")
        if end.get("state") == "done" and not end.get("message"):
            lock.close()
            raise RunError(f"evaluation {name} is done; start a new one to measure again")
        with write_errors(folder):
            for file in ("end.json", "progress.json", "cancel"):
                (folder / file).unlink(missing_ok=True)
        return lock

    def cancel(self, name: str) -> None:
        """Ask a queued or running evaluation to end; what is finished stays. Raises RunError in any other state."""
        found = self.get(name)
        if found.state not in ACTIVE:
            raise RunError(f"evaluation {name} is {found.state}; only one that waits or works can be cancelled")
        with write_errors(found.folder):
            write_file(found.folder / "cancel", b"")

    def delete(self, name: str) -> None:
        """Remove an evaluation with its results. Raises RunError while it has a worker."""
        folder = self.get(name).folder
        with write_errors(folder):
            lock = try_lock(folder / "alive.lock")
            if lock is None:
                raise RunError(f"evaluation {name} is at work; cancel it first")
            with lock:
                gone = folder.with_name(f".{name}.deleted")
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def write_progress(folder: Path, progress: Progress) -> None:
    """Write how far a worker is. A full disk only hides it."""
    try:
        write_file(folder / "progress.json", json.dumps(vars(progress)).encode())
    except OSError:
        return


def write_end(folder: Path, state: State, message: str = "") -> None:
    """Write how a worker ended. Raises ResourceError."""
    with write_errors(folder):
        write_file(folder / "end.json", json.dumps({"state": state, "message": message}).encode())


def _progress(folder: Path) -> Progress | None:
    try:
        return Progress(**_read(folder / "progress.json"))
    except TypeError:
        return None


def _read(path: Path) -> dict[str, Any]:
    """A small JSON object that a worker wrote; empty if it is not there or damaged."""
    try:
        return decode_object(path.read_bytes(), largest=_LARGEST_STATE)
    except (OSError, ValueError):
        return {}
