"""Runs are found, ticked and laid side by side in a real browser; the address keeps all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import pytest
from playwright.sync_api import Browser, Page, expect

from lbllm.config import make_config
from lbllm.events import BlockStarted, Evaluated, Event, RunDone, RunStarted, StageStarted
from lbllm.runs.notes import write_note, write_tags
from lbllm.runs.store import Run, RunStore
from tests.browser.conftest import Server, wait_until
from tests.browser.test_runs_screens import fits
from tests.helpers.played_run import PlayedRun
from tests.helpers.run_events import done, started
from tests.helpers.screens import PHONE, Screen, screens, serious

CURVES = "[aria-label='Loss of every block after 2 Train weights']"
PLOT = "[aria-label^='Bits per binarized weight against']"


def finished(store: RunStore, name: str, group_size: int, bits: float, perplexity: float) -> Run:
    """A finished run of two blocks."""
    run = store.create(make_config("quick", {"quant": {"group_size": group_size}}), name)
    events: list[Event] = [started(stages=("ptq", "wat")), StageStarted(stage="wat", steps=6)]
    events += [RunStarted(**(started(stages=("ptq", "wat")).model_dump() | {"bpw": bits}))]
    for number in range(2):
        events += [BlockStarted(stage="wat", block=number), done("wat", number)]
    events += [Evaluated(what="wat", text="held-out", perplexity=perplexity, tokens=9, kl=perplexity / 50)]
    for event in [*events, RunDone(path="x", bpw=bits, disk_bytes=10**8, seconds=5)]:
        store.append(run.id, event)
    return run


@pytest.fixture(scope="module")
def compared(server: Server) -> Iterator[list[Run]]:
    with closing(PlayedRun(server.store, "compared at work")) as played:
        store = server.store
        store.append(played.run.id, BlockStarted(stage="wat", block=0))
        played.step(0, 1)
        runs = [finished(store, f"compared <b>{size}</b>", size, 4 - size / 64, 10.0 + size) for size in (16, 64)]
        for run in (*runs, played.run):
            write_tags(store, run.id, ["side by side"])
        write_note(store, runs[0].id, "a note of *mine*")
        yield [*runs, played.run]


def traces(page: Page, chart: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = page.locator(chart).evaluate(
        "node => Object.fromEntries(node.data.map(trace => [trace.uid, [...trace.y]]))"
    )
    return found


@screens(Screen(*PHONE, "dark"))
def test_runs_are_found_and_compared_on_every_screen(
    server: Server, browser: Browser, compared: list[Run], screen: Screen
) -> None:
    context = screen.context(browser)
    page = context.new_page()
    first, second, working = compared

    # By keys: find, and tick two of the three.
    page.goto(server.url("runs"))
    page.get_by_role("textbox", name="Find").fill("side by side")
    page.keyboard.press("Enter")
    expect(page.get_by_text(re.compile(r"^3 of \d+ runs$"))).to_be_visible()
    expect(page.get_by_text("a note of *mine*")).to_be_visible()
    expect(page.locator(f".st-key-run-{working.id}").get_by_text("3 of 6 parts")).to_be_visible()
    assert fits(page)
    assert serious(page) == []
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_disabled()
    for run in (first, second):
        page.locator(f".st-key-run-{run.id}").get_by_role("checkbox").focus()
        page.keyboard.press("Space")
    page.get_by_role("button", name="Compare 2 runs").click()
    expect(page).to_have_url(re.compile(f"compare={first.id}(,|%2C){second.id}"))

    # Curves over each other, the frontier, and only what differs.
    expect(page.locator(CURVES)).to_have_attribute("data-stamp", re.compile("."))
    expect(page.locator(PLOT)).to_have_attribute("data-stamp", re.compile("."))
    wait_until(lambda: traces(page, CURVES) == {f"run {run.id}": [0.25, 0.25] for run in (first, second)}, seconds=20)
    assert traces(page, PLOT)["frontier"] == [74.0, 26.0]
    table = page.get_by_role("region", name="Figures and settings of the runs")
    expect(table.get_by_role("row", name="Group size")).to_have_text(re.compile("Group size *16 *64"))
    expect(table.get_by_role("row", name="Seed")).to_have_count(0)
    expect(table.get_by_text("1 compared <b>16</b>")).to_be_visible()
    assert fits(page)
    assert serious(page) == []

    # The address keeps what is drawn.
    page.get_by_role("radio", name="Each stage").click()
    page.get_by_text("Log axis").click()
    expect(page.locator("[aria-label='Perplexity after each stage']")).to_have_attribute("data-stamp", re.compile("."))
    page.reload()
    expect(page.locator("[aria-label='Perplexity after each stage']")).to_have_attribute("data-stamp", re.compile("."))
    page.get_by_role("button", name="All runs").click()
    expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    context.close()


@pytest.mark.soak
def test_zoom_stays_while_a_compared_run_works(server: Server, page: Page, compared: list[Run]) -> None:
    store, working = server.store, compared[2]
    page.goto(server.url(f"runs?compare={compared[0].id},{working.id}"))
    wait_until(lambda: page.locator(CURVES).count() and page.locator(CURVES).get_attribute("data-stamp"), seconds=60)
    box = page.locator(f"{CURVES} .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    look = "node => [node.layout.xaxis.range.map(Number), node.layout.yaxis.range.map(Number)]"
    page.locator(CURVES).evaluate("node => { node.mine = true; }")
    zoomed = page.locator(CURVES).evaluate(look)
    store.append(working.id, done("wat", 0))
    wait_until(lambda: traces(page, CURVES)[f"run {working.id}"] == [0.25], seconds=60)
    assert page.locator(CURVES).evaluate(look) == zoomed
    assert page.locator(CURVES).evaluate("node => node.mine")
