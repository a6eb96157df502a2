"""A run's events as a live display in the terminal, or as plain lines where there is no terminal.

``RunProgress`` is a reader like any other: it sees the events alone and can begin at any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lbllm.events import (
    Acknowledged,
    BlockDone,
    BlockStarted,
    Evaluated,
    Event,
    LayerDone,
    RunDone,
    RunFailed,
    RunLoading,
    RunQueued,
    RunStarted,
    RunStopped,
    StageDone,
    StageStarted,
    StepMetric,
    StoredEvent,
    stage_parts,
)
from lbllm.labels import STAGE_NAMES
from lbllm.sections import Stage
from lbllm.units import duration, size


class RunProgress:
    """Follows one run. ``expected``: seconds that each stage is expected to take, for those that haven't begun."""

    def __init__(self, expected: Mapping[Stage, float] | None = None) -> None:
        self.expected = dict(expected or {})
        self.status = "waiting for the worker"
        self.started: RunStarted | None = None
        self.began = self.now = 0.0
        self.stage: StageStarted | None = None
        self.stage_began = 0.0
        self.done_blocks = 0
        self.block_began = 0.0
        self.block_seconds: list[float] = []
        self.part = 0.0
        self.step: StepMetric | None = None
        self.last: BlockDone | None = None
        self.layer: LayerDone | None = None

    def update(self, stored: StoredEvent) -> None:
        """Take one event in; events come in order."""
        self.now = stored.time
        self.began = self.began or stored.time
        match stored.event:
            case RunQueued():
                self.status = "waiting for its turn"
            case RunLoading():
                self.status = "loading model and text"
            case RunStarted() as event:
                self.started = event
                self.status = "running"
            case StageStarted() as event:
                self.stage, self.stage_began = event, stored.time
                self.done_blocks, self.block_seconds, self.part = 0, [], 0.0
                self.step, self.last, self.layer = None, None, None
            case BlockStarted() as event:
                # Blocks go in order; after a resume the first one isn't 0.
                self.done_blocks, self.block_began, self.part = event.block, stored.time, 0.0
                self.step, self.layer = None, None
            case LayerDone() as event:
                self.layer = event
            case StepMetric() as event:
                self.step = event
                if self.stage is not None and self.stage.steps:
                    self.part = min(1.0, event.step / self.stage.steps)
            case BlockDone() as event:
                self.last = event
                self.done_blocks, self.part = event.block + 1, 0.0
                self.block_seconds.append(stored.time - self.block_began if self.block_began else event.seconds)
            case Acknowledged() as event:
                self.status = "stopping" if event.request == "stop" else "cancelling"
            case RunDone():
                self.status = "done"
            case RunStopped() as event:
                self.status = "stopped" if event.request == "stop" else "cancelled"
            case RunFailed():
                self.status = "failed"

    def seconds_left(self, now: float) -> float | None:
        """Of the stage under way by its blocks so far, of later ones as expected; None while that isn't known."""
        if self.started is None or self.stage is None or self.status != "running":
            return None
        parts = stage_parts(self.stage.stage, self.started.blocks)
        left = parts - self.done_blocks
        if self.block_seconds:
            # The latest blocks say most about the next ones; the first of a process is slower.
            recent = self.block_seconds[-5:]
            a_block = sum(recent) / len(recent)
        elif self.part > 0 and self.block_began:
            a_block = (now - self.block_began) / self.part
        elif self.stage.stage in self.expected:
            a_block = self.expected[self.stage.stage] / parts
        else:
            return None
        later = self.started.stages[self.started.stages.index(self.stage.stage) + 1 :]
        if any(stage not in self.expected for stage in later):
            return None
        in_block = min(now - self.block_began, a_block) if self.block_began and left else 0.0
        return max(0.0, left * a_block - in_block) + sum(self.expected[stage] for stage in later)

    def line(self, event: Event) -> str | None:
        """One plain line about an event that is worth one."""
        match event:
            case RunLoading():
                return "loading model and text"
            case RunStarted():
                resumed = f", {event.resumed_blocks} finished blocks taken over" if event.resumed_blocks else ""
                return (
                    f"{event.blocks} blocks, {event.layers} layers, {event.weights:,} weights at {event.bpw:.3f} bits, "
                    f"{event.tokens:,} tokens, on {event.device}{resumed}"
                )
            case StageStarted():
                return STAGE_NAMES[event.stage]
            case BlockDone():
                left = self.seconds_left(self.now)
                return self._losses(event) + (f", about {duration(left)} left" if left else "")
            case Evaluated():
                return f"{event.what}: perplexity {event.perplexity:.2f} on {event.text}"
            case StageDone():
                return f"{STAGE_NAMES[event.stage]}: {duration(event.seconds)}"
            case Acknowledged():
                return f"{self.status} after the current step"
            case RunDone():
                return f"done in {duration(event.seconds)}: {size(event.disk_bytes)} at {event.bpw:.3f} bits per weight"
        return None

    def _losses(self, event: BlockDone) -> str:
        blocks = self.started.blocks if self.started else "?"
        place = "whole model" if event.stage == "e2e" else f"block {event.block + 1}/{blocks}"
        text = f"{place}: loss {event.loss_before:.4g} -> {event.loss_after:.4g}"
        text += f", {duration(event.seconds)}, {size(event.memory_bytes)}"
        return text + (", diverged: its state from before is kept" if event.diverged else "")

    def render(self, now: float) -> RenderableType:
        """What the terminal shows now."""
        head = Text()
        if self.started is not None and self.stage is not None:
            head.append(STAGE_NAMES[self.stage.stage], style="bold")
            number = self.started.stages.index(self.stage.stage) + 1
            head.append(f"  ({number} of {len(self.started.stages)})", style="dim")
        if self.status != "running" or self.stage is None:
            head.append(f"{'  ' if head else ''}{self.status}", style="yellow")
        rows: list[RenderableType] = [head]
        if self.started is not None and self.stage is not None:
            blocks = stage_parts(self.stage.stage, self.started.blocks)
            grid = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=blocks, completed=self.done_blocks + self.part, width=40)
            block = f"block {min(self.done_blocks + 1, blocks)}/{blocks}"
            left = self.seconds_left(now)
            grid.add_row(
                bar, block, duration(now - self.began), f"about {duration(left)} left" if left is not None else ""
            )
            rows.append(grid)
            detail = self._detail()
            if detail:
                rows.append(Text(detail, style="cyan"))
        if self.last is not None:
            rows.append(Text(self._losses(self.last), style="yellow" if self.last.diverged else "dim"))
        return Group(*rows)

    def _detail(self) -> str:
        if self.step is not None and self.stage is not None:
            reg = f" + {self.step.reg:.2g} polarization" if self.step.reg else ""
            return (
                f"step {self.step.step}/{self.stage.steps}: loss {self.step.loss:.4g}{reg}, "
                f"{self.step.tokens_per_second:,.0f} tokens/s"
            )
        if self.layer is not None:
            return f"{self.layer.layer}: output error {self.layer.error:.2f}%"
        return ""


class RunDisplay:
    """Shows a run's progress on a console: live in a terminal, else a line for each event that is worth one.

    Use as a context manager: ``take`` each event, ``draw`` as often as the terminal is to be renewed.
    """

    def __init__(self, console: Console, progress: RunProgress) -> None:
        self.console = console
        self.progress = progress
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self.context: AbstractContextManager[object] = self.live or nullcontext()

    def __enter__(self) -> RunDisplay:
        self.context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)  # type: ignore[arg-type]

    def take(self, stored: StoredEvent) -> None:
        """Take in an event of the run."""
        self.progress.update(stored)
        line = self.progress.line(stored.event) if self.live is None else None
        if line is not None:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line as it is, without markup and line breaks of rich's."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def draw(self, now: float) -> None:
        """Renew a terminal's display; ``now``: seconds since the epoch."""
        if self.live is not None:
            self.live.update(self.progress.render(now), refresh=True)
