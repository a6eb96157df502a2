"""The page that watches runs, in a real browser over a real server: whole journeys, few and dense."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from lbllm.config import RunConfig
from lbllm.events import (
    BlockStarted,
    Evaluated,
    RunFailed,
)
from lbllm.runs.curves import points
from lbllm.runs.store import Run, RunStore
from lbllm.runs.view import RunView
from lbllm.sections import STAGES, Stage
from tests.browser.conftest import Server, wait_until
from tests.helpers.played_run import PlayedRun
from tests.helpers.tiny_runs import stored_run_config

CURVE = "[aria-label^='Block ']"
TIMELINE = "[aria-label='Blocks in each stage']"
BLOCKS = "[aria-label='Loss of all blocks']"
HEAT = "[aria-label='Loss by block and step']"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of seconds."""
    return stored_run_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def endless(short: RunConfig) -> RunConfig:
    """The same with so many steps in stage 2 that it goes on until somebody ends it."""
    return short.model_copy(update={"wat": short.wat.model_copy(update={"epochs": 5000})})


def stamp(page: Page, chart: str) -> int:
    """The number of the last event that a chart shows; 0 before its first drawing."""
    node = page.locator(chart)
    return int(node.get_attribute("data-stamp") or 0) if node.count() == 1 else 0


def lines(page: Page, chart: str) -> dict[str, list[float]]:
    """A chart's traces as the browser draws them."""
    found: dict[str, list[float]] = page.locator(chart).evaluate(
        "node => Object.fromEntries(node.data.map(trace => [trace.uid, [...trace.y]]))"
    )
    return found


def view_of(store: RunStore, run: Run) -> RunView:
    view = RunView(run.id)
    with view.caught_up(store):
        return view


def shown_by_block(page: Page, stage: Stage, wanted: list[float | None]) -> bool:
    return bool(lines(page, BLOCKS)[stage] == pytest.approx(wanted, rel=1e-4))


def shown_as_stored(page: Page, store: RunStore, run: Run) -> None:
    """The page's charts of a run at rest hold each of its events, once."""
    view = view_of(store, run)
    stage, number = view.latest or ("ptq", 0)
    expect(page.locator(CURVE)).to_have_attribute("data-stamp", str(view.blocks[stage, number].seq))
    if stage != "ptq":
        wanted = points(view.blocks[stage, number].losses)[1]
        wait_until(lambda: lines(page, CURVE)["raw"] == pytest.approx(wanted, rel=1e-4), seconds=10)
    for stage in view.started.stages if view.started is not None else ():
        wanted = [b.done.loss_after for b in view.finished if b.stage == stage and b.done is not None]
        wait_until(partial(shown_by_block, page, stage, wanted), seconds=10)


