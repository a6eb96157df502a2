"""The worker process: its place in the queue, requests and signals, failures, and whole runs of a tiny model."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.kill_resume import compare, hashes
from lbllm.config import RunConfig, make_config
from lbllm.errors import CorpusError, RunError
from lbllm.events import Acknowledged, RunDone, RunFailed, RunQueued, RunStarted, RunStopped, StepMetric
from lbllm.pipeline.worker import Requests, failure_message
from lbllm.runs.store import Request, Run, RunStore, State
from lbllm.sections import STAGES
from tests.helpers import ROOT, waiting
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import stored_run_config


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


wait_until = partial(waiting.wait_until, seconds=180.0)


@contextlib.contextmanager
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
        assert process.wait(60) == 0
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


QUICK = make_config("quick")
MEMORY = (
    "not enough memory",
    f"seq_len (Sequence length), now {QUICK.seq_len}",
    f"wat.batch_tokens (Stage 2, batch size in tokens), now {QUICK.wat.batch_tokens}",
    f"less text, now {QUICK.tokens} tokens",
    "blocks are kept",
)
GPU_MEMORY = ("not enough GPU memory", *MEMORY[1:])
DISK = ("no space left", "store/a-run", "blocks are kept", "resume")
LIMITED_WRITERS = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.argv[0] = "-m"  # as in our own commands: no import of what isn't needed
from lbllm.config import RunConfig
from lbllm.pipeline.worker import Requests, failure_message
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
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), (*GPU_MEMORY, "2 GiB")),
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


LIMITED_WORKER = """
import resource, runpy, sys
sys.argv[0], limit = "-m", int(sys.argv.pop(1))  # argv[0] as `python -m` has it while it looks for the module
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("lbllm.worker", run_name="__main__", alter_sys=True)
"""


def limited_worker(store: RunStore, run: Run, limit: int) -> subprocess.Popen[str]:
    """A worker of the new run none of whose files can grow beyond ``limit`` bytes: the same as a full disk."""
    with store.enqueue(run.id, "run", ("queued",)) as lock:
        return subprocess.Popen(
            [sys.executable, "-c", LIMITED_WORKER, str(limit), str(run.folder), "--lock", str(lock.fileno())],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            pass_fds=(lock.fileno(),),
            text=True,
        )


def test_a_file_that_finds_no_room_is_told_whoever_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED_WRITERS, str(tmp_path)]
    messages = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(messages) == 3
    for message in messages:
        for part in DISK:
            assert part in message


def test_a_store_that_can_take_no_more_ends_the_worker_and_nothing_else(store: RunStore) -> None:
    """The disk is so full that not even the failure can be put on record."""
    run = store.create(RunConfig())
    process = limited_worker(store, run, (store.root / "runs.db-wal").stat().st_size)
    _, told = process.communicate()
    assert process.returncode == 1
    assert "can't be written" in told
    assert "free some space" in told
    assert kinds(store, run) == ["run_queued"]
    assert store.get(run.id).state == "interrupted"
    # The reason is in a file that had its room from the start.
    reason = store.get(run.id).failure
    assert reason is not None
    assert "can't be written" in reason
    with another_run_at_work(store):
        resumed = store.resume(run.id)
        assert store.get(run.id).state == "queued"
        assert store.get(run.id).failure is None
        store.request(run.id, "stop")
        assert resumed.wait(60) == 0


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"stopp", b"stop" * 10_000])
def test_a_damaged_request_asks_for_nothing_and_the_next_one_is_heard(store: RunStore, content: bytes) -> None:
    run = store.create(RunConfig())
    asked = Requests(store, run)
    (run.folder / "request").write_bytes(content)
    assert asked._asked() is None
    for written, request in ((b"stop\n", "stop"), (b"cancel", "cancel")):
        (run.folder / "request").write_bytes(written)
        assert asked._asked() == request


def test_a_failure_can_always_be_stored() -> None:
    message = failure_message(CorpusError("row \ud800"), RunConfig(), Path("store/a-run"))
    assert RunFailed(message=message).message == "row ?"


# Whole runs of a tiny model.


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of seconds: two small blocks, a few steps a block, and stage 4."""
    config = stored_run_config(tmp_path_factory.mktemp("tiny"))
    e2e = config.e2e.model_copy(update={"tokens": 512, "batch_tokens": 64})
    return config.model_copy(update={"stages": STAGES, "e2e": e2e})


