"""Record a minute of the workbench as an animated picture, docs/screens/workbench.webp, made from real
screenshots.

    python -m benchmarks.animation

A visitor in headless Chromium, with its own home folder: both models answer a question, settings change the figures,
one block is previewed, a run of the preset `preview`, stages 1 and 2, is started and watched, the microscope goes from
the map to a group of weights and to a changed sentence, and a lesson is guessed. The picture is faster than the
machine: slow parts are shown by pictures at even intervals.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, ViewportSize, expect, sync_playwright

from benchmarks.command_line import one_message
from benchmarks.screenshots import PATIENCE, settle
from lbllm.microscope.address import EXAMPLE
from lbllm.runs.store import ACTIVE
from tests.browser.conftest import CHROMIUM, FLAGS, Server, wait_until
from tests.browser.test_quantize import choose, figure
from tests.helpers import ROOT
from tests.helpers.homes import own_home

SIZE = ViewportSize(width=1280, height=800)
QUESTION = "Why is sleep important?"
A_SECOND = 6  # pictures of what moves


class Film:
    """Pictures of a page and how long each is shown, in milliseconds."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.pictures: list[Image.Image] = []
        self.durations: list[int] = []

    def still(self, seconds: float) -> None:
        """A picture of the page after all movement has stopped."""
        settle(self.page)
        self._add(self.page.screenshot(), seconds)

    def moving(self, done: Callable[[], bool], every: float, seconds: float, limit: float) -> None:
        """The page from now until ``done``, or for ``limit`` seconds, looked at ``every`` so many: ``seconds`` of
        evenly chosen pictures."""
        wanted = round(A_SECOND * seconds)
        taken = [self.page.screenshot()]
        began = time.monotonic()
        while not done() and time.monotonic() < began + limit:
            self.page.wait_for_timeout(1000 * every)
            picture = self.page.screenshot()
            if picture != taken[-1]:
                taken.append(picture)
            if len(taken) > 2 * wanted:
                # A picture costs time that what is shown could work in.
                taken, every = taken[::2], 2 * every
        count = min(len(taken), wanted)
        for number in range(count):
            self._add(taken[round(number * (len(taken) - 1) / max(count - 1, 1))], seconds / count)

    def _add(self, screenshot: bytes, seconds: float) -> None:
        self.pictures.append(Image.open(io.BytesIO(screenshot)).convert("RGB"))
        self.durations.append(round(1000 * seconds))

    def save(self, path: Path) -> None:
        """Write all of it as one animated WebP that begins again at its end."""
        first, *others = self.pictures
        first.save(path, save_all=True, append_images=others, duration=self.durations, loop=0, quality=75, method=4)


def show(part: Locator) -> None:
    """Scroll until it is at the lower edge."""
    part.evaluate("part => part.scrollIntoView({block: 'end'})")


def ask(page: Page, server: Server, film: Film, limit: float) -> None:
    """Both models answer."""
    page.goto(server.url())
    page.get_by_role("button", name="Got it").click()
    # Each side's line says so when its model is loaded.
    expect(page.get_by_text(re.compile("bits per (binarized weight|weight in memory).* · .* MB"))).to_have_count(2)
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(QUESTION)
    film.still(1.5)
    box.press("Enter")
    over = page.get_by_role("button", name="Regenerate")
    film.moving(lambda: over.count() > 0, 0.2, 5, limit)
    film.still(2)
    show(over)
    film.still(2)


def configure(page: Page, server: Server, film: Film, limit: float) -> None:
    """Settings, and what they give; then one block."""
    page.get_by_role("link", name="Quantize").click()
    expect(figure(page, "Bits per binarized weight")).to_have_text("3.02")
    film.still(1.5)
    changes = (("Group size", "64", "2.27"), ("Weights", "W1", "1.15"), ("Weights", "W(1+1)", "2.27"))
    for label, option, bits in changes:
        choose(page, label, option)
        expect(figure(page, "Bits per binarized weight")).to_have_text(bits)
        film.still(1)
    show(page.get_by_text("Some seconds show"))
    page.get_by_role("button", name="Preview", exact=True).click()
    chart = page.get_by_test_id("stPlotlyChart")
    film.moving(lambda: chart.get_by_text("you are here").count() > 0, 0.5, 3, limit)
    show(chart)
    film.still(2.5)