def test_runs_are_watched_stopped_finished_resumed_and_cancelled(
    server: Server, page: Page, context: BrowserContext, short: RunConfig, endless: RunConfig
) -> None:
    store = server.store
    first = store.create(endless, "first")
    second = store.create(short, "second")
    for run in (first, second):  # measuring which precision is faster would take longer than the run
        (run.folder / "precision").write_text("no")
    store.start(first.id)
    wait_until(lambda: store.get(first.id).state == "running")
    store.start(second.id)

    page.goto(server.url("runs"))
    expect(page.get_by_text("queued", exact=True)).to_be_visible()
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    page.get_by_role("button", name="first", exact=True).click()
    expect(page).to_have_url(re.compile(f"run={first.id}"))
    wait_until(lambda: len(lines(page, CURVE).get("raw", ())) > 2 if stamp(page, CURVE) else False)

    # The server dies and comes back: the page goes on by itself.
    seen = stamp(page, CURVE)
    server.stop()
    server.start()
    wait_until(lambda: stamp(page, CURVE) > seen)

    # A second tab and a reload show the same run.
    other = context.new_page()
    other.goto(server.url(f"runs?run={first.id}"))
    page.reload()
    wait_until(lambda: stamp(other, CURVE) > seen)
    wait_until(lambda: stamp(page, CURVE) > seen)
    page.get_by_role("button", name="Save and stop").click()
    for tab in (page, other):
        expect(tab.get_by_text("stopped", exact=True)).to_be_visible()
        shown_as_stored(tab, store, first)
    other.close()

    # Its place is free now: the second run finishes.
    page.goto(server.url(f"runs?run={second.id}"))
    expect(page.get_by_text("Finished:")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_disabled()
    shown_as_stored(page, store, second)
    known = view_of(store, second).perplexities
    for what in known:
        label = "Teacher" if what == "teacher" else f"After stage {STAGES.index(what) + 1}"
        expect(page.get_by_test_id("stMetric").filter(has_text=label)).not_to_contain_text("–")
    expect(page.get_by_role("link", name="Talk to it")).to_have_attribute("href", re.compile(f"right={second.id}"))

    # Its checkpoint is exported from the page.
    section = page.get_by_test_id("stExpander").filter(has=page.locator("summary").filter(has_text="Export"))
    section.locator("summary").click()
    section.get_by_text("Dense", exact=True).click()
    expect(section.get_by_role("textbox", name="New folder")).to_have_value("exports/second-dense")
    section.get_by_role("button", name="Export", exact=True).click()
    expect(section.get_by_text("with its model card")).to_be_visible()
    assert (server.home / "exports" / "second-dense" / "model.safetensors").is_file()

    # Its checkpoint is what a further run goes on from.
    page.get_by_role("link", name="Train it further").click()
    expect(page.get_by_text(f"Trains {second.id} further")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("the folder that pages may read")).to_be_visible(timeout=60_000)  # its teacher isn't in it
    page.goto(server.url(f"runs?run={second.id}"))
    expect(page.get_by_text("Finished:")).to_be_visible(timeout=60_000)

    # The first goes on from its finished blocks, until it is cancelled, which takes a second click.
    kept = len(view_of(store, first).finished)
    page.goto(server.url(f"runs?run={first.id}"))
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_text(f"delete its {kept} finished blocks")).to_be_visible()
    page.get_by_role("button", name="Keep the run").click()
    expect(page.get_by_role("button", name="Cancel and delete")).to_have_count(0)
    assert store.get(first.id).state == "running"
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel and delete").click()
    expect(page.get_by_text("cancelled", exact=True)).to_be_visible()
    assert not (first.folder / "blocks").exists()
    expect(page.get_by_role("button", name="Resume")).to_be_disabled()


@pytest.fixture
def played(server: Server) -> Iterator[PlayedRun]:
    with closing(PlayedRun(server.store, "played *[here](x)*")) as played:
        yield played


