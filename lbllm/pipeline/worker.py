"""The process that trains a run: ``python -m lbllm.worker RUN_DIR``. ``RunStore.start`` and ``resume`` start it.

The runs of a store train one after another: a worker waits for the store's ``worker.lock``, runs the pipeline and
stores each of its events. A thread watches for requests to stop or cancel, in the run's folder or as SIGTERM and
SIGINT, and acknowledges them at once, even during a long step of the pipeline. Exit code: 0 if the run is done, stopped
or cancelled, 1 if it failed.
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
from lbllm.json_input import replaced
from lbllm.runs.store import RESUMABLE, Request, Run, RunStore

POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torch.save reports an incomplete write with the third message.
DISK_FULL_SIGNS = ("No space left on device", "File too large", "unexpected pos")


class Requests:
    """Watches for requests to stop or cancel one run and acknowledges them. A context manager for the main thread.

    After ``stop`` the run can still be cancelled.
    """

    def __init__(self, store: RunStore, run: Run) -> None:
        self.pending: Request | None = None
        self._store = store
        self._run = run
        self._over = threading.Event()
        # A long tensor operation in the main thread delays Python's signal handlers. But the interpreter writes a byte
        # into a socket as soon as the signal arrives, which wakes the watching thread at once.
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
        """Stop watching; after this call no request is acknowledged."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            request = self._asked()
            if request is None or request == self.pending or self.pending == "cancel":
                continue
            # The run must end even if the store can't be written (full disk).
            with contextlib.suppress(LbllmError, sqlite3.Error):
                self._store.append(self._run.id, Acknowledged(request=request))
            self.pending = request

    def _asked(self) -> Request | None:
        """Wait up to ``POLL_SECONDS`` for a signal; return the present request, from a signal or the folder."""
        signalled = False
        if select.select([self._woken], [], [], POLL_SECONDS)[0]:
            signalled = any(number in STOP_SIGNALS for number in self._woken.recv(64))
        try:
            with (self._run.folder / "request").open("rb") as file:
                written = file.read(64).strip()
        except OSError:
            written = b""
        if written == b"cancel":
            return "cancel"
        return "stop" if signalled or written == b"stop" else None


def failure_message(error: Exception, config: RunConfig, folder: Path) -> str:
    """Return the message for an exception that ended a run: what happened, where, and what the user can do."""
    if isinstance(error, LbllmError):
        return replaced(str(error))
    text = replaced(f"{type(error).__name__}: {error}")
    # torch and safetensors report a lack of memory or disk space with other exceptions; only their text tells.
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return (
            f"not enough memory ({text.splitlines()[0]}). Finished blocks are kept: free some memory and resume, "
            f"or start a new run with less text, now {config.tokens} tokens, or lower values of "
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
    """Wait for the exclusive lock on the open file ``lock``; return False if a request came first."""
    # The kernel's queue roughly keeps the order of waiting workers; polling would not.
    waiting = threading.Thread(target=fcntl.flock, args=(lock, fcntl.LOCK_EX), daemon=True)
    waiting.start()
    while waiting.is_alive() and requests.pending is None:
        waiting.join(POLL_SECONDS)
    return requests.pending is None


def work(store: RunStore, run: Run) -> int:
    """Wait for the run's turn, train it to its end, and return the exit code."""

    def record(event: Event) -> None:
        if isinstance(event, RunDone | RunStopped | RunFailed):
            requests.close()
        if isinstance(event, RunStopped):
            store.end(run.id, requests.pending or event.request)
        else:
            store.append(run.id, event)

    # The lock is released when the process ends: only then is its memory free for the next run.
    turn = os.open(store.root / "worker.lock", os.O_RDWR | os.O_CREAT, 0o666)
    config: RunConfig | None = None
    with Requests(store, run) as requests:
        try:
            if not wait_for_turn(turn, requests):
                record(RunStopped(request=requests.pending or "stop"))
                return 0
            config = run.config  # before the state becomes "running"
            record(RunLoading())
            # The run may have been resumed from another folder. If its own folder is gone, relative paths fail with a
            # clear error.
            if run.cwd.is_dir():
                os.chdir(run.cwd)
            memory.keep_large_allocations()
            from lbllm.pipeline import run as pipeline  # late: a waiting worker needs neither torch nor its memory

            for event in pipeline.run(config, run.folder, request=lambda: requests.pending):
                record(event)
        except Exception as error:
            # On a full disk, writing to the log and the store may fail.
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
            # An error before the settings are known does not depend on them.
            message = failure_message(error, config or RunConfig(), run.folder)
            try:
                record(RunFailed(message=message))
            except (LbllmError, sqlite3.Error):  # the state is then "interrupted"
                with contextlib.suppress(OSError):
                    run.keep_failure(message)
            return 1
    return 0


def main() -> int:
    """Train the run of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm.worker", description="Train one run to its end.")
    parser.add_argument("folder", type=Path, help="the run's folder in its store")
    parser.add_argument(
        "--lock", type=int, help="the run's open, locked file, inherited from the process that queued it"
    )
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    try:
        store = RunStore(folder.parent)
        if options.lock is None:
            alive = store.enqueue(folder.name, "run", ("queued", *RESUMABLE))
        else:
            # Child processes must not inherit the file: the lock has to end with this process.
            os.set_inheritable(options.lock, False)
            alive = os.fdopen(options.lock, "ab")
        with alive:
            return work(store, store.get(folder.name))
    except LbllmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
