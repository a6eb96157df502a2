"""The process that works on one evaluation: ``python -m lbllm.evaluation FOLDER``. ``EvaluationStore`` starts it.

It waits until a device is free, measures what is missing, and writes how it ended. What goes wrong with a model or a
text becomes a sentence, and the next evaluation in the queue goes on. Exit code: 0 if it is done or cancelled, else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import traceback
from pathlib import Path

from lbllm.errors import LbllmError
from lbllm.evaluation.store import EvaluationStore, write_end
from lbllm.json_input import shortened
from lbllm.places import home
from lbllm.runs.turn import POLL_SECONDS, Turn, visible_gpus


def wait_for_turn(folder: Path) -> bool:
    """Wait for a device, in one queue with runs; return False if somebody cancelled first."""
    root = home() / "runs"
    root.mkdir(parents=True, exist_ok=True)
    turn = Turn(root)
    waiting = threading.Thread(target=turn.take, args=("auto", 1, visible_gpus()), daemon=True)
    waiting.start()
    while waiting.is_alive():
        if (folder / "cancel").exists():
            return False
        waiting.join(POLL_SECONDS)
    if turn.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(turn.gpus)
    return True


def work(store: EvaluationStore, name: str) -> int:
    """Work on an evaluation until its end; return the exit code."""
    evaluation = store.get(name)
    folder = evaluation.folder
    try:
        if not wait_for_turn(folder):
            write_end(folder, "cancelled")
            return 0
        # Late: a waiting worker needs neither torch nor its memory.
        from lbllm.evaluation.measure import measure

        state, message = measure(evaluation)
        write_end(folder, state, message)
    except LbllmError as error:
        write_end(folder, "failed", str(error))
        return 1
    except Exception as error:
        traceback.print_exception(error)
        said = shortened(f"{type(error).__name__}: {error}".splitlines()[0])
        write_end(folder, "failed", f"{said} (details in {folder / 'worker.log'}). Finished parts are kept")
        return 1
    return 0


def main() -> int:
    """Work on the evaluation of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm.evaluation", description="Work on one evaluation.")
    parser.add_argument("folder", type=Path, help="the evaluation's folder")
    parser.add_argument("--lock", type=int, help="its open, locked file, inherited from the process that queued it")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    store = EvaluationStore(folder.parent)
    try:
        if options.lock is None:
            alive = store.enqueue(folder.name)
        else:
            # Child processes must not inherit the file: the lock has to end with this process.
            os.set_inheritable(options.lock, False)
            alive = os.fdopen(options.lock, "ab")
        with alive:
            return work(store, folder.name)
    except LbllmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
