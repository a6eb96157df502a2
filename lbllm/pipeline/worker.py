"""The process that trains a run: ``python -m lbllm.worker RUN_DIR``. ``RunStore.start`` and ``resume`` start it.

A worker waits until a device is free (``runs/turn.py``), runs the pipeline and stores each of its events. A thread
watches for requests to stop or cancel, in the run's folder or as SIGTERM and SIGINT, and acknowledges them at once,
even during a long step of the pipeline. Exit code: 0 if the run is done, stopped or cancelled, 1 if it failed.

A run can be shared by several processes, its ranks. ``RunStore.start(run, processes=2)`` starts one worker, which waits
for the devices and then starts the ranks by ``accelerate launch``. By hand:

    accelerate launch --multi_gpu --num_processes 2 -m lbllm.worker RUN_DIR    # also on a CPU
    torchrun --nproc-per-node 2 -m lbllm.worker RUN_DIR

Rank 0 then does what a worker does, and the others wait until its turn has come. Rank 0 alone writes. If a rank dies,
the others end too: the run is interrupted and can be resumed on any number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from lbllm import memory
from lbllm.config import RunConfig, setting_name
from lbllm.errors import LbllmError
from lbllm.events import Acknowledged, Event, RunDone, RunFailed, RunLoading, RunStopped
from lbllm.files import is_held, write_file
from lbllm.json_input import replaced
from lbllm.runs.store import RESUMABLE, Request, Run, RunStore
from lbllm.runs.turn import Turn, read_processes, visible_gpus

POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How long a rank that failed waits before it ends: rank 0 has mostly met the same error and first puts it on record.
LAST_SECONDS = 3.0
# How long a rank waits for rank 0 to begin.
START_SECONDS = 600.0
# torch.save reports an incomplete write with the third message.
DISK_FULL_SIGNS = ("No space left on device", "File too large", "unexpected pos")
GPU_SIGNS = ("CUDA error", "CUDA driver error", "HIP error", "NCCL error", "ECC error")


class Requests:
    """Watches for requests to stop or cancel one run and acknowledges them. A context manager for the main thread.

    After ``stop`` the run can still be cancelled. ``led``: another process hears the signals and acknowledges.
    """

    def __init__(self, store: RunStore, run: Run, *, led: bool = False) -> None:
        self.pending: Request | None = None
        self._store = store
        self._run = run
        self._led = led
        self._over = threading.Event()
        # A long tensor operation in the main thread delays Python's signal handlers. But the interpreter writes a byte
        # into a socket as soon as the signal arrives, which wakes the watching thread at once.
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="requests", daemon=True)

    def __enter__(self) -> Requests:
        for socket_ in (self._wake, self._woken):
            socket_.setblocking(False)
        if not self._led:
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
            if not self._led:
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
        place = "GPU memory" if type(error).__name__ == "OutOfMemoryError" or "CUDA" in text else "memory"
        return (
            f"not enough {place} ({text.splitlines()[0]}). Finished blocks are kept: free some memory and resume, "
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
    if is_gpu_loss(error):
        return (
            f"the GPU failed ({text.splitlines()[0]}; traceback in {folder / 'worker.log'}). Finished blocks are kept: "
            "see `nvidia-smi`, then resume the run; on a machine with another free GPU it goes on there"
        )
    return f"{text} (traceback in {folder / 'worker.log'}). Finished blocks are kept: the run can be resumed"


def is_gpu_loss(error: Exception) -> bool:
    """Whether an exception says that a GPU is lost or damaged: not the run's own fault."""
    text = str(error)
    failed = type(error).__name__ == "AcceleratorError" or any(sign in text for sign in GPU_SIGNS)
    return failed and "out of memory" not in text


def is_rank_loss(error: Exception) -> bool:
    """Whether an exception says that another rank of the run has ended."""
    ranks = sys.modules.get("lbllm.ranks")  # not imported: a waiting worker needs neither torch nor its memory
    return ranks is not None and ranks.is_loss(error)


def wait_for_turn(turn: Turn, config: RunConfig, processes: int, placed: bool, requests: Requests) -> bool:
    """Wait for the run's devices; return False if a request came first."""
    gpus = [] if config.device == "cpu" else visible_gpus()
    waiting = threading.Thread(
        target=turn.take, args=(config.device, processes, gpus), kwargs={"placed": placed}, daemon=True
    )
    waiting.start()
    while waiting.is_alive() and requests.pending is None:
        waiting.join(POLL_SECONDS)
    return requests.pending is None


def run_pipeline(run: Run, config: RunConfig, request: Callable[[], Request | None]) -> Iterator[Event]:
    """Yield the events of the run's pipeline, in this process and where the ranks are several, with the others."""
    # The run may have been resumed from another folder. If its own folder is gone, relative paths fail with a clear
    # error.
    if run.cwd.is_dir():
        os.chdir(run.cwd)
    memory.keep_large_allocations()
    from lbllm import ranks  # late: a waiting worker needs neither torch nor its memory
    from lbllm.pipeline import run as pipeline

    yield from pipeline.run(config, run.folder, request=request)
    ranks.leave()


