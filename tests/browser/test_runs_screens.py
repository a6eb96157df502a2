"""The Runs page on a phone, a laptop and a projector: nothing is cut off, all is legible and can be reached by keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

import pytest
from playwright.sync_api import Browser, Page, expect

from lbllm.events import BlockStarted
from tests.browser.conftest import Server, wait_until
from tests.helpers.played_run import PlayedRun
from tests.helpers.screens import PHONE, Known, Screen, screens, serious

CURVE = "[aria-label^='Block ']"
CHARTS = ("Blocks in each stage", "Loss by block and step", "Loss of all blocks")
# What is Streamlit's own.
KNOWN: tuple[Known, ...] = ()
CONTRASTS = """node => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...node.querySelectorAll(".hoverlayer .hovertext")].map(label => {
    const pair = ["path", "text"].map(part => light(getComputedStyle(label.querySelector(part)).fill));
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def played(server: Server) -> Iterator[PlayedRun]:
    with closing(PlayedRun(server.store, "a run that works")) as played:
        store, run = played.store, played.run
        for block in (0, 1):
            store.append(run.id, BlockStarted(stage="wat", block=block))
            for number in range(1, 41):
                played.step(block, number, 0.5 if number % 10 == 1 else None)
            played.done("wat", block, diverged=block == 0)
        yield played


def fits(page: Page) -> bool:
    wide = page.get_by_test_id("stMain").evaluate("node => node.scrollWidth <= node.clientWidth")
    return bool(wide and page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@screens(Screen(*PHONE, "dark"))
def test_runs_on_every_screen(server: Server, browser: Browser, played: PlayedRun, screen: Screen) -> None:
    context = screen.context(browser)
    page = context.new_page()
    run = played.run.id

    # In the list every value has its label.
    page.goto(server.url("runs"))
    row = page.locator(f".st-key-run-{run}")
    expect(row.get_by_role("button", name="a run that works")).to_be_visible()
    for label in (
        "Created",
        "Time used",
        "Bits per binarized weight",
        "Perplexity",
        "Model",
        "Format",
        "Text",
        "Tokens",
        "Seed",
    ):
        expect(row.get_by_text(label, exact=True)).to_be_visible()
    assert fits(page)
    assert serious(page, KNOWN) == []

    # The same on its page. What is an image has nothing in it that takes the focus.
    page.goto(server.url(f"runs?run={run}"))
    for label in CHARTS:
        expect(page.locator(f"[aria-label='{label}']")).to_have_attribute("data-stamp", re.compile("."))
    expect(page.get_by_text("kept as it was")).to_be_visible()
    expect(page.get_by_test_id("stMetric").filter(has_text="Bits per binarized weight")).to_be_visible()
    assert fits(page)
    assert serious(page, KNOWN) == []
    assert page.locator("[role=img]").locator("a, button, [tabindex]").count() == 0

    # A block is chosen by keys, its curve has the fixed tokens' loss, and a reload keeps how it is drawn.
    page.get_by_role("combobox", name="Choose a block").focus()
    page.keyboard.type("Block 1, 2")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Block 1, 2 Train weights: loss")).to_be_visible()
    look = "node => [node.layout.yaxis.type, ...node.data.map(trace => trace.uid)]"
    wait_until(lambda: page.locator(CURVE).evaluate(look) == ["linear", "raw", "smooth", "probe"], seconds=20)
    page.get_by_text("Log axis").click()
    page.get_by_role("radio", name="Smoothed").click()
    wait_until(lambda: page.locator(CURVE).evaluate(look) == ["log", "smooth", "probe"], seconds=20)
    page.reload()
    expect(page.locator(CURVE)).to_have_attribute("data-stamp", re.compile("."))
    wait_until(lambda: page.locator(CURVE).evaluate(look) == ["log", "smooth", "probe"], seconds=20)

    # What a chart says under the pointer can be read.
    chart = page.locator(CURVE)
    chart.scroll_into_view_if_needed()
    box = chart.locator(".nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.move(box["x"] + 0.26 * box["width"], box["y"] + 0.5 * box["height"])
    wait_until(lambda: chart.evaluate(CONTRASTS), seconds=20)
    assert min(chart.evaluate(CONTRASTS)) >= 4.5
    context.close()
