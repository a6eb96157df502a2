"""A run's events folded into its state: curves, cells, times and figures; and curves thinned out to few points."""

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
    BlockStarted,
    Evaluated,
    Event,
    LayerDone,
    RunDone,
    RunFailed,
    RunLoading,
    RunQueued,
    RunStopped,
    StageDone,
    StageStarted,
)
from lbllm.runs.curves import MAX_POINTS, points, smoothed
from lbllm.runs.store import RunStore
from lbllm.runs.view import HEAT_SECONDS, SUMMARY_KINDS, RunView
from lbllm.sections import PAPER_STAGES, Stage
from tests.helpers.run_events import STEPS, block, done, feed, folded, started, step, whole_run

EXPECTED: dict[Stage, float] = {"ptq": 100.0, "wat": 1000.0}


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
    feed(view, (10, LayerDone(stage="ptq", block=1, layer="q", error=3)))
    assert view.news == news
    feed(view, (11, done("ptq", 1)))
    assert view.news != news
    assert view.cell("ptq", 1) == "done"


def test_the_whole_model_in_stage_4_is_one_block_whose_steps_may_come_again() -> None:
    events: list[Event] = [started(stages=("ptq", "e2e"))]
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
    feed(view, (50.0, done("e2e", 0)))
    assert [view.cell("e2e", block) for block in (0, 1)] == ["done", "done"]
    assert view.seconds_left(100.0, {"ptq": 10, "e2e": 10}) == 0


def test_time_counts_while_a_worker_works() -> None:
    view = folded((100, RunQueued()), (110, RunLoading()), (120, started()), (130, RunStopped(request="stop")))
    assert view.elapsed(1000) == 20
    feed(view, (500, RunQueued()))
    feed(view, (600, RunLoading()))
    assert view.elapsed(605) == 25
    # Killed after its last event, and resumed much later.
    feed(view, (610, started()))
    feed(view, (900, RunQueued()))
    assert view.elapsed(1000) == 30
    feed(view, (1000, RunLoading()))
    feed(view, (1001, RunFailed(message="no room")))
    assert view.elapsed(5000) == 31
    assert view.failure == "no room"


def test_time_left_of_this_stage_and_of_the_next_ones() -> None:
    view = RunView("run")
    assert view.seconds_left(0, EXPECTED) is None
    feed(view, (0, RunLoading()), (5, started(4, ("ptq", "wat"))), (5, StageStarted(stage="ptq", steps=0)))
    assert view.seconds_left(5, EXPECTED) == 1100  # all as expected
    feed(view, (5, BlockStarted(stage="ptq", block=0)), (15, done("ptq", 0)))
    feed(view, (15, BlockStarted(stage="ptq", block=1)))
    # A block took 10 s instead of 25 s, so the next stage takes 400 s instead of 1000 s.
    assert view.seconds_left(15, EXPECTED) == 30 + 400
    assert view.seconds_left(19, EXPECTED) == 26 + 400
    assert view.seconds_left(99, EXPECTED) == 20 + 400  # this block takes longer than the others did
    feed(view, (25, done("ptq", 1)), (35, StageDone(stage="ptq", seconds=30)))
    feed(view, (40, StageStarted(stage="wat", steps=8)), (40, BlockStarted(stage="wat", block=0)))
    assert view.seconds_left(40, EXPECTED) == 400
    feed(view, (60, step("wat", 0, 2, 0.1)))
    assert view.seconds_left(60, EXPECTED) == pytest.approx(4 * 80 - 20)  # a quarter of the block took 20 s


def test_time_left_counts_evaluations_and_the_passes_between_blocks() -> None:
    view = folded((0, RunLoading()), (5, started(4, ("ptq", "wat"))))
    feed(view, (25, Evaluated(what="teacher", text="held-out", perplexity=9.0, tokens=99)))
    feed(view, (25, StageStarted(stage="ptq", steps=0)))
    assert view.seconds_left(25, EXPECTED) == 1100 + 2 * 20  # an evaluation takes what that of the teacher took
    # The block trained for 10 s, and its inputs were brought in 15 s: 25 s, as was expected.
    feed(view, (40, BlockStarted(stage="ptq", block=0)), (50, done("ptq", 0)))
    assert view.seconds_left(50, EXPECTED) == 75 + 1000 + 40
    for number in (1, 2, 3):
        feed(view, (25 + 25 * number, BlockStarted(stage="ptq", block=number)), (50 + 25 * number, done("ptq", number)))
    feed(view, (125, StageDone(stage="ptq", seconds=100)))
    assert view.seconds_left(130, EXPECTED) == 1000 + 40 - 5
    feed(view, (150, Evaluated(what="ptq", text="held-out", perplexity=20.0, tokens=99)))
    assert view.seconds_left(150, EXPECTED) == 1000 + 25


