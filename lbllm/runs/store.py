"""The run store: runs and their events in one SQLite file, and one folder a run. Many processes use it at once.

    root/runs.db              names, dates, notes and events; votes on pairs of answers
    root/worker*.lock         one a device, locked by the worker whose turn it is (``runs/turn.py``)
    root/<run id>/            config.json, blocks/, checkpoint/, worker.log
    root/<run id>/alive.lock  locked as long as the run's worker lives
    root/<run id>/request     "stop" or "cancel", until the run is resumed
    root/<run id>/failure     why the run's last worker ended, where the store could not take that or the run is
                              interrupted
    root/<run id>/processes   how many processes the run was last started with
    root/deleted/<run id>/    the folder of a deleted run, which can be brought back (``runs/deleted.py``)

A reader follows a run by ``events(run_id, after_seq)`` and holds nothing but that number. The state of a run is stored
nowhere: it follows from the last of its ``LIFECYCLE`` events and from whether a worker holds the run's lock. The kernel
drops the lock with the process, however that ends, so a worker killed by ``kill -9`` is noticed at once.

An event or a run's row that can't be read is left out with a warning, so that it hides nothing else. A damaged file is
made anew (``runs/repair.py``).
"""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from lbllm.config import RunConfig, read_config
from lbllm.errors import ConfigError, RunError
from lbllm.events import EVENT, Acknowledged, Event, RunDone, RunFailed, RunQueued, RunStopped, StoredEvent
from lbllm.files import is_held, try_lock, write_errors, write_file
from lbllm.json_input import replaced
from lbllm.places import home
from lbllm.runs.database import IS_LIFECYCLE, KIND, LIFECYCLE, Database
from lbllm.runs.repair import DELETED, RUN_ID
from lbllm.runs.turn import write_processes
from lbllm.starting import start_worker

Request = Literal["stop", "cancel"]
State = Literal["queued", "running", "done", "stopped", "cancelled", "failed", "interrupted"]
ACTIVE: tuple[State, ...] = ("queued", "running")
RESUMABLE: tuple[State, ...] = ("stopped", "failed", "interrupted")
# Bytes for a last message, written before the work begins: to write over them needs no space on a full disk.
_LAST_WORDS = 4096
# Runs that can be deleted; a queued one only if it has no worker.
DELETABLE: tuple[State, ...] = ("queued", "done", "cancelled", *RESUMABLE)


@dataclass(frozen=True)
class Run:
    """A run as it was when it was read from the store.

    ``created``: seconds since the epoch. ``cwd``: where relative paths of its settings begin, for each of its workers.
    """

    id: str
    name: str
    folder: Path
    created: float
    cwd: Path
    state: State

    @property
    def is_missing(self) -> bool:
        """Whether somebody has moved or removed the run's folder, and with it settings, blocks and checkpoint."""
        return not self.folder.is_dir()

    @cached_property
    def config(self) -> RunConfig:
        """The run's settings, from its folder. Raises RunError where the file is gone or damaged."""
        path = self.folder / "config.json"
        try:
            return read_config(path)
        except (OSError, ConfigError) as error:
            raise RunError(f"run {self.id}: its settings can't be read from {path} ({error})") from error

    @property
    def can_be_resumed(self) -> bool:
        """Whether the run ended early, or its starter died before the run had a worker."""
        return self.state in RESUMABLE or (self.state == "queued" and not is_held(self.folder / "alive.lock"))

    @property
    def failure(self) -> str | None:
        """Why the run's last worker ended, where its last event doesn't say that."""
        try:
            with (self.folder / "failure").open("rb") as file:
                return file.read(_LAST_WORDS).decode("utf-8", "replace").strip(" \0\n") or None
        except OSError:
            return None

    def keep_failure(self, message: str) -> None:
        """Keep a worker's last message where it needs no further space. Raises OSError."""
        data = message.encode("utf-8", "replace")[: _LAST_WORDS - 1]
        with (self.folder / "failure").open("r+b") as file:
            file.write(data.ljust(_LAST_WORDS - 1) + b"\n")
            os.fsync(file.fileno())


