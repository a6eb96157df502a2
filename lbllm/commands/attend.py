"""A run attended from a terminal: checked beforehand, started or resumed, shown to its end, its checkpoint delivered.

The worker is a process of its own and goes on when the terminal is gone; Ctrl-C asks it to stop and keep its work.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lbllm.errors import ConfigError, ResourceError, RunError
from lbllm.events import Event, RunDone, RunFailed
from lbllm.files import new_folder
from lbllm.runs.progress import RunDisplay, RunProgress
from lbllm.runs.store import ACTIVE, Run, RunStore

POLL_SECONDS = 0.1


class StoppedByUser(RunError):
    """Ctrl-C ended a run."""


@dataclass(frozen=True)
class Outcome:
    """A finished run. ``path``: its packed checkpoint; ``disk_bytes``: its weights file; ``seconds``: its last part."""

    run: str
    path: Path
    bpw: float
    disk_bytes: int
    seconds: float


def check_out(out: Path) -> None:
    """Refuse, before hours of work, a target that can't take the checkpoint. Raises ConfigError, OSError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; choose another name or remove it")
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--out {out}: the folder {parent} is not writable; choose another place")


def attend(store: RunStore, run: Run, progress: RunProgress, console: Console, out: Path | None) -> Outcome:
    """Start a queued run, or resume one that ended early, and show it on ``console`` until it ends.

    The checkpoint is copied to ``out`` if given. Raises RunError where the run doesn't get to its end, StoppedByUser
    where Ctrl-C asked for that, ResourceError where ``out`` can't take the checkpoint.
    """
    display = RunDisplay(console, progress)
    working = next((other.id for other in store.all() if other.state == "running"), None)
    if working is not None:
        display.say(f"waiting until run {working} ends: one works at a time")
    earlier = store.events(run.id)
    after_seq = earlier[-1].seq if earlier else 0
    if run.state == "queued":
        store.start(run.id)
    else:
        store.resume(run.id)
    asked = _follow(store, run.id, display, after_seq)
    outcome = _outcome(store.get(run.id), [stored.event for stored in store.events(run.id, after_seq)], asked, out)
    if out is None:
        return outcome
    deliver(outcome.path, out)
    return Outcome(outcome.run, out, outcome.bpw, outcome.disk_bytes, outcome.seconds)


def _outcome(run: Run, events: list[Event], asked: bool, out: Path | None) -> Outcome:
    again = f"Go on with: python -m lbllm runs resume {run.id}" + (f" --out {shlex.quote(str(out))}" if out else "")
    last = next((event for event in reversed(events) if isinstance(event, RunDone | RunFailed)), None)
    if run.state == "done" and isinstance(last, RunDone):
        return Outcome(run.id, Path(last.path), last.bpw, last.disk_bytes, last.seconds)
    if run.state == "stopped" and asked:
        raise StoppedByUser(f"run {run.id} is stopped, its finished blocks are kept. {again}")
    if run.state == "failed" and isinstance(last, RunFailed):
        raise RunError(f"run {run.id} failed: {last.message}. {again}")
    if run.state == "interrupted":
        log = run.folder / "worker.log"
        raise RunError(f"run {run.id}: its worker ended without a word, perhaps killed; {log} may say more. {again}")
    raise RunError(f"run {run.id} is {run.state}" + (f". {again}" if run.state == "stopped" else ""))


def _follow(store: RunStore, run_id: str, display: RunDisplay, after_seq: int) -> bool:
    """Show a run until it ends. Ctrl-C asks it to stop; returns whether that happened."""
    asked = False
    with display, interrupts() as pressed:
        while True:
            # The state first: what was written before the end is then among the events read after it.
            over = store.get(run_id).state not in ACTIVE
            for stored in store.events(run_id, after_seq):
                after_seq = stored.seq
                display.take(stored)
            display.draw(time.time())
            if over:
                return asked
            if pressed and not asked:
                asked = True
                with suppress(RunError):  # it may just have ended by itself
                    store.request(run_id, "stop")
            time.sleep(POLL_SECONDS)


@contextmanager
def interrupts() -> Iterator[list[float]]:
    """While open, Ctrl-C is noted in the list with its time; a second one is a KeyboardInterrupt."""
    pressed: list[float] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(time.time())

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def deliver(checkpoint: Path, out: Path) -> None:
    """Copy a finished checkpoint to ``out``, atomically. Raises ResourceError."""
    try:
        with new_folder(out) as folder:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the checkpoint is finished and lies in {checkpoint}, but it can't be copied to {out} ({error}); "
            "free some space there or copy it elsewhere"
        ) from error