def watch(page: Page, server: Server, film: Film, limit: float) -> None:
    """A run from its start, to its end where that comes within the limit."""
    choose(page, "Preset", "Preview")
    page.get_by_test_id("stSelectbox").filter(has=page.get_by_text("Stages", exact=True)).locator("input").click()
    page.get_by_role("option", name="1–2", exact=True).click()
    name = page.get_by_role("textbox", name="Name of the run")
    name.fill("first try")
    name.press("Enter")
    film.still(1.5)
    page.get_by_role("button", name="Start", exact=True).click()
    # A chart would show its tools under the pointer.
    page.mouse.move(1, 1)
    page.get_by_label("Blocks in each stage").wait_for()
    film.moving(lambda: server.store.all()[-1].state not in ACTIVE, 1, 8, limit)
    film.still(2.5)


def look(page: Page, server: Server, film: Film, limit: float) -> None:
    """From the map of all layers to the bits of a group, and what one layer does to a sentence."""
    page.goto(server.url("inspect?model=shipped"))
    full = page.locator(".grid[data-waiting='0']")
    film.moving(lambda: full.count() > 0, 0.5, 2, limit)
    page.goto(server.url(f"inspect?model=shipped&at={EXAMPLE}"))
    page.locator(".group").wait_for()
    film.still(2)
    show(page.locator(".group"))
    film.still(2.5)
    page.goto(server.url(f"inspect?model=shipped&at={EXAMPLE}&view=change"))
    load = page.get_by_role("button", name=re.compile("^Load"))
    words = page.locator("[data-place*='dense again']")
    page.wait_for_function("document.readyState === 'complete'")
    settle(page)
    if load.count():
        load.first.click()
    words.first.wait_for()
    film.still(2.5)


def learn(page: Page, server: Server, film: Film, limit: float) -> None:
    """A lesson: the guess, and a dial that moves."""
    page.goto(server.url("learn?lesson=one-bit"))
    expect(page.get_by_text("Guess first")).to_be_visible()
    film.still(2)
    page.keyboard.press("1")
    expect(page.locator("figure svg[role=img]").first).to_be_visible()
    dial = page.locator("input[type=range], input[type=radio]:checked").first
    page.wait_for_timeout(1500)  # the page itself scrolls to the guess
    page.locator(".part.scene").evaluate("part => part.scrollIntoView({block: 'start'})")
    for _ in range(4):
        dial.evaluate("dial => dial.focus({preventScroll: true})")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".look")).to_have_attribute("aria-busy", "false")
        film.still(0.7)
    film.still(2)


def end_runs(server: Server) -> None:
    """End the run, because its folder is deleted next."""
    for run in server.store.all():
        if run.state in ACTIVE:
            server.store.request(run.id, "cancel")
    wait_until(lambda: all(run.state not in ACTIVE for run in server.store.all()), seconds=PATIENCE / 1000)


@one_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens" / "workbench.webp")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of any one thing that moves")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        # Where paths are shown they begin with ~, whoever makes the picture.
        (Path(folder) / ".cache").mkdir()
        server = Server(own_home(Path(folder) / ".cache" / "lbllm", "kernels", "models"))
        os.environ["HOME"] = folder
        expect.set_options(timeout=PATIENCE)
        try:
            server.start(seconds=PATIENCE / 1000)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_context(viewport=SIZE, color_scheme="light").new_page()
            page.set_default_timeout(PATIENCE)
            film = Film(page)
            for scene in (ask, configure, watch, look, learn):
                scene(page, server, film, arguments.limit)
            browser.close()
            film.save(arguments.out)
        finally:
            server.stop()
            end_runs(server)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(film.pictures)} pictures, {sum(film.durations) / 1000:.0f} s, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