def test_time_left_after_a_resume_and_without_expectation() -> None:
    view = folded((0, started(4, ("ptq", "wat"), resumed=3)), (0, StageStarted(stage="wat", steps=8)))
    assert view.seconds_left(0, {}) is None
    feed(view, (0, BlockStarted(stage="wat", block=2)), (10, done("wat", 2)))
    assert view.seconds_left(10, {}) == 10


def test_a_resumed_worker_passes_finished_stages_and_blocks_in_no_time() -> None:
    expected: dict[Stage, float] = {"ptq": 20.0, "wat": 20.0, "aar": 40.0}
    events = whole_run()
    resumed = events.index(started(resumed=3))
    view = folded(*((float(k), event) for k, event in enumerate(events[: resumed + 2])))
    assert (view.stage, view.blocks_done("ptq"), view.blocks_done("wat")) == ("ptq", 2, 1)
    # The finished blocks took 10 s each, as was expected of them; of stage 2 one is left.
    assert view.seconds_left(view.last_time, expected) == 10 + 40


def test_the_time_between_two_workers_is_not_work_on_the_block_that_stage_4_continues() -> None:
    begun: list[Event] = [RunLoading(), started(stages=("e2e",)), StageStarted(stage="e2e", steps=10)]
    view = folded(*((0, event) for event in (*begun, BlockStarted(stage="e2e", block=0))), (20, step("e2e", 0, 2, 1.0)))
    assert view.seconds_left(20, {}) == 100 - 20
    feed(view, *((5000, event) for event in (RunQueued(), *begun)), (5050, step("e2e", 0, 3, 1.0)))
    feed(view, (5060, step("e2e", 0, 4, 1.0)))
    assert view.seconds_left(5060, {}) == pytest.approx(75 - 30)


def test_time_left_follows_the_pace_of_the_finished_blocks() -> None:
    expected: dict[Stage, float] = {"ptq": 1.0, "wat": 3.0, "aar": 2.0}
    events: list[tuple[float, Event]] = [(0, RunLoading()), (0, started()), (0, StageStarted(stage="ptq", steps=0))]
    view = folded(*events, (0, BlockStarted(stage="ptq", block=0)))
    assert view.seconds_left(0, expected) == 6
    assert view.seconds_left(0, {}) is None
    view = folded(*events, (0, BlockStarted(stage="ptq", block=0)), (10, done("ptq", 0, seconds=10)))
    # One of two blocks of stage 1 took 10 s, so the stages take 20, 60 and 40 s.
    assert view.seconds_left(10, expected) == pytest.approx(10 + 60 + 40)
    assert view.seconds_left(10, {}) is None


def test_no_time_is_left_after_the_last_block_and_none_is_known_of_a_run_that_ends() -> None:
    begun: list[Event] = [RunLoading(), started(2, ("ptq", "wat")), StageStarted(stage="wat", steps=4)]
    view = folded(*((0.0, event) for event in (*begun, BlockStarted(stage="wat", block=0))), (10.0, done("wat", 0)))
    assert view.seconds_left(10, EXPECTED) == 10
    feed(view, (10.0, BlockStarted(stage="wat", block=1)), (20.0, done("wat", 1)))
    assert view.seconds_left(20, EXPECTED) == 0
    feed(view, (20.0, Acknowledged(request="stop")))
    assert view.seconds_left(20, EXPECTED) is None


def test_phases_of_a_run_and_what_was_asked_of_it() -> None:
    view = RunView("run")
    phases = [(view.phase, view.asked)]
    for event in (
        RunQueued(),
        RunLoading(),
        Acknowledged(request="stop"),
        started(),
        RunStopped(request="stop"),
        RunQueued(),
        RunLoading(),
        RunFailed(message="no room"),
        RunQueued(),
        RunStopped(request="cancel"),
    ):
        feed(view, (0.0, event))
        phases.append((view.phase, view.asked))
    assert phases == [
        ("new", None),
        ("queued", None),
        ("loading", None),
        ("loading", "stop"),
        ("running", "stop"),  # while the model is loaded, too, a request counts
        ("stopped", "stop"),
        ("queued", None),
        ("loading", None),
        ("failed", None),
        ("queued", None),
        ("cancelled", None),
    ]
    feed(view, (0.0, RunDone(path="x", bpw=3.0, disk_bytes=1, seconds=1)))
    assert (view.phase, view.failure) == ("done", None)


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
        feed(view, (number, step("wat", 0, number, loss)))
    block_view = view.blocks["wat", 0]
    assert block_view.relative(steps=80) == [0.75, 0.25, 1.5]  # two steps a column
    assert view.tokens_per_second == 103


def test_a_long_blocks_row_of_the_heat_map_is_drawn_before_the_block_is_done() -> None:
    view = folded((0, started()), (0, BlockStarted(stage="wat", block=0)))
    seen = [view.news]
    for number in range(1, 101):
        feed(view, (float(number), step("wat", 0, number, 1.0)))
        if view.news != seen[-1]:
            seen.append(view.news)
    assert len(seen) == 1 + math.floor(100 / HEAT_SECONDS)
