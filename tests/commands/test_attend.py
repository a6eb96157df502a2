"""What a terminal shows of a run."""

from __future__ import annotations

import io

from rich.console import Console

from lbllm.commands.attend import RunDisplay, line
from lbllm.events import (
    Acknowledged,
    BlockStarted,
    Event,
    LayerDone,
    RunDone,
    RunLoading,
    StageDone,
    StageStarted,
    StepMetric,
    StoredEvent,
)
from lbllm.runs.view import RunView
from lbllm.sections import Stage
from tests.helpers.run_events import done, feed, folded, started

EXPECTED: dict[Stage, float] = {"ptq": 100.0, "wat": 1000.0}


def show(console: Console) -> str:
    events: list[Event] = [
        RunLoading(),
        started(4, ("ptq", "wat")),
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
    with RunDisplay(console, RunView("run"), EXPECTED) as display:
        for seq, event in enumerate(events, start=1):
            display.take(StoredEvent(seq=seq, time=float(seq), event=event))
            display.draw(seq + 0.5)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = show(Console(file=io.StringIO(), width=200)).splitlines()
    assert lines[0] == "loading model and text"
    assert "4 blocks, 28 layers, 12,345 weights at 3.250 bits each, 1,024 tokens, on cpu" in lines
    assert any(text.startswith("block 1/4: loss 0.5 -> 0.25, 10 s, 2.00 GB, about") for text in lines)
    assert any("diverged" in text for text in lines)
    assert "stopping after the current step" in lines
    assert lines[-1] == "done in 1 min 40 s: 1.5 MB at 3.000 bits per binarized weight"
    assert not any("step" in text and "4/8" in text for text in lines)


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


def test_after_the_last_block_no_time_left_is_told() -> None:
    begun: list[Event] = [RunLoading(), started(2, ("ptq", "wat")), StageStarted(stage="wat", steps=4)]
    view = folded(*((0.0, event) for event in (*begun, BlockStarted(stage="wat", block=0))), (10.0, done("wat", 0)))
    assert "about 10 s left" in str(line(view, done("wat", 0), EXPECTED))
    feed(view, (10.0, BlockStarted(stage="wat", block=1)), (20.0, done("wat", 1)))
    assert "left" not in str(line(view, done("wat", 1), EXPECTED))
