"""How long a visitor waits, by the clock of a real browser: ``python -m benchmarks.waits``.

A workbench is started as by ``make run``, with an empty home. Printed are the seconds from its
start to the first page, to both models being ready and to the first word of each answer; then, on the Quantize page,
from the change of a setting to the new figures (the median of several) and from the click on Preview to the finished
chart. Nothing else should work on the machine.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.command_line import command_parser, one_message
from benchmarks.report import settings_of, write_report
from tests.browser.conftest import CHROMIUM, FLAGS, Server

PATIENCE = 300_000  # milliseconds
READY = re.compile(r"[\d.]+ bits per (binarized weight|weight in memory) ·")
CHANGES = [("128", "2.16"), ("32", "2.52"), ("64", "2.27"), ("16", "3.02")] * 2
# Watched in the page itself, so that asking for it costs the page nothing: resolves with the time in milliseconds.
CHANGED = """([shown]) => new Promise(resolve => {
    const look = () => {
        const metric = [...document.querySelectorAll('[data-testid=stMetric]')]
            .find(one => one.innerText.includes('Bits per binarized weight'));
        if (metric?.innerText.includes(shown)) requestAnimationFrame(() => resolve(performance.now()));
        else requestAnimationFrame(look);
    };
    look();
})"""


def waited(what: str, since: float) -> dict[str, Any]:
    """Print how long it took since then; its row."""
    seconds = time.perf_counter() - since
    print(f"{what:48} {seconds:6.1f} s", flush=True)
    return {"label": what.strip(), "seconds": round(seconds, 1)}


def first_answer(page: Page, server: Server) -> list[dict[str, Any]]:
    """From the start of the server to the first words of both answers."""
    began = time.perf_counter()
    server.start()
    rows = [waited("server answers", began)]
    page.goto(server.url())
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_visible(timeout=PATIENCE)
    rows.append(waited("first page", began))
    expect(page.get_by_text(READY)).to_have_count(2, timeout=PATIENCE)
    expect(box).to_be_enabled(timeout=PATIENCE)
    rows.append(waited("both models ready", began))
    box.fill("Why is the sky blue?")
    box.press("Enter")
    asked = time.perf_counter()
    for side in (0, 1):
        expect(page.locator(f".st-key-compare_answer_{side}")).to_contain_text(re.compile(r"\w"), timeout=PATIENCE)
    rows.append(waited("first words of both answers", began))
    rows.append(waited("  of that, since the question", asked))
    page.get_by_role("button", name="Stop").click()
    return rows


def settings(page: Page, server: Server) -> list[dict[str, Any]]:
    """From a change of the group size to the new figure, and from Preview to its chart."""
    page.goto(server.url("quantize"))
    group = page.get_by_test_id("stButtonGroup").filter(has=page.get_by_text("Group size", exact=True))
    page.evaluate(CHANGED, ["3.02"])
    page.wait_for_timeout(2000)
    waits = []
    for size, shown in CHANGES:
        group.get_by_role("radio", name=size, exact=True).evaluate("button => { window.clicked = performance.now() }")
        group.get_by_role("radio", name=size, exact=True).click()
        waits.append((page.evaluate(CHANGED, [shown]) - page.evaluate("window.clicked")) / 1000)
        page.wait_for_timeout(700)
    listed = ", ".join(f"{wait:.2f}" for wait in waits)
    median = statistics.median(waits)
    print(f"{'a change of the group size, median':48} {median:6.2f} s  ({listed})", flush=True)
    bounds = {"least": round(min(waits), 2), "most": round(max(waits), 2)}
    rows = [{"label": f"a change of the group size, median of {len(waits)}", "seconds": round(median, 2)} | bounds]

    page.wait_for_timeout(3000)
    began = time.perf_counter()
    page.get_by_role("button", name="Preview", exact=True).click()
    page.get_by_test_id("stPlotlyChart").wait_for(timeout=PATIENCE)
    rows.append(waited("preview of a block, first points on the chart", began))
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning", timeout=PATIENCE)
    rows.append(waited("preview of a block, all of it", began))
    return rows


@one_message()
def main() -> None:
    options = command_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(PATIENCE)
        server = Server(Path(folder))
        try:
            rows = first_answer(page, server) + settings(page, server)
        finally:
            server.stop()
            browser.close()
    if options.out:
        write_report(options.out, "waits", settings_of(options), rows)


if __name__ == "__main__":
    main()