@pytest.mark.soak
def test_zoom_and_hidden_lines_survive_a_hundred_updates_in_the_same_node(
    server: Server, page: Page, played: PlayedRun
) -> None:
    store, run = played.store, played.run
    store.append(run.id, BlockStarted(stage="wat", block=0))
    played.step(0, 1)
    # The page's own seconds pass faster than those on the wall.
    page.clock.install()
    page.goto(server.url(f"runs?run={run.id}"))
    wait_until(lambda: stamp(page, CURVE) > 0 and stamp(page, HEAT) > 0)
    expect(page.get_by_text("played *[here](x)*")).to_be_visible()

    # A box drawn over the middle of the curve zooms; a click on its name hides a line.
    box = page.locator(f"{CURVE} .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    page.locator(f"{CURVE} .legendtoggle").first.click()
    looks = """node => ({x: node.layout.xaxis.range.map(Number), y: node.layout.yaxis.range.map(Number),
                         hidden: node._fullData.filter(trace => trace.visible !== true).map(trace => trace.uid)})"""
    wait_until(lambda: page.locator(CURVE).evaluate(looks)["hidden"] == ["raw"], seconds=10)
    zoomed = page.locator(CURVE).evaluate(looks)
    assert 5 < zoomed["x"][0] < zoomed["x"][1] < 35
    page.locator(CURVE).evaluate("node => { node.mine = true; }")
    # What Plotly puts over a chart by default could send it to a server of its makers.
    buttons = page.locator(f"{CURVE} .modebar-btn").evaluate_all("all => all.map(one => one.dataset.title)")
    assert "Zoom" in buttons
    assert not {"Share chart...", "Produced with Plotly.js"} & set(buttons)

    first_updates = int(page.locator(CURVE).get_attribute("data-updates") or 0)
    for update in range(2, 102):
        seq = played.step(0, update)
        page.clock.fast_forward(1000)
        page.wait_for_function(
            "([chart, seq]) => document.querySelector(chart)?.dataset.stamp == seq", arg=[CURVE, seq]
        )
    assert int(page.locator(CURVE).get_attribute("data-updates") or 0) >= first_updates + 100
    assert page.locator(CURVE).evaluate("node => node.mine")
    assert page.locator(CURVE).evaluate(looks) == zoomed

    # The block ends badly and the next one begins: all charts follow, still in the same node.
    played.done("wat", 0, diverged=True)
    store.append(run.id, BlockStarted(stage="wat", block=1))
    store.append(run.id, Evaluated(what="ptq", text="held-out", perplexity=87.5, tokens=512))
    played.step(1, 1)
    page.clock.fast_forward(1000)
    expect(page.get_by_text("Block 2, 2 Train weights: loss")).to_be_visible()
    expect(page.get_by_text("each keeps the state it had before")).to_contain_text("block 1 (2 Train weights)")
    expect(page.get_by_test_id("stMetric").filter(has_text="After stage 1")).to_contain_text("87.5")
    wait_until(lambda: lines(page, BLOCKS)["wat"] == [0.3], seconds=10)
    now = page.locator(CURVE).evaluate(looks)
    assert page.locator(CURVE).evaluate("node => node.mine")
    assert now["x"] == zoomed["x"]
    assert now["hidden"] == ["raw"]
    assert now["y"] != zoomed["y"]  # another block's losses: its own range

    # A click on the timeline, and one on the heat map, shows that block; the run is followed again on request.
    grid = page.locator(f"{TIMELINE} .nsewdrag")
    size = grid.bounding_box()
    assert size is not None
    grid.click(position={"x": 0.85 * size["width"], "y": 0.25 * size["height"]})
    expect(page.get_by_text("Block 3, 1 Initialize: output error")).to_be_visible()
    page.locator(f"{HEAT} .nsewdrag").first.click(position={"x": 20, "y": 20})
    expect(page.get_by_text("Block 1, 2 Train weights: loss")).to_be_visible()
    page.get_by_role("button", name="Follow the run").click()
    expect(page.get_by_text("Block 2, 2 Train weights: loss")).to_be_visible()
    page.get_by_text("Log axis").click()
    wait_until(lambda: page.locator(CURVE).evaluate("node => node.layout.yaxis.type") == "log", seconds=10)

    # It fits the window, and fails with its message and the way out.
    for width, height in ((1280, 720), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.get_by_test_id("stMain").evaluate("node => node.scrollWidth <= node.clientWidth")
    store.append(run.id, RunFailed(message="no space left in <b>/here</b>"))
    played.close()
    page.clock.fast_forward(1000)
    expect(page.get_by_test_id("stAlert").filter(has_text="o space left in <b>/here</b>")).to_contain_text("Resume")
    expect(page.get_by_role("button", name="Resume")).to_be_enabled()


def test_an_unknown_run_is_a_message_with_a_way_back(server: Server, page: Page) -> None:
    page.goto(server.url("runs?run=nowhere"))
    expect(page.get_by_test_id("stAlert")).to_contain_text("no run nowhere")
    page.get_by_role("button", name="All runs").click()
    expect(page).to_have_url(re.compile("runs$"))
    expect(page.get_by_test_id("stAlert")).to_have_count(0)
