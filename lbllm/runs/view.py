"""The state of a run, folded from its events: for pages and the terminal alike.

    view = RunView(run_id)
    with view.caught_up(store):
        view.blocks["wat", 3].losses

A view holds nothing that the store doesn't: each reader builds its own from event 1, then reads what came after
``seq``. So a reload, a second reader and a new process all show the same.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lbllm.events import (
    Acknowledged,
    BlockDone,
    BlockStarted,
    Evaluated,
    ExpertDone,
    LayerDone,
    RunDone,
    RunFailed,
    RunLoading,
    RunQueued,
    RunStarted,
    RunStopped,
    SpeedMeasured,
    StageDone,
    StageStarted,
    StepMetric,
    StoredEvent,
    stage_parts,
)
from lbllm.runs.database import LIFECYCLE
from lbllm.runs.store import Request, RunStore
from lbllm.sections import STAGES, Stage

HEAT_COLUMNS = 40
HEAT_SECONDS = 15.0  # between two redraws of a long block's row in the heat map
RECENT_BLOCKS = 5  # whose mean time predicts that of the next block
# Enough for a list of runs; the other kinds, the steps above all, are most of a run's events.
SUMMARY_KINDS: tuple[str, ...] = (
    *(*LIFECYCLE, "stage_started", "block_started", "block_done"),
    *("evaluated", "speed_measured"),
)
Cell = Literal["waiting", "working", "done", "diverged"]
# Before its first event a run is "new".
Phase = Literal["new", "queued", "loading", "running", "done", "stopped", "cancelled", "failed"]
WITH_WORKER: tuple[Phase, ...] = ("loading", "running")


def column_width(steps: int) -> int:
    """Steps per column of the heat map, for a stage with ``steps`` steps per block."""
    return math.ceil(max(steps, 1) / HEAT_COLUMNS)


@dataclass
class BlockView:
    """One block in one stage. ``losses``, ``rates``: one per step; ``probes``: the loss on held-out tokens by step, at
    the steps where it was measured; ``layers``: error in percent by layer, in stage 1; ``experts``: those of the block
    that are done, by name.

    ``last``: its latest step, layer or expert; ``worked``: seconds of work on it until the run's last event; ``took``:
    seconds from the block before it, or the stage's start, until it was done, with the passes that bring its inputs.
    """

    stage: Stage
    block: int
    seq: int = 0
    losses: list[float] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    experts: dict[str, ExpertDone] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    probes: dict[int, float] = field(default_factory=dict)
    last: StepMetric | LayerDone | ExpertDone | None = None
    done: BlockDone | None = None
    worked: float = 0.0
    took: float = 0.0
    _row: tuple[int, list[float | None]] = (0, [])

    def relative(self, steps: int) -> list[float | None]:
        """The mean loss in each of at most ``HEAT_COLUMNS`` equal ranges of ``steps``, divided by the first step's.

        None where that is not finite.
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
    """Everything that a reader shows of one run. Threads may share a view: read it inside ``caught_up``."""

    def __init__(self, run_id: str, kinds: tuple[str, ...] = ()) -> None:
        self.run_id = run_id
        self.seq = 0
        self.last_time = 0.0  # of the last event, in seconds since the epoch
        self.phase: Phase = "new"
        self.asked: Request | None = None
        self.started: RunStarted | None = None
        self.stage: Stage | None = None
        self.steps: dict[Stage, int] = {}
        self.blocks: dict[tuple[Stage, int], BlockView] = {}
        self.working: tuple[Stage, int] | None = None
        self.latest: tuple[Stage, int] | None = None
        self.last_done: BlockDone | None = None
        self.evaluations: list[Evaluated] = []
        self.speed: SpeedMeasured | None = None
        self.result: RunDone | None = None
        self.failure: str | None = None
        self.heated = 0
        self._heated_at = 0.0
        self._worked = 0.0
        # Seconds of work when the last whole part of the run, a block or an evaluation, was done; None where what
        # follows repeats earlier work, after a resume.
        self._part_began: float | None = None
        self._evaluations_took: list[float] = []
        self._kinds = kinds
        self._lock = threading.RLock()

    @contextmanager
    def caught_up(self, store: RunStore) -> Iterator[None]:
        """Take in the store's events after ``seq``, and keep other threads out until the end of the block."""
        with self._lock:
            for stored in store.events(self.run_id, self.seq, self._kinds):
                self.update(stored)
            yield

    def update(self, stored: StoredEvent) -> None:
        """Take in one event; events come in order, and those taken in before are skipped."""
        if stored.seq <= self.seq:
            return
        # A killed worker leaves no event at its end, so its work counts until its last event.
        if not isinstance(stored.event, RunQueued):
            passed = self._since_last(stored.time)
            self._worked += passed
            if self.working is not None:
                self.blocks[self.working].worked += passed
        self.seq, self.last_time = stored.seq, stored.time
        match stored.event:
            case RunQueued():
                self._end_work("queued")
                self.failure = self.asked = self._part_began = None
            case RunLoading():
                self.phase = "loading"
            case RunStarted() as event:
                self.started, self.phase = event, "running"
                self._part_began = self._worked
            case StageStarted() as event:
                self.stage = event.stage
                self.steps[event.stage] = event.steps
                self._part_began = None if self.blocks_done(event.stage) else self._worked
            case BlockStarted() as event:
                # After a resume an unfinished block begins again from nothing.
                self.latest = self.working = (event.stage, event.block)
                self.blocks[self.working] = BlockView(event.stage, event.block, stored.seq)
                self._heated_at = stored.time
            case LayerDone() as event:
                block = self._block(event.stage, event.block)
                block.layers[event.layer] = event.error
                block.last = event
            case ExpertDone() as event:
                block = self._block(event.stage, event.block)
                block.experts[event.expert] = block.last = event
            case StepMetric() as event:
                block = self._block(event.stage, event.block)
                # A resumed stage 4 begins in the middle and repeats the steps since it was last saved.
                self.latest = self.working = (event.stage, event.block)
                if event.step <= len(block.losses):
                    del block.losses[event.step - 1 :], block.rates[event.step - 1 :]
                    block.probes = {step: loss for step, loss in block.probes.items() if step < event.step}
                block.losses.append(event.loss)
                block.rates.append(event.tokens_per_second)
                if event.probe is not None:
                    block.probes[event.step] = event.probe
                block.last = event
                if stored.time - self._heated_at >= HEAT_SECONDS:
                    self.heated += 1
                    self._heated_at = stored.time
            case BlockDone() as event:
                block = self._block(event.stage, event.block)
                block.done = self.last_done = event
                block.took = max(event.seconds, self._part_ends() or 0.0)
                self.working = None
            case Evaluated() as event:
                self.evaluations.append(event)
                if (seconds := self._part_ends()) is not None:
                    self._evaluations_took.append(seconds)
            case SpeedMeasured() as event:
                self.speed = event
            case StageDone():
                self.working = None
            case Acknowledged() as event:
                self.asked = event.request
            case RunDone() as event:
                self.result = event
                self._end_work("done")
            case RunStopped() as event:
                self._end_work("stopped" if event.request == "stop" else "cancelled")
            case RunFailed() as event:
                self.failure = event.message
                self._end_work("failed")

    @property
    def news(self) -> tuple[object, ...]:
        """Changes with every event, except that the steps and layers of one block change it only now and then."""
        known = (self.started is not None, len(self.evaluations), self.asked, self.heated)
        return (*known, self.latest, len(self.finished), len(self.steps))

    def cell(self, stage: Stage, block: int) -> Cell:
        """What has been done with a block in a stage; in stage 4 all blocks are one."""
        block = min(block, stage_parts(stage, block + 1) - 1)
        view = self.blocks.get((stage, block))
        if view is not None and view.done is not None:
            return "diverged" if view.done.diverged else "done"
        return "working" if self.working == (stage, block) else "waiting"

    @property
    def finished(self) -> list[BlockView]:
        """The finished blocks of all stages, in the order of stages and blocks."""
        done = [view for view in self.blocks.values() if view.done is not None]
        return sorted(done, key=lambda view: (STAGES.index(view.stage), view.block))

    @property
    def diverged(self) -> list[BlockView]:
        """The finished blocks that keep their state from before the stage."""
        return [view for view in self.finished if view.done is not None and view.done.diverged]

    @property
    def current(self) -> BlockView | None:
        """The block of the current stage that was worked on last."""
        view = self.blocks.get(self.latest) if self.latest is not None else None
        return view if view is not None and view.stage == self.stage else None

    def blocks_done(self, stage: Stage) -> int:
        """How many blocks of a stage are finished. Blocks go in order: those before the latest one are."""
        known = (view for view in self.blocks.values() if view.stage == stage)
        return max((view.block + (view.done is not None) for view in known), default=0)

    @property
    def parts(self) -> tuple[int, int]:
        """How many parts of all stages are finished, and how many there are; (0, 0) before the model is loaded."""
        if self.started is None:
            return 0, 0
        stages = self.started.stages
        counts = {stage: stage_parts(stage, self.started.blocks) for stage in stages}
        return sum(min(self.blocks_done(stage), counts[stage]) for stage in stages), sum(counts.values())

    @property
    def part_done(self) -> float:
        """The share of its steps that the current block has done, 0 where it is finished or has no steps."""
        view = self.current
        if view is None or view.done is not None or not isinstance(view.last, StepMetric):
            return 0.0
        steps = self.steps.get(view.stage, 0)
        return min(1.0, view.last.step / steps) if steps else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """The median rate of the last steps; None before the first step."""
        view = self.blocks.get(self.latest) if self.latest is not None else None
        if view is None or not view.rates:
            return None
        recent = sorted(view.rates[-9:])
        return recent[len(recent) // 2]

    @property
    def memory_bytes(self) -> int:
        """The worker's peak memory when it finished its last block; 0 before the first."""
        return self.last_done.memory_bytes if self.last_done is not None else 0

    @property
    def perplexities(self) -> dict[str, Evaluated]:
        """The newest evaluation of the teacher and of each stage, on the text that was evaluated last."""
        if not self.evaluations:
            return {}
        text = self.evaluations[-1].text
        return {event.what: event for event in self.evaluations if event.text == text}

    def elapsed(self, now: float) -> float:
        """Seconds that the run's workers have worked; ``now``: seconds since the epoch, or the end of a dead worker."""
        return self._worked + self._since_last(now)

    def seconds_left(self, now: float, expected: Mapping[Stage, float]) -> float | None:
        """Seconds until the run's last evaluation; None where they aren't known or the run isn't working.

        The last finished blocks of a stage tell the time of its next ones; before the first, the current block's steps
        do. Other stages take ``expected``, the estimated seconds of each stage, times the ratio of real to expected
        time of the finished blocks of all stages. Evaluations take what the last one took.
        """
        if self.started is None or self.stage is None or self.phase != "running" or self.asked is not None:
            return None
        stages = self.started.stages
        if self.stage not in stages:  # an event of a damaged store is missing
            return None
        total = 0.0
        for stage in stages[stages.index(self.stage) :]:
            left = stage_parts(stage, self.started.blocks) - self.blocks_done(stage)
            total += self._evaluation_left(stage, now, running=left <= 0)
            if left <= 0:
                continue
            seconds = self._block_seconds(stage, now, expected)
            if seconds is None:
                return None
            total += left * seconds
            if self.working is not None and self.working[0] == stage:
                total -= min(self._worked_on_block(now), seconds)
        return max(0.0, total)

    def _evaluation_left(self, stage: Stage, now: float, *, running: bool) -> float:
        """The seconds until the evaluation after a stage ends; 0 where the run evaluates nothing."""
        if not self._evaluations_took or stage in self.perplexities:
            return 0.0
        return max(0.0, self._evaluations_took[-1] - (self._since_last(now) if running else 0.0))

    def _block_seconds(self, stage: Stage, now: float, expected: Mapping[Stage, float]) -> float | None:
        """The seconds that the next block of a stage takes; None where they aren't known."""
        recent = [view.took for view in self.finished if view.stage == stage]
        if recent:
            # The first block of a process is slower; the next block takes about as long as the latest ones.
            recent = recent[-RECENT_BLOCKS:]
            return sum(recent) / len(recent)
        if self.working is not None and self.working[0] == stage and self.part_done > 0:
            return self._worked_on_block(now) / self.part_done
        if stage in expected and self.started is not None:
            return self._pace(expected) * expected[stage] / stage_parts(stage, self.started.blocks)
        return None

    def _pace(self, expected: Mapping[Stage, float]) -> float:
        """The ratio of real to expected time of all finished blocks; 1 before the first."""
        blocks = self.started.blocks if self.started is not None else 1
        known = [view for view in self.finished if view.stage in expected]
        planned = sum(expected[view.stage] / stage_parts(view.stage, blocks) for view in known)
        return sum(view.took for view in known) / planned if planned else 1.0

    def _part_ends(self) -> float | None:
        """The seconds of the block or the evaluation that is done now; None where they aren't its own."""
        began, self._part_began = self._part_began, self._worked
        return None if began is None else self._worked - began

    def _worked_on_block(self, now: float) -> float:
        return self.blocks[self.working].worked + self._since_last(now) if self.working is not None else 0.0

    def _since_last(self, now: float) -> float:
        """Seconds of work since the last event; 0 where no worker is at work."""
        return max(0.0, now - self.last_time) if self.phase in WITH_WORKER else 0.0

    def _block(self, stage: Stage, block: int) -> BlockView:
        view = self.blocks.setdefault((stage, block), BlockView(stage, block))
        view.seq = self.seq
        return view

    def _end_work(self, phase: Phase) -> None:
        """Stop the clock: no worker is active."""
        self.phase, self.working = phase, None
