"""What a page shows of a run: its events folded into curves and cells, and thinned out to few points."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbllm.config import make_config
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
)
from lbllm.runs.store import RunStore
from lbllm.runs.view import HEAT_SECONDS, MAX_POINTS, SUMMARY_KINDS, RunView, points, smoothed
from lbllm.sections import PAPER_STAGES, Stage

STEPS = 6


def started(blocks: int = 2) -> RunStarted:
    return RunStarted(
        stages=PAPER_STAGES,
        blocks=blocks,
        layers=2 * blocks,
        weights=1000,
        device="cpu",
        corpus_hash="0",
        tokens=512,
        bpw=3.25,
    )


def step(stage: Stage, block: int, number: int, loss: float) -> StepMetric:
    return StepMetric(stage=stage, block=block, step=number, loss=loss, lr=0.01, tokens_per_second=100 + number)


def done(stage: Stage, block: int, *, seconds: float = 10, diverged: bool = False) -> BlockDone:
    return BlockDone(
        stage=stage,
        block=block,
        loss_before=0.5,
        loss_after=0.25,
        seconds=seconds,
        memory_bytes=10**9,
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
    events += [RunQueued(), RunLoading(), started(), StageStarted(stage="wat", steps=STEPS), *block("wat", 1)]
    events += [StageStarted(stage="aar", steps=STEPS), *block("aar", 0), *block("aar", 1)]
    return [*events, RunDone(path="x", bpw=3.25, disk_bytes=10**8, seconds=50)]


def folded(*events: tuple[float, Event]) -> RunView:
    view = RunView("run")
    for seq, (time, event) in enumerate(events, start=1):
        view.update(StoredEvent(seq=seq, time=time, event=event))
    return view


@pytest.mark.parametrize("seed", range(5))
def test_however_the_events_arrive_the_view_is_the_same(tmp_path: Path, seed: int) -> None:
    store = RunStore(tmp_path)
    run = store.create(make_config("preview"))
    view = RunView(run.id)
    order = random.Random(seed)
    for event in whole_run():
        store.append(run.id, event)
        if order.random() < 0.3:
            with view.caught_up(store):
                pass
    fresh = RunView(run.id)
    with view.caught_up(store), fresh.caught_up(store):
        # A cursor that falls behind (a reader that starts over) doubles nothing.
        for stored in store.events(run.id)[:20]:
            view.update(stored)
        for one in (view, fresh):
            assert one.seq == len(whole_run())
            assert [(b.stage, b.block) for b in one.finished] == [(stage, k) for stage in PAPER_STAGES for k in (0, 1)]
            assert one.blocks["ptq", 1].layers == {"a.q": 5, "a.k": 5}
            # The block that was begun twice has its second curve alone.
            assert one.blocks["wat", 1].losses == [1 / k for k in range(1, STEPS + 1)]
            assert one.result is not None
        assert view.blocks == fresh.blocks
    store.close()


def test_a_list_of_runs_needs_few_of_the_events(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create(make_config("preview"))
    for event in [*whole_run(), Evaluated(what="aar", text="held-out", perplexity=30.5, tokens=99)]:
        store.append(run.id, event)
    view = RunView(run.id, SUMMARY_KINDS)
    with view.caught_up(store):
        assert len(view.finished) == 6
        assert view.perplexities["aar"].perplexity == 30.5
        assert not any(block.losses for block in view.blocks.values())
    assert all(s.event.kind == "step" for s in store.events(run.id, 0, ("step",)))
    store.close()


def test_cells_of_the_timeline() -> None:
    view = folded(
        (0, RunLoading()),
        (5, started()),
        (5, StageStarted(stage="ptq", steps=0)),
        (5, BlockStarted(stage="ptq", block=0)),
        (9, done("ptq", 0, diverged=True)),
        (9, BlockStarted(stage="ptq", block=1)),
    )
    assert [view.cell("ptq", 0), view.cell("ptq", 1), view.cell("wat", 0)] == ["diverged", "working", "waiting"]
    assert [block.block for block in view.diverged] == [0]
    news = view.news
    view.update(StoredEvent(seq=7, time=10, event=LayerDone(stage="ptq", block=1, layer="q", error=3)))
    assert view.news == news
    view.update(StoredEvent(seq=8, time=11, event=done("ptq", 1)))
    assert view.news != news
    assert view.cell("ptq", 1) == "done"


def test_the_whole_model_in_stage_4_is_one_block_whose_steps_may_come_again() -> None:
    events: list[Event] = [RunStarted(**(started().model_dump() | {"stages": ("ptq", "e2e")}))]
    events += [
        *block("ptq", 0),
        *block("ptq", 1),
        StageStarted(stage="e2e", steps=5),
        BlockStarted(stage="e2e", block=0),
    ]
    events += [step("e2e", 0, number, 1 / number) for number in (1, 2, 3, 4)]
    # Killed after its last saving, which was after step 2.
    resumed: list[Event] = [RunQueued(), RunLoading(), events[0], StageStarted(stage="e2e", steps=5)]
    resumed += [step("e2e", 0, number, 2 / number) for number in (3, 4)]
    view = folded(*((float(k), event) for k, event in enumerate(events + resumed)))
    assert view.blocks["e2e", 0].losses == [1, 1 / 2, 2 / 3, 2 / 4]
    assert [view.cell("e2e", block) for block in (0, 1)] == ["working", "working"]
    assert view.seconds_left(100.0, {"ptq": 10, "e2e": 10}) is not None
    end = StoredEvent(seq=view.seq + 1, time=50.0, event=done("e2e", 0))
    view.update(end)
    assert [view.cell("e2e", block) for block in (0, 1)] == ["done", "done"]
    assert view.seconds_left(100.0, {"ptq": 10, "e2e": 10}) == 0


def test_time_counts_while_a_worker_works() -> None:
    view = folded((100, RunQueued()), (110, RunLoading()), (120, started()), (130, RunStopped(request="stop")))
    assert view.elapsed(1000) == 20
    view.update(StoredEvent(seq=5, time=500, event=RunQueued()))
    view.update(StoredEvent(seq=6, time=600, event=RunLoading()))
    assert view.elapsed(605) == 25
    # Killed after its last event, and resumed much later.
    view.update(StoredEvent(seq=7, time=610, event=started()))
    view.update(StoredEvent(seq=8, time=900, event=RunQueued()))
    assert view.elapsed(1000) == 30
    view.update(StoredEvent(seq=9, time=1000, event=RunLoading()))
    view.update(StoredEvent(seq=10, time=1001, event=RunFailed(message="no room")))
    assert view.elapsed(5000) == 31
    assert view.failure == "no room"


def test_time_left_follows_the_pace_of_the_finished_blocks() -> None:
    shares: dict[Stage, float] = {"ptq": 1.0, "wat": 3.0, "aar": 2.0}
    events: list[tuple[float, Event]] = [(0, RunLoading()), (0, started()), (0, StageStarted(stage="ptq", steps=0))]
    view = folded(*events, (0, BlockStarted(stage="ptq", block=0)))
    assert view.seconds_left(0, shares) is None
    view = folded(*events, (0, BlockStarted(stage="ptq", block=0)), (10, done("ptq", 0, seconds=10)))
    # One of two blocks of stage 1 took 10 s, so the stages take 20, 60 and 40 s.
    assert view.seconds_left(10, shares) == pytest.approx(10 + 60 + 40)
    assert view.seconds_left(10, {}) is None


@given(st.integers(0, 9000), st.integers(0, 1000))
def test_a_curve_has_few_points_and_all_its_peaks(count: int, seed: int) -> None:
    order = random.Random(seed)
    values = [order.random() for _ in range(count)]
    if count:
        values[order.randrange(count)] = 50.0
    steps, kept = points(values)
    assert len(steps) == len(kept) <= MAX_POINTS
    assert steps == sorted(set(steps))
    assert all(values[at - 1] == value for at, value in zip(steps, kept, strict=True))
    if count:
        assert 50.0 in kept
    if count <= MAX_POINTS:
        assert len(steps) == count


@given(st.integers(1, 5000))
def test_bins_stay_while_a_curve_grows(count: int) -> None:
    values = [math.sin(k) for k in range(count + 1)]
    before, after = points(values[:-1])[0], points(values)[0]
    width = 1
    while math.ceil(len(values) / width) * min(width, 2) > MAX_POINTS:
        width *= 2
    settled = (count - 1) // width * width
    same = [at for at in before if at <= settled] == [at for at in after if at <= settled]
    assert same or len(after) < len(before)  # the bins have just doubled


def test_gaps_where_a_loss_is_no_number() -> None:
    assert points([1.0, math.nan, 2.0, math.inf]) == ([1, 2, 3, 4], [1.0, None, 2.0, None])
    assert smoothed([2.0, math.nan, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smoothed([math.nan, 1.0])[0])


def test_smoothing_follows_the_level_and_drops_the_noise() -> None:
    order = random.Random(0)
    noisy = [5.0 + order.uniform(-1, 1) for _ in range(100)]
    curve = smoothed(noisy)
    assert curve[0] == noisy[0]
    assert max(abs(value - 5) for value in curve[20:]) < 0.5


def test_a_row_of_the_heat_map() -> None:
    view = folded((0, started()), (0, BlockStarted(stage="wat", block=0)))
    for number, loss in enumerate((4.0, 2.0, 1.0, 1.0, 6.0), start=1):
        view.update(StoredEvent(seq=2 + number, time=number, event=step("wat", 0, number, loss)))
    block_view = view.blocks["wat", 0]
    assert block_view.relative(steps=80) == [0.75, 0.25, 1.5]  # two steps a column
    assert view.tokens_per_second == 103


def test_a_long_blocks_row_of_the_heat_map_is_drawn_before_the_block_is_done() -> None:
    view = folded((0, started()), (0, BlockStarted(stage="wat", block=0)))
    seen = [view.news]
    for number in range(1, 101):
        view.update(StoredEvent(seq=2 + number, time=float(number), event=step("wat", 0, number, 1.0)))
        if view.news != seen[-1]:
            seen.append(view.news)
    assert len(seen) == 1 + math.floor(100 / HEAT_SECONDS)