def begun(store: RunStore, run: Run, kind: str) -> None:
    """Wait until the run has an event of the kind."""
    wait_until(lambda: kind in kinds(store, run) or store.get(run.id).state not in ("queued", "running"))
    assert store.get(run.id).state == "running", store.events(run.id)[-1]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_config: RunConfig) -> tuple[RunStore, str]:
    """A store with an uninterrupted run and one that was killed twice, and what the comparison printed."""
    store = RunStore(tmp_path_factory.mktemp("killed"))
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as environment:
        # Two threads share sums in another order than one: here the bytes have to be equal all the same.
        environment.setenv("OMP_NUM_THREADS", "2")
        assert compare(store, tiny_config, kills=2, seed=1), printed.getvalue()
    return store, printed.getvalue()


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(killed: tuple[RunStore, str]) -> None:
    store, printed = killed
    assert re.search(r"2 of 2 kills; all [1-9]\d* files equal", printed), printed
    whole, resumed = store.all()
    assert hashes(whole.folder / "checkpoint") == hashes(resumed.folder / "checkpoint")
    assert kinds(store, resumed).count("run_queued") == 3


def test_a_whole_run_tells_its_story_in_order(killed: tuple[RunStore, str], tiny_config: RunConfig) -> None:
    store, _ = killed
    for run in store.all():
        assert run.state == "done"
        events = store.events(run.id)
        assert [stored.seq for stored in events] == list(range(1, len(events) + 1))
        told = kinds(store, run)
        # A worker may be killed before it has begun to load; each resume queues the run again.
        assert [kind for kind, _ in itertools.groupby(told)][:2] == ["run_queued", "run_loading"]
        assert isinstance(events[-1].event, RunDone)
        started = next(stored.event for stored in events if isinstance(stored.event, RunStarted))
        assert started.tokens == tiny_config.tokens == 512
    told = kinds(store, store.all()[0])
    assert told.count("stage_done") == len(tiny_config.stages)
    assert told.count("block_done") == 3 * 2 + 1


def test_a_stopped_run_goes_on_from_its_finished_blocks_and_a_cancelled_one_never(
    store: RunStore, tiny_config: RunConfig
) -> None:
    run = store.create(tiny_config)
    process = store.start(run.id)
    begun(store, run, "block_done")
    store.request(run.id, "stop")
    assert process.wait(60) == 0
    assert store.get(run.id).state == "stopped"
    assert any((run.folder / "blocks").iterdir())
    before = store.events(run.id)

    process = store.resume(run.id)
    wait_until(lambda: any(isinstance(stored.event, StepMetric) for stored in store.events(run.id, before[-1].seq)))
    asked = time.time()
    store.request(run.id, "cancel")
    assert process.wait(60) == 0
    assert store.get(run.id).state == "cancelled"
    after = store.events(run.id)
    assert after[: len(before)] == before
    new = after[len(before) :]
    started = next(stored.event for stored in new if isinstance(stored.event, RunStarted))
    assert started.resumed_blocks > 0
    acknowledged = next(stored for stored in new if stored.event == Acknowledged(request="cancel"))
    assert acknowledged.time - asked < 1
    assert after[-1].event == RunStopped(request="cancel")
    assert not (run.folder / "blocks").exists()
    with pytest.raises(RunError, match="is cancelled and can't be resumed"):
        store.resume(run.id)


def test_queued_runs_follow_one_another_and_one_that_is_killed_or_fails_frees_its_place(
    store: RunStore, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny_config.corpus).parent)
    relative = {"model": "./teacher", "corpus": "text.txt"}
    first = store.create(tiny_config.model_copy(update=relative))
    second = store.create(tiny_config.model_copy(update={"corpus": "/nowhere/text.txt"}))
    worker = store.start(first.id)
    begun(store, first, "run_loading")
    waiting = store.start(second.id)
    begun(store, first, "run_started")
    assert store.get(second.id).state == "queued"
    worker.kill()
    assert waiting.wait(180) == 1
    assert store.get(first.id).state == "interrupted"
    assert store.get(second.id).state == "failed"
    last = store.events(second.id)[-1].event
    assert isinstance(last, RunFailed)
    assert "/nowhere/text.txt" in last.message
    # Its relative paths still begin where the run was made.
    monkeypatch.chdir(store.root)
    assert store.resume(first.id).wait(180) == 0
    assert store.get(first.id).state == "done"


@pytest.mark.soak
def test_a_full_disk_ends_a_run_that_can_go_on_when_there_is_room(
    store: RunStore, tiny_config: RunConfig, tmp_path: Path
) -> None:
    # The embeddings alone, in the final checkpoint, are larger than what a file may have; the events are few.
    limit = 2 << 20
    teacher = save_tiny(tmp_path / "teacher", "llama", hidden_size=256, vocab_size=4096)
    short = {stage: getattr(tiny_config, stage).model_copy(update={"tokens": 64}) for stage in ("ptq", "wat", "aar")}
    run = store.create(tiny_config.model_copy(update={"model": str(teacher), **short}))
    process = limited_worker(store, run, limit)
    process.communicate()
    assert process.returncode == 1
    assert store.get(run.id).state == "failed"
    last = store.events(run.id)[-1].event
    assert isinstance(last, RunFailed)
    assert "space" in last.message
    assert str(run.folder) in last.message
    assert store.resume(run.id).wait(180) == 0
    assert store.get(run.id).state == "done"
