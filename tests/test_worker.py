"""The worker process: its place in the queue, requests and signals, failures, and whole runs of a tiny model."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lbllm.config import RunConfig, make_config
from lbllm.errors import CorpusError
from lbllm.events import Acknowledged, RunQueued, RunStopped
from lbllm.runs import Request, Run, RunStore, State
from lbllm.worker import failure_message

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def another_run_at_work(store: RunStore) -> Iterator[None]:
    """The store's turn is taken, as it is while another run trains."""
    with (store.root / "worker.lock").open("ab") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def kinds(store: RunStore, run: Run) -> list[str]:
    return [stored.event.kind for stored in store.events(run.id)]


def is_listening(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has installed its handler of SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("request_", "state"), [("stop", "stopped"), ("cancel", "cancelled")])
def test_a_request_ends_a_run_that_waits_its_turn(store: RunStore, request_: Request, state: State) -> None:
    run = store.create(RunConfig())
    with another_run_at_work(store):
        process = store.start(run.id)
        assert store.get(run.id).state == "queued"
        wait_until(lambda: is_listening(process))
        asked = time.time()
        store.request(run.id, request_)
        assert process.wait(10) == 0
        assert store.get(run.id).state == state
    acknowledged = store.events(run.id)[1]
    assert acknowledged.event == Acknowledged(request=request_)
    assert acknowledged.time - asked < 1
    assert [stored.event for stored in store.events(run.id)][2:] == [RunStopped(request=request_)]


def test_a_request_made_before_the_worker_is_up_is_not_lost(store: RunStore) -> None:
    run = store.create(RunConfig())
    with another_run_at_work(store):
        process = store.start(run.id)
        store.request(run.id, "cancel")
        assert process.wait(20) == 0
    assert kinds(store, run) == ["run_queued", "acknowledged", "run_stopped"]
    assert store.get(run.id).state == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_means_stop(store: RunStore, number: signal.Signals) -> None:
    run = store.create(RunConfig())
    with another_run_at_work(store):
        process = store.start(run.id)
        wait_until(lambda: is_listening(process))
        process.send_signal(number)
        assert process.wait(10) == 0
    assert kinds(store, run) == ["run_queued", "acknowledged", "run_stopped"]
    assert store.get(run.id).state == "stopped"


def test_a_killed_waiting_worker_leaves_an_interrupted_run_that_can_be_resumed(store: RunStore) -> None:
    run = store.create(RunConfig())
    with another_run_at_work(store):
        store.start(run.id).kill()
        wait_until(lambda: store.get(run.id).state == "interrupted")
        resumed = store.resume(run.id)
        assert store.get(run.id).state == "queued"
        wait_until(lambda: is_listening(resumed))
        store.request(run.id, "stop")
        assert resumed.wait(10) == 0
        # The request is used up: a resumed run doesn't stop again by itself.
        again = store.resume(run.id)
        wait_until(lambda: is_listening(again))
        time.sleep(0.3)
        assert store.get(run.id).state == "queued"
        again.kill()
        again.wait()
    assert [stored.seq for stored in store.events(run.id)] == [1, 2, 3, 4, 5]
    assert kinds(store, run) == ["run_queued", "run_queued", "acknowledged", "run_stopped", "run_queued"]


def test_the_end_of_a_follower_is_the_end_of_the_run(store: RunStore) -> None:
    run = store.create(RunConfig())
    with another_run_at_work(store):
        process = store.start(run.id)
        stream = store.follow(run.id)
        assert isinstance(next(stream).event, RunQueued)
        process.kill()
        assert list(stream) == []
        assert store.get(run.id).state == "interrupted"


def test_a_worker_can_be_run_by_hand_and_refuses_what_is_no_run(store: RunStore, tmp_path: Path) -> None:
    def by_hand(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lbllm.worker", str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    run = store.create(RunConfig())
    with another_run_at_work(store):
        process = store.start(run.id)
        second = by_hand(run.folder)
        assert second.returncode == 1
        assert "is queued and can't be run" in second.stderr
        process.kill()
        process.wait()
    missing = by_hand(store.root / "nothing")
    assert missing.returncode == 1
    assert missing.stderr.startswith("no run 'nothing'")
    assert "Traceback" not in missing.stderr


def torch_out_of_memory() -> Exception:
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


MEMORY = ("memory doesn't suffice", "seq_len (512)", "wat.batch_tokens (1024)", "fewer tokens", "blocks are kept")
DISK = ("no space left", "store/a-run", "blocks are kept", "resume")
LIMITED_WRITERS = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from lbllm.config import RunConfig
from lbllm.worker import failure_message
folder, tensor = Path(sys.argv[1]), torch.zeros(100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for write in (
    lambda: (folder / "a").write_bytes(bytes(100_000)),
    lambda: torch.save(tensor, folder / "b"),
    lambda: save_file({"tensor": tensor}, folder / "c"),
):
    try:
        write()
    except Exception as error:
        print(failure_message(error, RunConfig(), Path("store/a-run")))
"""


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: CorpusError("text 'x' is too short"), ("text 'x' is too short",)),
        (MemoryError, MEMORY),
        (torch_out_of_memory, MEMORY),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), (*MEMORY, "2 GiB")),
        (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DISK),
        (lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), DISK),
        (lambda: KeyError("weight"), ("KeyError: 'weight'", "store/a-run/worker.log", "resumed")),
    ],
)
def test_a_failure_is_told_with_its_place_and_the_way_out(
    make: Callable[[], Exception], parts: tuple[str, ...]
) -> None:
    message = failure_message(make(), make_config("quick"), Path("store/a-run"))
    for part in parts:
        assert part in message


def test_a_file_that_finds_no_room_is_told_whoever_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED_WRITERS, str(tmp_path)]
    messages = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(messages) == 3
    for message in messages:
        for part in DISK:
            assert part in message
