"""Which run works when: a lock a device, with pretended GPUs, held by processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lbllm.files import is_held
from lbllm.runs.turn import Turn, read_processes, visible_gpus, write_processes
from tests.helpers import ROOT, waiting

HOLDER = """
import sys
sys.argv[0] = "-m"
from pathlib import Path
from lbllm.files import is_held
from lbllm.runs.turn import Turn
root, device, processes, placed, *gpus = sys.argv[1:]
turn = Turn(Path(root))
turn.take(device, int(processes), gpus, placed=placed == "placed")
print(",".join(turn.gpus), flush=True)
sys.stdin.read()
"""


class Workers:
    """Processes that take a turn, say which GPUs they have, and hold them until they are ended."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stack = ExitStack()

    def start(self, device: str, processes: int, *gpus: str, placed: bool = False) -> subprocess.Popen[str]:
        arguments = [str(self.root), device, str(processes), "placed" if placed else "free", *gpus]
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stack.enter_context(process)
        self.stack.callback(process.kill)
        return process


def got(process: subprocess.Popen[str]) -> str:
    """The GPUs that a worker has, once its turn has come."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_waiting(process: subprocess.Popen[str]) -> bool:
    """Whether a worker still waits after it had the time to say that it doesn't."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(got(process)), daemon=True)
    thread.start()
    thread.join(0.5)
    return not said


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(tmp_path)
    with workers.stack:
        yield workers


def test_queued_runs_take_the_free_gpus_one_by_one(workers: Workers) -> None:
    gpus = ("0", "1")
    first = workers.start("auto", 1, *gpus)
    assert got(first) == "0"
    second = workers.start("cuda", 1, *gpus)
    assert got(second) == "1"
    third, on_cpu = workers.start("auto", 1, *gpus), workers.start("cpu", 1, *gpus)
    assert got(on_cpu) == ""  # nobody else computes there
    assert is_waiting(third)
    end(second)
    waiting.wait_until(lambda: is_held(workers.root / "worker.1.lock"), 30)


def test_a_run_of_two_processes_waits_for_two_gpus_and_a_named_one_for_its_own(workers: Workers) -> None:
    gpus = ("GPU-a/1", "GPU-b", "GPU-c")
    named = workers.start("cuda:1", 1, *gpus)
    assert got(named) == "GPU-b"
    pair = workers.start("auto", 2, *gpus)
    assert got(pair) == "GPU-a/1,GPU-c"
    by_hand = workers.start("cuda", 2, *gpus, placed=True)  # ranks that run already, on the first and second
    end(pair)
    assert is_waiting(by_hand)
    end(named)
    waiting.wait_until(lambda: is_held(workers.root / "worker.GPU-a_1.lock"), 30)
    waiting.wait_until(lambda: is_held(workers.root / "worker.GPU-b.lock"), 30)
    assert got(workers.start("auto", 1, *gpus)) == "GPU-c"


def test_a_run_with_more_processes_than_gpus_takes_all(tmp_path: Path) -> None:
    turn = Turn(tmp_path)
    turn.take("auto", 4, ("0", "1"))
    assert turn.gpus == ["0", "1"]


def test_without_a_gpu_one_run_works_at_a_time(workers: Workers) -> None:
    first = workers.start("auto", 2)
    assert got(first) == ""
    second = workers.start("auto", 1)
    assert is_waiting(second)
    end(first)
    waiting.wait_until(lambda: is_held(workers.root / "worker.lock"), 30)


def test_the_gpus_are_those_of_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm.runs.turn._DEVICE_FILES", ("null",))  # a file that every /dev has
    counted = subprocess.CompletedProcess([], 0, stdout="2\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: counted)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7,-1,3")
    assert visible_gpus() == ["5", "GPU-7"]
    counted.stdout = ""
    assert visible_gpus() == []


def test_a_machine_without_device_files_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm.runs.turn._DEVICE_FILES", ())
    monkeypatch.setattr(subprocess, "run", None)
    assert visible_gpus() == []


@pytest.mark.parametrize(("content", "processes"), [(b"3", 3), (b"", 1), (b"0", 1), (b"x", 1), (b"-2", 1)])
def test_the_number_of_processes_is_read_or_1(tmp_path: Path, content: bytes, processes: int) -> None:
    assert read_processes(tmp_path) == 1
    (tmp_path / "processes").write_bytes(content)
    assert read_processes(tmp_path) == processes
    write_processes(tmp_path, 5)
    assert read_processes(tmp_path) == 5
