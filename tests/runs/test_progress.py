"""What a terminal shows of a run's events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lbllm.events import (
    Acknowledged,
    BlockDone,
    BlockStarted,
    Event,
    LayerDone,
    RunDone,
    RunLoading,
    RunStarted,
    StageDone,
    StageStarted,
    StepMetric,
    StoredEvent,
)
from lbllm.runs.progress import RunDisplay, RunProgress
from lbllm.sections import Stage
from lbllm.units import duration, size

EXPECTED: dict[Stage, float] = {"ptq": 100.0, "wat": 1000.0}


def started(blocks: int = 4, resumed: int = 0) -> RunStarted:
    return RunStarted(
        stages=("ptq", "wat"),
        blocks=blocks,
        layers=7 * blocks,
        weights=12_345,
        device="cpu",
        corpus_hash="0" * 64,
        tokens=1024,
        bpw=3.0,
        resumed_blocks=resumed,
    )


def done(stage: Stage, block: int, *, diverged: bool = False) -> BlockDone:
    return BlockDone(
        stage=stage,
        block=block,
        loss_before=0.5,
        loss_after=0.25,
        seconds=10,
        memory_bytes=2_000_000_000,
        diverged=diverged,
    )


def feed(progress: RunProgress, *events: tuple[float, Event]) -> None:
    for seq, (time, event) in enumerate(events, start=1):
        progress.update(StoredEvent(seq=seq, time=time, event=event))


def test_time_left_of_this_stage_and_of_those_to_come() -> None:
    progress = RunProgress(EXPECTED)
    assert progress.seconds_left(0) is None
    feed(progress, (0, RunLoading()), (5, started()), (5, StageStarted(stage="ptq", steps=0)))
    assert progress.seconds_left(5) == 1100  # all as expected
    feed(progress, (5, BlockStarted(stage="ptq", block=0)), (15, done("ptq", 0)))
    feed(progress, (15, BlockStarted(stage="ptq", block=1)))
    assert progress.seconds_left(15) == 30 + 1000
    assert progress.seconds_left(19) == 26 + 1000
    assert progress.seconds_left(99) == 20 + 1000  # this block takes longer than the others did
    feed(progress, (25, done("ptq", 1)), (35, StageDone(stage="ptq", seconds=30)))
    feed(progress, (40, StageStarted(stage="wat", steps=8)), (40, BlockStarted(stage="wat", block=0)))
    assert progress.seconds_left(40) == 1000
    step = StepMetric(stage="wat", block=0, step=2, loss=0.1, lr=1e-3, tokens_per_second=50)
    feed(progress, (60, step))
    assert progress.seconds_left(60) == pytest.approx(4 * 80 - 20)  # a quarter of the block took 20 s


def test_time_left_after_a_resume_and_without_expectation() -> None:
    progress = RunProgress()
    feed(progress, (0, started(resumed=3)), (0, StageStarted(stage="wat", steps=8)))
    assert progress.seconds_left(0) is None
    feed(progress, (0, BlockStarted(stage="wat", block=2)), (10, done("wat", 2)))
    assert progress.seconds_left(10) == 10


def show(console: Console) -> str:
    events: list[Event] = [
        RunLoading(),
        started(),
        StageStarted(stage="ptq", steps=0),
        BlockStarted(stage="ptq", block=0),
        LayerDone(stage="ptq", block=0, layer="self_attn.q_proj", error=12.5),
        done("ptq", 0),
        StageDone(stage="ptq", seconds=40),
        StageStarted(stage="wat", steps=8),
        BlockStarted(stage="wat", block=0),
        StepMetric(stage="wat", block=0, step=4, loss=0.125, reg=0.01, lr=1e-3, tokens_per_second=1234),
        done("wat", 0, diverged=True),
        Acknowledged(request="stop"),
        RunDone(path="x", bpw=3.0, disk_bytes=1_500_000, seconds=100),
    ]
    with RunDisplay(console, RunProgress(EXPECTED)) as display:
        for seq, event in enumerate(events, start=1):
            display.take(StoredEvent(seq=seq, time=float(seq), event=event))
            display.draw(seq + 0.5)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = show(Console(file=io.StringIO(), width=200)).splitlines()
    assert lines[0] == "loading model and text"
    assert "4 blocks, 28 layers, 12,345 weights at 3.000 bits, 1,024 tokens, on cpu" in lines
    assert any(line.startswith("block 1/4: loss 0.5 -> 0.25, 10 s, 2.00 GB, about") for line in lines)
    assert any("diverged" in line for line in lines)
    assert lines[-1] == "done in 1 min 40 s: 1.5 MB at 3.000 bits per weight"
    assert not any("step" in line and "4/8" in line for line in lines)


def test_live_display_in_a_terminal() -> None:
    text = show(Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None))
    for part in (
        "Stage 2: weight-aware training  (2 of 2)",
        "block 1/4",
        "step 4/8: loss 0.125 + 0.01 polarization, 1,234 tokens/s",
        "self_attn.q_proj: output error 12.50%",
        "left",
        "stopping",
    ):
        assert part in text


def test_a_silent_console_shows_nothing() -> None:
    assert show(Console(file=io.StringIO(), quiet=True, force_terminal=True)) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (3.62, "3.6 s"), (12.3, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (92_100_000, "92.1 MB"), (1.39e9, "1.39 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_after_the_last_block_no_time_left_is_told() -> None:
    progress = RunProgress(EXPECTED)
    begun: list[Event] = [
        RunLoading(),
        started(blocks=2),
        StageStarted(stage="wat", steps=4),
        BlockStarted(stage="wat", block=0),
    ]
    feed(progress, *((0.0, event) for event in begun), (10.0, done("wat", 0)))
    assert "about 10 s left" in str(progress.line(done("wat", 0)))
    progress.update(StoredEvent(seq=6, time=10.0, event=BlockStarted(stage="wat", block=1)))
    progress.update(StoredEvent(seq=7, time=20.0, event=done("wat", 1)))
    assert "left" not in str(progress.line(done("wat", 1)))