def _at_rest(last: Event | None) -> State:
    """The state of a run that has no worker, from the last event of its lifecycle."""
    match last:
        case None:
            return "queued"
        case RunDone():
            return "done"
        case RunStopped(request="stop"):
            return "stopped"
        case RunStopped():
            return "cancelled"
        case RunFailed():
            return "failed"
        case _:
            return "interrupted"


class RunStore:
    """The runs under ``root``, by default ``home() / "runs"``.

    Threads may share a store; each process opens its own. Raises RunError where the file is damaged or of another
    version; ResourceError, from every method that writes, where it can't be written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home() / "runs").resolve()
        self.database = Database(self.root)

    def close(self) -> None:
        """Close the database; the store can't be used afterwards."""
        self.database.close()

    def create(self, config: RunConfig, name: str | None = None) -> Run:
        """A new run, queued until ``start``. ``name`` is for people; by default model, format and group size."""
        name = replaced(name or config.run_name)
        created = time.time()
        run_id = time.strftime("%Y%m%d-%H%M%S-", time.localtime(created)) + secrets.token_hex(3)
        folder = self.root / run_id
        with self.database.transaction() as db:
            cwd = replaced(str(Path.cwd()))
            db.execute("INSERT INTO runs (id, name, created, cwd) VALUES (?, ?, ?, ?)", (run_id, name, created, cwd))
            folder.mkdir()
            try:
                write_file(folder / "config.json", (config.model_dump_json(indent=2) + "\n").encode())
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return self.get(run_id)

    def get(self, run_id: str) -> Run:
        """The run as it is now. Raises RunError where there is none of that id, or where it was deleted."""
        row = self.database.query("SELECT id, name, created, cwd FROM runs WHERE id = ?", run_id)
        if not row:
            raise RunError(f"no run {run_id!r} in {self.root}")
        if run_id in self._deleted():
            raise RunError(f"run {run_id} was deleted; `python -m lbllm runs restore {run_id}` brings it back")
        return self._run(*row[0])

    def all(self) -> list[Run]:
        """All runs, oldest first, without the deleted ones."""
        deleted = self._deleted()
        return [self._run(*row) for row in self._rows() if row[0] not in deleted]

    def _rows(self) -> list[tuple[str, str, float, str]]:
        """Id, name, date and working folder of all runs, oldest first."""
        found = []
        for row in self.database.query("SELECT id, name, created, cwd FROM runs ORDER BY created, id"):
            # The id is the name of a folder: no other folder may be reached by it.
            if isinstance(row[0], str) and RUN_ID.fullmatch(row[0]):
                found.append(row)
            else:
                self.database.warn_once(f"{self.database.path}: a run has the id {row[0]!r} and is left out")
        return found

    def deleted(self) -> list[Run]:
        """The deleted runs, oldest first, with the folders where they are now."""
        deleted = self._deleted()
        found = [self._run(*row) for row in self._rows() if row[0] in deleted]
        return [replace(run, folder=self.root / DELETED / run.id) for run in found]

    def _deleted(self) -> set[str]:
        """The ids of deleted runs: the move of its folder is what deletes a run."""
        try:
            return {path.name for path in (self.root / DELETED).iterdir()}
        except OSError:
            return set()

    def rename(self, run_id: str, name: str) -> Run:
        """Give a run another name. Raises RunError where it is empty."""
        name = " ".join(name.split())
        if not name:
            raise RunError(f"run {run_id}: a name needs at least one letter or digit")
        self.get(run_id)
        with self.database.transaction() as db:
            db.execute("UPDATE runs SET name = ? WHERE id = ?", (name, run_id))
        return self.get(run_id)

    def delete(self, run_id: str) -> None:
        """Move a run's folder to root/deleted: ``all`` and ``get`` no longer find the run.

        Raises RunError while a worker has it, ResourceError where the folder can't be moved.
        """
        run = self.get(run_id)
        with write_errors(self.root):
            (self.root / DELETED).mkdir(exist_ok=True)
            if run.is_missing and run.state not in ACTIVE:
                (self.root / DELETED / run_id).mkdir()
                return
        with self._claim(run_id, "deleted", DELETABLE), write_errors(self.root):
            run.folder.rename(self.root / DELETED / run_id)

    def append(self, run_id: str, event: Event) -> StoredEvent:
        """Add an event to a run; it is on record when this returns. Any process may do it."""
        try:
            with self.database.transaction() as db:
                (last,) = db.execute("SELECT MAX(seq) FROM events WHERE run_id = ?", (run_id,)).fetchone()
                stored = StoredEvent(seq=(last or 0) + 1, time=time.time(), event=event)
                db.execute(
                    "INSERT INTO events (run_id, seq, time, body) VALUES (?, ?, ?, ?)",
                    (run_id, stored.seq, stored.time, event.model_dump_json()),
                )
        except sqlite3.IntegrityError:
            raise RunError(f"no run {run_id!r} in {self.root}") from None
        return stored

    def events(self, run_id: str, after_seq: int = 0, kinds: tuple[str, ...] = ()) -> list[StoredEvent]:
        """The run's events with a ``seq`` greater than ``after_seq``, in order; ``kinds``: of these alone, if any.

        Raises RunError for an unknown run.
        """
        query = "SELECT seq, time, body FROM events WHERE run_id = ? AND seq > ?"
        if kinds:
            query += f" AND {KIND} IN ({', '.join('?' * len(kinds))})"
        rows = self.database.query(f"{query} ORDER BY seq", run_id, after_seq, *kinds)
        if not rows and not self.database.query("SELECT 1 FROM runs WHERE id = ?", run_id):
            raise RunError(f"no run {run_id!r} in {self.root}")
        return [stored for row in rows if (stored := self._stored(run_id, *row)) is not None]

    def _stored(self, run_id: str, seq: int, moment: float, body: str) -> StoredEvent | None:
        """The event of a row; None, with a warning, if it can't be read."""
        try:
            return StoredEvent(seq=seq, time=moment, event=EVENT.validate_json(body))
        except (ValidationError, TypeError, ValueError):
            self.database.warn_once(
                f"{self.database.path}: some events of run {run_id} are left out, because they are damaged or from a "
                "later version"
            )
            return None

    def follow(self, run_id: str, after_seq: int = 0, poll: float = 0.1) -> Iterator[StoredEvent]:
        """The events after ``after_seq`` and those to come, until the run is neither queued nor running."""
        while True:
            # The state first: what was written before the end is then among the events read after it.
            over = self.get(run_id).state not in ACTIVE
            for stored in self.events(run_id, after_seq):
                after_seq = stored.seq
                yield stored
            if over:
                return
            time.sleep(poll)

    def start(self, run_id: str, processes: int = 1) -> subprocess.Popen[bytes]:
        """Start the worker of a new run, detached from this process. Raises RunError where the run isn't new.

        ``processes``: how many share the work; on GPUs each has one of its own. Results are the same to rounding.
        """
        return self._spawn(run_id, "started", ("queued",), processes)

    def resume(self, run_id: str, processes: int | None = None) -> subprocess.Popen[bytes]:
        """Start a worker that goes on from the finished blocks; ``processes``: None for as many as the last time.

        Raises RunError, naming the state, unless the run is stopped, failed or interrupted, or queued without a worker,
        as a run is whose starter was killed.
        """
        return self._spawn(run_id, "resumed", (*RESUMABLE, "queued"), processes)

    def request(self, run_id: str, request: Request) -> None:
        """Ask a queued or running run to stop, its finished blocks kept, or to cancel, which deletes them.

        The worker answers by Acknowledged at once and by RunStopped when it has ended. A run without a worker ends here
        and now; stopped, failed and interrupted runs can still be cancelled. Raises RunError in any other state.
        """
        run = self.get(run_id)
        if run.state == "running" or (run.state == "queued" and is_held(run.folder / "alive.lock")):
            write_file(run.folder / "request", request.encode())
            return
        allowed: tuple[State, ...] = ("queued", *RESUMABLE) if request == "cancel" else ("queued",)
        verb = "cancelled" if request == "cancel" else "stopped"
        with self._claim(run_id, verb, allowed):
            self.append(run_id, Acknowledged(request=request))
            self.end(run_id, request)

    def end(self, run_id: str, request: Request) -> None:
        """Put the end on request on record, after deleting the finished blocks where it is ``cancel``."""
        blocks = self.root / run_id / "blocks"
        if request == "cancel" and blocks.exists():
            shutil.rmtree(blocks)
        self.append(run_id, RunStopped(request=request))

    def enqueue(self, run_id: str, verb: str, allowed: tuple[State, ...]) -> IO[bytes]:
        """Lock a run for a new worker and put it on record as queued. The lock lasts as long as the file is open.

        Raises RunError, worded with the participle ``verb``, where the run's state is none of ``allowed``.
        """
        lock = self._claim(run_id, verb, allowed)
        folder = self.root / run_id
        try:
            with write_errors(folder):
                (folder / "request").unlink(missing_ok=True)
                write_file(folder / "failure", b" " * (_LAST_WORDS - 1) + b"\n")
            self.append(run_id, RunQueued())
        except BaseException:
            lock.close()
            raise
        return lock

    def _claim(self, run_id: str, verb: str, allowed: tuple[State, ...]) -> IO[bytes]:
        run = self.get(run_id)
        if not run.folder.is_dir():
            raise RunError(f"run {run_id} can't be {verb}: its folder {run.folder} is gone; start a new run")
        with write_errors(run.folder):
            lock = try_lock(run.folder / "alive.lock")
        # With the lock in our hands nobody else changes the state; without it, a worker has just taken it.
        state = self.get(run_id).state if lock is None else _at_rest(self._last(run_id)[1])
        if lock is not None and state in allowed:
            return lock
        if lock is None:
            raise RunError(f"run {run_id} is {state} and can't be {verb}: it has a worker")
        lock.close()
        raise RunError(f"run {run_id} is {state} and can't be {verb}; only {', '.join(allowed)} runs can")

    def _spawn(
        self, run_id: str, verb: str, allowed: tuple[State, ...], processes: int | None
    ) -> subprocess.Popen[bytes]:
        folder = self.root / run_id
        with self.enqueue(run_id, verb, allowed) as lock:
            if processes is not None:
                write_processes(folder, processes)
            return start_worker("lbllm.worker", folder, lock)

    def _run(self, run_id: str, name: object, created: object, cwd: object) -> Run:
        # Of a damaged row, what can't be used is replaced: the run is still listed.
        named = name if isinstance(name, str) else "name can't be read"
        since = created if isinstance(created, float | int) and abs(created) < 1e11 else 0.0
        place = Path(cwd) if isinstance(cwd, str) else self.root
        return Run(run_id, named, self.root / run_id, since, place, self._state(run_id))

    def _state(self, run_id: str) -> State:
        while True:
            seq, last = self._last(run_id)
            state = _at_rest(last)
            if state != "interrupted":
                return state
            if is_held(self.root / run_id / "alive.lock"):
                return "queued" if isinstance(last, RunQueued) else "running"
            # No worker, but it may have ended, or a new one begun, since the event was read.
            if self._last(run_id)[0] == seq:
                return "interrupted"

    def _last(self, run_id: str) -> tuple[int, Event | None]:
        """The last event of the run's lifecycle that can be read, and its ``seq``; (0, None) before the first. If none
        can be read, the run is taken for a queued one."""
        query = f"SELECT seq, time, body FROM events INDEXED BY lifecycle WHERE run_id = ? AND {IS_LIFECYCLE}"
        rows = self.database.query(f"{query} ORDER BY seq DESC LIMIT 1", run_id)
        if not rows:
            return 0, None
        last = self._stored(run_id, *rows[0])
        if last is not None:
            return last.seq, last.event
        # Without the index, which is as old as the rows were when they were written.
        query = f"SELECT seq, time, body FROM events WHERE run_id = ? AND {KIND} IN {LIFECYCLE} ORDER BY seq DESC"
        for row in self.database.query(query, run_id):
            last = self._stored(run_id, *row)
            if last is not None:
                return last.seq, last.event
        return rows[0][0], RunQueued()
