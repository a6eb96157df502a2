"""A run as a page draws it: its events folded into curves, cells and figures, a few at a time.

    view = RunView(run_id)
    with view.caught_up(store):
        points(view.blocks["wat", 3].losses)

A view holds nothing that the store doesn't: it is built from event 1 by whoever opens the run and then reads what came
after ``seq``. So a reload, a second reader and a new process all show the same.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lbllm.events import (
    Acknowledged,
    BlockDone,
    BlockStarted,
    Evaluated,
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
from lbllm.runs.database import LIFECYCLE
from lbllm.runs.progress import RunProgress
from lbllm.runs.store import RunStore
from lbllm.sections import Stage

MAX_POINTS = 800
HEAT_COLUMNS = 40
HEAT_SECONDS = 15.0  # how long a long block's row in the heat map may stay as it is
# All that a list of runs shows; the steps in between are most of a run's events.
SUMMARY_KINDS: tuple[str, ...] = (*LIFECYCLE, "stage_started", "block_started", "block_done", "evaluated")
Cell = Literal["waiting", "working", "done", "diverged"]


def points(values: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[int], list[float | None]]:
    """At most ``limit`` points (step, value) that keep every peak: of each bin of steps its least and greatest value.

    Steps count from 1. A bin is a fixed range of steps, a power of two long, so new values change the last bin alone
    until the number of steps has doubled. What is not finite becomes None, a gap.
    """
    width = 1
    while math.ceil(len(values) / width) * min(width, 2) > limit:
        width *= 2
    steps: list[int] = []
    kept: list[float | None] = []
    for start in range(0, len(values), width):
        part = range(start, min(start + width, len(values)))
        finite = [step for step in part if math.isfinite(values[step])]
        if finite:
            chosen = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        for step in sorted(chosen) if finite else part[:1]:
            steps.append(step + 1)
            kept.append(values[step] if finite else None)
    return steps, kept


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """A running mean that forgets over ``share`` of the steps, at least 4; what is not finite is left out."""
    weight = 1 / max(4.0, share * len(values))
    mean = total = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            # Early values are averaged over those that there are, not pulled towards zero.
            total += weight * (1 - total)
            mean += (value - mean) * weight / total
        result.append(mean if total else math.nan)
    return result


def column_width(steps: int) -> int:
    """Steps in a column of the heat map, of a stage with ``steps`` steps a block."""
    return math.ceil(max(steps, 1) / HEAT_COLUMNS)


@dataclass
class BlockView:
    """One block in one stage. ``losses``, ``rates``: one a step; ``layers``: error in percent by layer, in stage 1."""

    stage: Stage
    block: int
    seq: int = 0
    losses: list[float] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    done: BlockDone | None = None
    _row: tuple[int, list[float | None]] = (0, [])

    def relative(self, steps: int) -> list[float | None]:
        """The loss in each of at most ``HEAT_COLUMNS`` equal ranges of the stage's ``steps``, over that of the first
        step.

        None where nothing is known yet.
        """
        if self._row[0] != len(self.losses):
            width = column_width(steps)
            first = self.losses[0]
            row: list[float | None] = []
            for start in range(0, len(self.losses), width):
                part = self.losses[start : start + width]
                ratio = sum(part) / len(part) / first if first else math.nan
                row.append(round(ratio, 4) if math.isfinite(ratio) else None)
            self._row = (len(self.losses), row)
        return self._row[1]


class RunView:
    """Everything that is shown of one run. Threads may share a view: read it inside ``caught_up``."""

    def __init__(self, run_id: str, kinds: tuple[str, ...] = ()) -> None:
        self.run_id = run_id
        self.seq = 0
        self.progress = RunProgress()
        self.steps: dict[Stage, int] = {}
        self.blocks: dict[tuple[Stage, int], BlockView] = {}
        self.working: tuple[Stage, int] | None = None
        self.latest: tuple[Stage, int] | None = None
        self.evaluations: list[Evaluated] = []
        self.result: RunDone | None = None
        self.failure: str | None = None
        self.asked: Literal["stop", "cancel"] | None = None
        self.memory_bytes = 0
        self._kinds = kinds
        self._worked = 0.0
        self._began: float | None = None
        self._last = 0.0
        self.heated = 0
        self._heated_at = 0.0
        self._lock = threading.RLock()

    @contextmanager
    def caught_up(self, store: RunStore) -> Iterator[None]:
        """Take in what the store has beyond ``seq``, and keep other threads out meanwhile."""
        with self._lock:
            for stored in store.events(self.run_id, self.seq, self._kinds):
                self.update(stored)
            yield

    def update(self, stored: StoredEvent) -> None:
        """Take in one event; those already taken in are passed over."""
        if stored.seq <= self.seq:
            return
        self.seq = stored.seq
        self.progress.update(stored)
        match stored.event:
            case RunQueued():
                # After an end that left no event, the work lasted until the last event there is.
                self._rest(self._last)
                self.failure = self.asked = None
            case RunLoading():
                self._began = stored.time
            case StageStarted() as event:
                self.steps[event.stage] = event.steps
            case BlockStarted() as event:
                # A block that is begun again after a resume begins from nothing.
                self.latest = self.working = (event.stage, event.block)
                self.blocks[self.working] = BlockView(event.stage, event.block, stored.seq)
                self._heated_at = stored.time
            case LayerDone() as event:
                block = self._block(event.stage, event.block, stored.seq)
                block.layers[event.layer] = event.error
            case StepMetric() as event:
                block = self._block(event.stage, event.block, stored.seq)
                # A resumed stage 4 begins in the middle and repeats the steps since it was last saved.
                self.latest = self.working = (event.stage, event.block)
                del block.losses[event.step - 1 :], block.rates[event.step - 1 :]
                block.losses.append(event.loss)
                block.rates.append(event.tokens_per_second)
                if stored.time - self._heated_at >= HEAT_SECONDS:
                    self.heated += 1
                    self._heated_at = stored.time
            case BlockDone() as event:
                block = self._block(event.stage, event.block, stored.seq)
                block.done = event
                self.memory_bytes = event.memory_bytes
                self.working = None
            case Evaluated() as event:
                self.evaluations.append(event)
            case StageDone():
                self.working = None
            case Acknowledged() as event:
                self.asked = event.request
            case RunFailed() as event:
                self.failure = event.message
                self._rest(stored.time)
            case RunDone() as event:
                self.result = event
                self._rest(stored.time)
            case RunStopped():
                self._rest(stored.time)
            case RunStarted():
                pass
        self._last = stored.time

    @property
    def started(self) -> RunStarted | None:
        """What is known since the model was loaded."""
        return self.progress.started

    @property
    def news(self) -> tuple[object, ...]:
        """Changes with everything but the steps and layers of the block in work, and now and then with its steps."""
        known = (self.started is not None, len(self.evaluations), self.asked, self.heated)
        return (*known, self.latest, len(self.finished), len(self.steps))

    def cell(self, stage: Stage, block: int) -> Cell:
        """Where a block is in a stage; in stage 4 all are where the whole model is."""
        block = min(block, stage_parts(stage, block + 1) - 1)
        view = self.blocks.get((stage, block))
        if view is not None and view.done is not None:
            return "diverged" if view.done.diverged else "done"
        return "working" if self.working == (stage, block) else "waiting"

    @property
    def finished(self) -> list[BlockView]:
        """The finished blocks of all stages, in the order of stages and blocks."""
        order = self.started.stages if self.started is not None else ()
        done = [view for view in self.blocks.values() if view.done is not None]
        return sorted(done, key=lambda view: (order.index(view.stage), view.block))

    @property
    def diverged(self) -> list[BlockView]:
        return [view for view in self.finished if view.done is not None and view.done.diverged]

    @property
    def tokens_per_second(self) -> float | None:
        """The middle of the last steps' rates; None before the first step."""
        view = self.blocks.get(self.latest) if self.latest is not None else None
        if view is None or not view.rates:
            return None
        recent = sorted(view.rates[-9:])
        return recent[len(recent) // 2]

    @property
    def perplexities(self) -> dict[str, Evaluated]:
        """The newest evaluation of the teacher and of each stage, on the text that was evaluated last."""
        if not self.evaluations:
            return {}
        text = self.evaluations[-1].text
        return {event.what: event for event in self.evaluations if event.text == text}

    def elapsed(self, now: float) -> float:
        """Seconds that the run's workers have worked; ``now``: seconds since the epoch, or the end of a dead worker."""
        return self._worked + (max(0.0, now - self._began) if self._began is not None else 0.0)

    @property
    def last_time(self) -> float:
        """When the last event came, in seconds since the epoch."""
        return self._last

    def seconds_left(self, now: float, expected: Mapping[Stage, float]) -> float | None:
        """Time left, once a first block is done. ``expected``: how long the stages take relative to each other.

        The finished blocks say how long that is in seconds here and now.
        """
        if self.started is None:
            return None
        blocks = self.started.blocks
        planned = sum(expected.get(view.stage, math.nan) / stage_parts(view.stage, blocks) for view in self.finished)
        taken = sum(view.done.seconds for view in self.finished if view.done is not None)
        pace = taken / planned if planned else math.nan
        self.progress.expected = {stage: pace * share for stage, share in expected.items()} if pace == pace else {}
        return self.progress.seconds_left(now)

    def _block(self, stage: Stage, block: int, seq: int) -> BlockView:
        view = self.blocks.setdefault((stage, block), BlockView(stage, block))
        view.seq = seq
        return view

    def _rest(self, moment: float) -> None:
        """No worker works from here on."""
        if self._began is not None:
            self._worked += max(0.0, moment - self._began)
        self._began = self.working = None
