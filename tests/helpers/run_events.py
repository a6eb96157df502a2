"""Events of made-up runs, for readers of events."""

from __future__ import annotations

from lbllm.events import (
    Acknowledged,
    BlockDone,
    BlockStarted,
    Event,
    LayerDone,
    RunDone,
    RunLoading,
    RunQueued,
    RunStarted,
    RunStopped,
    StageDone,
    StageStarted,
    StepMetric,
    StoredEvent,
)
from lbllm.runs.view import RunView
from lbllm.sections import PAPER_STAGES, Stage

STEPS = 6  # of a block in a stage of ``block``


def started(blocks: int = 2, stages: tuple[Stage, ...] = PAPER_STAGES, resumed: int = 0) -> RunStarted:
    return RunStarted(
        stages=stages,
        blocks=blocks,
        layers=7 * blocks,
        weights=12_345,
        device="cpu",
        corpus_hash="0" * 64,
        tokens=1024,
        bpw=3.25,
        resumed_blocks=resumed,
    )


def step(stage: Stage, block: int, number: int, loss: float, reg: float = 0.0) -> StepMetric:
    rate = 100 + number
    return StepMetric(stage=stage, block=block, step=number, loss=loss, reg=reg, lr=0.01, tokens_per_second=rate)


def done(stage: Stage, block: int, *, seconds: float = 10, diverged: bool = False) -> BlockDone:
    return BlockDone(
        stage=stage,
        block=block,
        loss_before=0.5,
        loss_after=0.25,
        seconds=seconds,
        memory_bytes=2_000_000_000,
        diverged=diverged,
    )


def block(stage: Stage, number: int) -> list[Event]:
    """All events of one block."""
    inner: list[Event] = [LayerDone(stage="ptq", block=number, layer=name, error=5) for name in ("a.q", "a.k")]
    if stage != "ptq":
        inner = [step(stage, number, k, 1 / k) for k in range(1, STEPS + 1)]
    return [BlockStarted(stage=stage, block=number), *inner, done(stage, number)]


def whole_run() -> list[Event]:
    """A run with a stop and a resume in the middle of a block."""
    events: list[Event] = [RunQueued(), RunLoading(), started(), StageStarted(stage="ptq", steps=0)]
    events += [*block("ptq", 0), *block("ptq", 1), StageDone(stage="ptq", seconds=20)]
    events += [StageStarted(stage="wat", steps=STEPS), *block("wat", 0), *block("wat", 1)[:4]]
    events += [Acknowledged(request="stop"), RunStopped(request="stop")]
    # A resumed worker goes through all stages again, without the finished blocks.
    events += [RunQueued(), RunLoading(), started(resumed=3)]
    events += [StageStarted(stage="ptq", steps=0), StageDone(stage="ptq", seconds=1)]
    events += [StageStarted(stage="wat", steps=STEPS), *block("wat", 1), StageDone(stage="wat", seconds=20)]
    events += [StageStarted(stage="aar", steps=STEPS), *block("aar", 0), *block("aar", 1)]
    return [*events, RunDone(path="x", bpw=3.25, disk_bytes=10**8, seconds=50)]


def feed(view: RunView, *events: tuple[float, Event]) -> RunView:
    """Let the view take in events with their times, after those that it has; returns it."""
    for time, event in events:
        view.update(StoredEvent(seq=view.seq + 1, time=time, event=event))
    return view


def folded(*events: tuple[float, Event]) -> RunView:
    """A view of a run that has these events, with their times."""
    return feed(RunView("run"), *events)
