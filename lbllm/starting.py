"""Starts the process that does the work of a folder: a run's worker, an evaluation's worker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO


def start_worker(module: str, folder: Path, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start ``python -m module folder --lock N`` in a session of its own, with its output at the end of ``worker.log``.

    The worker inherits the locked file, so that there is no moment in which the folder seems to have no worker.
    """
    package = Path(__file__).resolve().parent.parent
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), "--lock", str(lock.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
    # Somebody has to wait for a child, or it stays in the process table after its end.
    threading.Thread(target=process.wait, daemon=True).start()
    return process
