"""Follow a run from a terminal: start or resume it, show it until it ends, copy its checkpoint to a folder.

The worker is a process of its own and continues when the terminal is closed. Ctrl-C asks it to stop and keep its work.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lbllm.commands.output import plain
from lbllm.errors import ConfigError, ResourceError, RunError
from lbllm.events import (
    Acknowledged,
    BlockDone,
    Evaluated,
    Event,
    ExpertDone,
    LayerDone,
    RunDone,
    RunLoading,
    RunStarted,
    StageDone,
    StageStarted,
    StepMetric,
    StoredEvent,
    stage_parts,
)
from lbllm.files import new_folder
from lbllm.labels import BINARIZED_BITS, STAGE_NAMES
from lbllm.runs.store import ACTIVE, Run, RunStore
from lbllm.runs.view import Phase, RunView
from lbllm.sections import Stage
from lbllm.units import duration, rows_left_out, size

POLL_SECONDS = 0.1
WAITING: dict[Phase, str] = {
    "new": "waiting for the worker",
    "queued": "waiting for its turn",
    "loading": "loading model and text",
}
ENDING = {"stop": "stopping", "cancel": "cancelling"}


class StoppedByUser(RunError):
    """Ctrl-C ended a run."""


@dataclass(frozen=True)
class Outcome:
    """A finished run. ``path``: its packed checkpoint; ``disk_bytes``: the size of its weights files; ``seconds``: how
    long its last worker took."""

    run: str
    path: Path
    bpw: float
    disk_bytes: int
    seconds: float


def check_out(out: Path) -> None:
    """Check before hours of work that ``out`` can take the checkpoint. Raises ConfigError, OSError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; choose another name or remove it")
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--out {out}: the folder {parent} is not writable; choose another place")


def attend(
    store: RunStore,
    run: Run,
    console: Console,
    out: Path | None,
    expected: Mapping[Stage, float] | None = None,
    processes: int | None = None,
) -> Outcome:
    """Start a queued run, or resume one that ended early, and show it on ``console`` until it ends.

    The checkpoint is copied to ``out`` if given. ``expected``: the estimated seconds of each stage; None: estimate them
    here. ``processes``: how many share the work; None: as many as the last time. Raises RunError if the run ends
    before it is done, StoppedByUser if Ctrl-C stopped it, ResourceError if the checkpoint can't be copied to ``out``.
    """
    view = RunView(run.id)
    active = next((other.id for other in store.all() if other.state == "running"), None)
    if active is not None:
        plain(console, f"run {active} is at work; this one starts as soon as a device is free")
    # A resumed run's earlier events count, but are not shown again.
    with view.caught_up(store):
        pass
    with interrupts() as pressed:
        store.resume(run.id, processes)
        if expected is None:
            from lbllm.measure.estimate import expected_seconds  # late: the worker needn't wait for torch

            expected = expected_seconds(run)
        asked = _follow(store, RunDisplay(console, view, expected), pressed)
    outcome = _outcome(store.get(run.id), view, asked, out)
    if out is None:
        return outcome
    deliver(outcome.path, out)
    return replace(outcome, path=out)


def _outcome(run: Run, view: RunView, asked: bool, out: Path | None) -> Outcome:
    again = f"Continue with: python -m lbllm runs resume {run.id}" + (f" --out {shlex.quote(str(out))}" if out else "")
    if run.state == "done" and view.result is not None:
        return Outcome(run.id, Path(view.result.path), view.result.bpw, view.result.disk_bytes, view.result.seconds)
    if run.state == "stopped" and asked:
        raise StoppedByUser(f"run {run.id} is stopped, its finished blocks are kept. {again}")
    if run.state == "failed" and view.failure is not None:
        raise RunError(f"run {run.id} failed: {view.failure}. {again}")
    if run.state == "interrupted" and run.failure is not None:
        raise RunError(f"run {run.id} ended: {run.failure}. {again}")
    if run.state == "interrupted":
        log = run.folder / "worker.log"
        raise RunError(f"run {run.id}: its worker ended without a message, perhaps it was killed; see {log}. {again}")
    raise RunError(f"run {run.id} is {run.state}" + (f". {again}" if run.state == "stopped" else ""))


def _follow(store: RunStore, display: RunDisplay, pressed: list[float]) -> bool:
    """Show a run until it ends. Ctrl-C, recorded in ``pressed``, asks it to stop; returns whether that happened."""
    asked = False
    run_id = display.view.run_id
    with display:
        while True:
            # The state first: what was written before the end is then among the events read after it.
            over = store.get(run_id).state not in ACTIVE
            for stored in store.events(run_id, display.view.seq):
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
    """While open, Ctrl-C adds its time to the list; a second one raises KeyboardInterrupt."""
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
    """Copy a finished checkpoint to ``out`` atomically. Raises ResourceError."""
    try:
        with new_folder(out) as folder:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the checkpoint is finished and is in {checkpoint}, but it can't be copied to {out} ({error}); "
            "free some space there or copy it elsewhere"
        ) from error


