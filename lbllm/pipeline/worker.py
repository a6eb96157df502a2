"""The process that trains: ``python -m lbllm.worker RUN_DIR``. It is started by ``RunStore.start`` and ``resume``.

Runs of one store train one after another: a worker waits until it holds the store's ``worker.lock``, runs the
pipeline and appends each of its events. A thread watches for requests to stop or cancel, from the run's folder or as
SIGTERM and SIGINT, and acknowledges them at once, however long the pipeline's current step takes. Exit code: 0 when the
run is done, stopped or cancelled, 1 when it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import sqlite3
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType

from lbllm import memory
from lbllm.config import RunConfig, setting_name
from lbllm.errors import LbllmError
from lbllm.events import Acknowledged, Event, RunDone, RunFailed, RunLoading, RunStopped
from lbllm.runs.store import RESUMABLE, Request, Run, RunStore

POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The third is how torch.save words a write that came out short.
DISK_FULL_SIGNS = ("No space left on device", "File too large", "unexpected pos")


class Requests:
    """Notices requests to stop or cancel one run and acknowledges each. A context manager of the main thread.

    The first of two requests isn't the last word: after ``stop`` the run can still be cancelled.
    """

    def __init__(self, store: RunStore, run: Run) -> None:
        self.pending: Request | None = None
        self._store = store
        self._run = run
        self._over = threading.Event()
        # Python runs signal handlers between two steps of the main thread, which a long tensor operation puts off. The
        # byte that the interpreter writes into a socket at the signal itself wakes the watching thread at once.
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="requests", daemon=True)

    def __enter__(self) -> Requests:
        for socket_ in (self._wake, self._woken):
            socket_.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        signal.set_wakeup_fd(-1)
        self._wake.close()
        self._woken.close()

    def close(self) -> None:
        """Stop watching: nothing is acknowledged after this returns."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            request = self._asked()
            if request is None or request == self.pending or self.pending == "cancel":
                continue
            # A store that can't be written (a full disk) mustn't keep the run from ending.
            with contextlib.suppress(LbllmError, sqlite3.Error):
                self._store.append(self._run.id, Acknowledged(request=request))
            self.pending = request

    def _asked(self) -> Request | None:
        """Wait up to ``POLL_SECONDS``; what is asked for now, by a signal or in the folder."""
        signalled = False
        if select.select([self._woken], [], [], POLL_SECONDS)[0]:
            signalled = any(number in STOP_SIGNALS for number in self._woken.recv(64))
        try:
            written = (self._run.folder / "request").read_text()
        except OSError:
            written = ""
        if written == "cancel":
            return "cancel"
        return "stop" if signalled or written == "stop" else None


def failure_message(error: Exception, config: RunConfig, folder: Path) -> str:
    """What a user is told about an exception that ended a run: what happened, where, and what to do."""
    if isinstance(error, LbllmError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    # torch and safetensors report both as exceptions of their own kinds, known by their text alone.
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return (
            f"memory doesn't suffice ({text.splitlines()[0]}). Finished blocks are kept: free some memory and resume, "
            f"or make a new run with less text, now {config.tokens} tokens, or lower values of "
            f"{setting_name('seq_len')}, now {config.seq_len}, "
            f"{setting_name('wat.batch_tokens')}, now {config.wat.batch_tokens}, or "
            f"{setting_name('aar.batch_tokens')}, now {config.aar.batch_tokens}"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(sign in text for sign in DISK_FULL_SIGNS):
        return (
            f"no space left for the run's files in {folder} ({text}). Finished blocks are kept: free some space there "
            "and resume the run"
        )
    return f"{text} (traceback in {folder / 'worker.log'}). Finished blocks are kept: the run can be resumed"


def wait_for_turn(lock: int, requests: Requests) -> bool:
    """Wait for the exclusive lock on the open file ``lock``; False where a request came first."""
    # The kernel's own queue keeps the order of waiting workers, roughly; polling wouldn't.
    waiting = threading.Thread(target=fcntl.flock, args=(lock, fcntl.LOCK_EX), daemon=True)
    waiting.start()
    while waiting.is_alive() and requests.pending is None:
        waiting.join(POLL_SECONDS)
    return requests.pending is None


def work(store: RunStore, run: Run) -> int:
    """Wait for the run's turn, take it to its end, and return the exit code."""

    def record(event: Event) -> None:
        if isinstance(event, RunDone | RunStopped | RunFailed):
            requests.close()
        if isinstance(event, RunStopped):
            store.end(run.id, requests.pending or event.request)
        else:
            store.append(run.id, event)

    # Closed by the end of the process alone: until then its memory isn't free for the next run.
    turn = os.open(store.root / "worker.lock", os.O_RDWR | os.O_CREAT, 0o666)
    with Requests(store, run) as requests:
        try:
            if not wait_for_turn(turn, requests):
                record(RunStopped(request=requests.pending or "stop"))
                return 0
            record(RunLoading())
            # It may have been resumed from anywhere. Where the folder is gone, a relative path fails by its name.
            if run.cwd.is_dir():
                os.chdir(run.cwd)
            memory.keep_large_allocations()
            from lbllm.pipeline import run as pipeline  # late: a waiting worker needs neither torch nor its memory

            for event in pipeline.run(run.config, run.folder, request=lambda: requests.pending):
                record(event)
        except Exception as error:
            # On a full disk neither the log nor the store may take any more; the state is then "interrupted".
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
            with contextlib.suppress(LbllmError, sqlite3.Error):
                record(RunFailed(message=failure_message(error, run.config, run.folder)))
            return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lbllm.worker", description="Train one run to its end.")
    parser.add_argument("folder", type=Path, help="the run's folder in its store")
    parser.add_argument("--lock", type=int, help="the open, locked file of the run, inherited from who queued it")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    try:
        store = RunStore(folder.parent)
        if options.lock is None:
            alive = store.enqueue(folder.name, "run", ("queued", *RESUMABLE))
        else:
            # Not for this process's children: the lock has to end with it.
            os.set_inheritable(options.lock, False)
            alive = os.fdopen(options.lock, "ab")
        with alive:
            return work(store, store.get(folder.name))
    except LbllmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
