"""Workers whose run is shared by several processes, or loses its GPU: the run is interrupted and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from lbllm.config import RunConfig, make_config
from lbllm.events import Acknowledged, BlockDone, RunDone, RunLoading, RunStopped, StepMetric
from lbllm.pipeline.worker import failure_message, is_gpu_loss
from lbllm.runs.store import Run, RunStore
from tests.helpers import ROOT, waiting
from tests.helpers.tiny_runs import stored_run_config

wait_until = partial(waiting.wait_until, seconds=300.0)

# A worker whose pipeline raises what torch raises for a GPU that fell off the bus.
LOSING_WORKER = """
import runpy, sys
sys.argv[0] = "-m"
import torch
from lbllm.pipeline import run
def lost(*_, **__):
    raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    yield
run.run = lost
runpy.run_module("lbllm.worker", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


@pytest.mark.parametrize(
    ("make", "lost", "parts"),
    [
        (lambda: torch.AcceleratorError("CUDA error: device lost"), True, ("the GPU failed", "resume", "nvidia-smi")),
        (lambda: RuntimeError("NCCL error: unhandled cuda error"), True, ("the GPU failed", "blocks are kept")),
        (
            lambda: torch.AcceleratorError("CUDA error: out of memory"),
            False,
            ("not enough GPU memory", "wat.batch_tokens (Stage 2, batch size in tokens), now", "seq_len"),
        ),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), False, ("not enough GPU memory", "2 GiB")),
        (lambda: ValueError("a bug"), False, ("ValueError: a bug",)),
    ],
)
def test_a_lost_gpu_is_told_from_a_full_one(make: Callable[[], Exception], lost: bool, parts: tuple[str, ...]) -> None:
    assert is_gpu_loss(make()) is lost
    message = failure_message(make(), make_config("quick"), Path("store/a-run"))
    for part in parts:
        assert part in message


def test_a_run_that_loses_its_gpu_is_interrupted_with_the_reason(store: RunStore) -> None:
    run = store.create(RunConfig(device="cpu"))
    with store.enqueue(run.id, "run", ("queued",)) as lock:
        command = [sys.executable, "-c", LOSING_WORKER, str(run.folder), "--lock", str(lock.fileno())]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, pass_fds=(lock.fileno(),))
    assert ended.returncode == 1
    after = store.get(run.id)
    assert (after.state, after.can_be_resumed) == ("interrupted", True)
    assert after.failure is not None
    assert "uncorrectable ECC error" in after.failure
    assert isinstance(store.events(run.id)[-1].event, RunLoading)


def ranks_of(run: Run) -> list[psutil.Process]:
    """The ranks of a run that have begun, rank 0 first."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "--led" in command and str(run.folder) in command and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return [found[rank] for rank in sorted(found)]


def worked(store: RunStore, run: Run, kind: type) -> bool:
    """Whether the run has an event of the kind; an AssertionError if it ended before."""
    assert store.get(run.id).state in ("queued", "running"), store.get(run.id).failure
    return any(isinstance(stored.event, kind) for stored in store.events(run.id))


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_rank_is_killed_is_interrupted_and_goes_on_with_one_process(
    store: RunStore, tmp_path: Path, rank: int
) -> None:
    run = store.create(stored_run_config(tmp_path))
    process = store.start(run.id, processes=2)
    wait_until(lambda: worked(store, run, BlockDone))
    os.kill(ranks_of(run)[rank].pid, signal.SIGKILL)
    assert process.wait(120) == 1
    wait_until(lambda: not ranks_of(run))
    assert store.get(run.id).state == "interrupted"
    assert "process" in str(store.get(run.id).failure)
    assert store.resume(run.id, processes=1).wait(300) == 0
    assert isinstance(store.events(run.id)[-1].event, RunDone)


@pytest.mark.soak
def test_the_ranks_of_a_killed_worker_end_and_a_stop_ends_all_at_one_step(store: RunStore, tmp_path: Path) -> None:
    run = store.create(stored_run_config(tmp_path))
    process = store.start(run.id, processes=2)
    wait_until(lambda: worked(store, run, BlockDone))
    process.kill()
    wait_until(lambda: not ranks_of(run))
    assert store.get(run.id).state == "interrupted"
    before = store.events(run.id)[-1].seq
    again = store.resume(run.id)  # with two processes, as before
    wait_until(lambda: any(isinstance(stored.event, StepMetric) for stored in store.events(run.id, before)))
    assert len(ranks_of(run)) == 2
    again.send_signal(signal.SIGTERM)
    assert again.wait(120) == 0
    assert store.get(run.id).state == "stopped"
    kinds = [type(stored.event) for stored in store.events(run.id, before)]
    assert Acknowledged in kinds
    assert RunStopped in kinds


@pytest.mark.soak
def test_ranks_can_be_launched_by_hand(store: RunStore, tmp_path: Path) -> None:
    run = store.create(stored_run_config(tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*command, "-m", "lbllm.worker", str(run.folder)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    kinds = [stored.event.kind for stored in store.events(run.id)]
    assert kinds[0] == "run_queued"
    assert kinds[-1] == "run_done"
    assert kinds.count("run_done") == kinds.count("run_started") == 1