class RunDisplay:
    """Shows a run on a console: live in a terminal, otherwise a line for each important event.

    ``expected``: the estimated seconds of each stage. Use as a context manager: ``take`` each event, ``draw`` as often
    as the terminal should be redrawn.
    """

    def __init__(self, console: Console, view: RunView, expected: Mapping[Stage, float]) -> None:
        self.console = console
        self.view = view
        self.expected = expected
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self.context: AbstractContextManager[object] = self.live or nullcontext()

    def __enter__(self) -> RunDisplay:
        self.context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)  # type: ignore[arg-type]

    def take(self, stored: StoredEvent) -> None:
        """Take in an event of the run."""
        self.view.update(stored)
        text = line(self.view, stored.event, self.expected) if self.live is None else None
        if text is not None:
            plain(self.console, text)

    def draw(self, now: float) -> None:
        """Redraw a terminal's display; ``now``: seconds since the epoch."""
        if self.live is not None:
            self.live.update(render(self.view, now, self.expected), refresh=True)


def line(view: RunView, event: Event, expected: Mapping[Stage, float]) -> str | None:
    """One plain line about the last event; None if it needs no line."""
    match event:
        case RunLoading():
            return WAITING["loading"]
        case RunStarted():
            resumed = f", {event.resumed_blocks} finished blocks taken over" if event.resumed_blocks else ""
            left_out = f"; {rows_left_out(event.rows_left_out)}" if event.rows_left_out else ""
            return (
                f"{event.blocks} blocks, {event.layers} layers, {event.weights:,} weights at {event.bpw:.3f} bits each"
                f", {event.tokens:,} tokens, on {event.device}{resumed}{left_out}"
            )
        case StageStarted():
            return STAGE_NAMES[event.stage]
        case BlockDone():
            left = view.seconds_left(view.last_time, expected)
            return _losses(view, event) + (f", about {duration(left)} left" if left else "")
        case Evaluated():
            return f"{event.what}: perplexity {event.perplexity:.2f} on {event.text}"
        case StageDone():
            return f"{STAGE_NAMES[event.stage]}: {duration(event.seconds)}"
        case Acknowledged():
            return f"{ENDING[event.request]} after the current step"
        case RunDone():
            return f"done in {duration(event.seconds)}: {size(event.disk_bytes)} at {event.bpw:.3f} {BINARIZED_BITS}"
    return None


def render(view: RunView, now: float, expected: Mapping[Stage, float]) -> RenderableType:
    """What a terminal shows of a run; ``now``: seconds since the epoch."""
    started, stage = view.started, view.stage
    if started is None or stage is None:
        return Group(Text(_activity(view), style="yellow"))
    head = Text()
    head.append(STAGE_NAMES[stage], style="bold")
    head.append(f"  ({started.stages.index(stage) + 1} of {len(started.stages)})", style="dim")
    if _activity(view) != "running":
        head.append(f"  {_activity(view)}", style="yellow")
    blocks, done, left = stage_parts(stage, started.blocks), view.blocks_done(stage), view.seconds_left(now, expected)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        ProgressBar(total=blocks, completed=done + view.part_done, width=40),
        f"block {min(done + 1, blocks)}/{blocks}",
        duration(view.elapsed(now)),
        f"about {duration(left)} left" if left is not None else "",
    )
    rows: list[RenderableType] = [head, grid]
    detail = _detail(view)
    if detail:
        rows.append(Text(detail, style="cyan"))
    last = view.last_done
    if last is not None and last.stage == stage:
        rows.append(Text(_losses(view, last), style="yellow" if last.diverged else "dim"))
    return Group(*rows)


def _activity(view: RunView) -> str:
    """What the run does now, in a few words."""
    if view.asked is not None and view.phase in ("queued", "loading", "running"):
        return ENDING[view.asked]
    return WAITING.get(view.phase, view.phase)


def _losses(view: RunView, event: BlockDone) -> str:
    blocks = view.started.blocks if view.started else "?"
    place = "whole model" if event.stage == "e2e" else f"block {event.block + 1}/{blocks}"
    text = f"{place}: loss {event.loss_before:.4g} -> {event.loss_after:.4g}"
    text += f", {duration(event.seconds)}, {size(event.memory_bytes)}"
    return text + (", diverged: its state from before is kept" if event.diverged else "")


def _detail(view: RunView) -> str:
    """The latest step or layer of the current block."""
    last = view.current.last if view.current is not None else None
    match last:
        case StepMetric():
            reg = f" + {last.reg:.2g} polarization" if last.reg else ""
            return (
                f"step {last.step}/{view.steps.get(last.stage, last.step)}: loss {last.loss:.4g}{reg}, "
                f"{last.tokens_per_second:,.0f} tokens/s"
            )
        case LayerDone():
            return f"{last.layer}: output error {last.error:.2f}%"
        case ExpertDone():
            return f"{last.expert}: {last.tokens:,} tokens, loss {last.loss_before:.4g} to {last.loss_after:.4g}"
    return ""
