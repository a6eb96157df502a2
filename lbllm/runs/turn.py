"""Which run works when, on which devices and in how many processes.

Each device of a machine has a lock, which a worker holds to its end.

    root/worker.lock           the CPU
    root/worker.<GPU>.lock     one GPU, by its number or its name in CUDA_VISIBLE_DEVICES
    root/queue.lock            held by the worker that chooses among the GPUs

A lock lasts until its process ends, however it ends: only then is the device's memory free for the next run. The
kernel's queue for a lock roughly keeps the order of those who wait; polling would not.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lbllm.files import write_errors, write_file

POLL_SECONDS = 0.1
_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "dxg")  # of NVIDIA, of AMD, of Windows' subsystem for Linux


def visible_gpus() -> list[str]:
    """The GPUs that torch can use, by their names in CUDA_VISIBLE_DEVICES.

    Another process counts them, so that a worker that waits needs neither torch nor its memory.
    """
    if not any(any(Path("/dev").glob(pattern)) for pattern in _DEVICE_FILES):
        return []
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    count = int(printed) if printed.isdecimal() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def write_processes(folder: Path, processes: int) -> None:
    """Keep in a run's folder how many processes it is started with. Raises ResourceError."""
    with write_errors(folder):
        write_file(folder / "processes", str(processes).encode())


def read_processes(folder: Path) -> int:
    """How many processes a run was last started with; a file that is missing or damaged says 1."""
    try:
        with (folder / "processes").open("rb") as file:
            written = file.read(8).strip()
    except OSError:
        return 1
    return max(1, int(written)) if written.isdigit() else 1


class Turn:
    """The devices of one worker. ``gpus``: their names, once ``take`` has returned; empty: it works on the CPU."""

    def __init__(self, root: Path) -> None:
        self.gpus: list[str] = []
        self._root = root

    def take(self, device: str, processes: int, gpus: Sequence[str], *, placed: bool = False) -> None:
        """Wait for the devices of a run on ``device`` (auto, cpu, cuda, cuda:N) and lock them until the process ends.

        ``gpus``: those of the machine. ``auto`` and ``cuda`` take the first that are free, one for each process, or all
        where there are fewer. ``placed``: the processes run already, each on the GPU of its own number.
        """
        if device == "cpu" or not gpus:
            self._wait_for("worker.lock")
            return
        _, _, index = device.partition(":")
        if index or placed:
            wanted = [gpus[int(index)]] if index else list(gpus[:processes])
            for gpu in sorted(wanted):  # in one order for all workers, or two could wait for each other
                self._wait_for(_file(gpu))
            self.gpus = wanted
            return
        queue = self._wait_for("queue.lock")
        while not self._take_free(gpus, min(processes, len(gpus))):
            time.sleep(POLL_SECONDS)
        os.close(queue)

    def _take_free(self, gpus: Sequence[str], number: int) -> bool:
        """Lock the first ``number`` free ones of ``gpus``; none, if fewer are free."""
        taken: dict[str, int] = {}
        for gpu in gpus:
            file = self._open(_file(gpu))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            taken[gpu] = file
            if len(taken) == number:
                self.gpus = list(taken)
                return True
        for file in taken.values():
            os.close(file)
        return False

    def _wait_for(self, name: str) -> int:
        file = self._open(name)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _open(self, name: str) -> int:
        return os.open(self._root / name, os.O_RDWR | os.O_CREAT, 0o666)


def _file(gpu: str) -> str:
    return f"worker.{re.sub(r'[^A-Za-z0-9-]', '_', gpu)}.lock"