def launch(run: Run, processes: int, requests: Requests) -> int:
    """Start the ranks of a run whose turn has come, and wait until all have ended. Returns the exit code."""
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # what these would set is set by the run
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    process = subprocess.Popen([*command, "-m", "lbllm.worker", str(run.folder), "--led"], start_new_session=True)
    told: Request | None = None
    while process.poll() is None:
        if requests.pending != told:  # by a signal, perhaps, which the ranks don't get
            told = requests.pending
            write_file(run.folder / "request", str(told).encode())
        time.sleep(POLL_SECONDS)
    if process.returncode and run.failure is None:
        run.keep_failure(
            f"one of its {processes} processes ended without a message, perhaps it was killed; see "
            f"{run.folder / 'worker.log'}. Finished blocks are kept: resume the run"
        )
    return 1 if process.returncode else 0


def work(store: RunStore, run: Run, *, led: bool = False) -> int:
    """Wait for the run's turn, train it to its end, and return the exit code.

    ``led``: this is rank 0, and the worker that started it has waited for the turn and answers requests.
    """

    def record(event: Event) -> None:
        if isinstance(event, RunDone | RunStopped | RunFailed):
            requests.close()
        if isinstance(event, RunStopped):
            store.end(run.id, requests.pending or event.request)
        else:
            store.append(run.id, event)

    turn = Turn(store.root)
    config: RunConfig | None = None
    with Requests(store, run, led=led) as requests:
        try:
            config = run.config  # before the state becomes "running"
            if not led:
                processes = world() if world() > 1 else read_processes(run.folder)
                if not wait_for_turn(turn, config, processes, world() > 1, requests):
                    record(RunStopped(request=requests.pending or "stop"))
                    return 0
                record(RunLoading())
                if turn.gpus:
                    # The run has these alone, numbered from 0.
                    processes = len(turn.gpus)
                    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(turn.gpus)
                    config = config.model_copy(update={"device": "cuda"})
                if processes > 1 and world() == 1:
                    return launch(run, processes, requests)
            for event in run_pipeline(run, config, lambda: requests.pending):
                record(event)
        except Exception as error:
            # On a full disk, writing to the log and the store may fail.
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
            # An error before the settings are known does not depend on them.
            message = failure_message(error, config or RunConfig(), run.folder)
            try:
                if is_rank_loss(error):
                    if run.failure is None:  # else the rank has said why
                        run.keep_failure(f"another process of the run ended ({message})")
                elif is_gpu_loss(error):
                    run.keep_failure(message)
                else:
                    record(RunFailed(message=message))
            except (LbllmError, sqlite3.Error, OSError):  # the state is then "interrupted"
                with contextlib.suppress(OSError):
                    run.keep_failure(message)
            return 1
    return 0


def world() -> int:
    """How many processes a launcher started this one with; 1 where none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def assist(store: RunStore, run_id: str, *, led: bool) -> int:
    """Work on a run as a rank other than the first, which writes nothing; returns the exit code."""
    if not led:
        for number in STOP_SIGNALS:  # rank 0 gets them too, and all end with it
            signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + START_SECONDS
    while store.get(run_id).state != "running":
        waiting = is_held(store.root / run_id / "alive.lock")
        if not waiting and time.monotonic() > deadline:
            return 0
        if waiting:
            deadline = time.monotonic()  # from now on it has begun, and its end is the end of waiting
        time.sleep(POLL_SECONDS)
    run = store.get(run_id)
    end_with(run)
    config: RunConfig | None = None
    try:
        config = run.config
        for _ in run_pipeline(run, config, lambda: None):
            pass
    except Exception as error:
        traceback.print_exception(error)
        if not is_rank_loss(error):
            with contextlib.suppress(OSError):
                run.keep_failure(failure_message(error, config or RunConfig(), run.folder))
            time.sleep(LAST_SECONDS)
        return 1
    return 0


def end_with(run: Run) -> None:
    """End this process, whatever it does, as soon as no process holds the run's lock: the one that did is gone."""

    def watch() -> None:
        while is_held(run.folder / "alive.lock"):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def main() -> int:
    """Train the run of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm.worker", description="Train one run to its end.")
    parser.add_argument("folder", type=Path, help="the run's folder in its store")
    parser.add_argument(
        "--lock", type=int, help="the run's open, locked file, inherited from the process that queued it"
    )
    parser.add_argument("--led", action="store_true", help="started by the run's worker, as one of its ranks")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    try:
        store = RunStore(folder.parent)
        if int(os.environ.get("RANK", "0")) > 0:
            return assist(store, folder.name, led=options.led)
        if options.led:
            run = store.get(folder.name)
            end_with(run)
            return work(store, run, led=True)
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
