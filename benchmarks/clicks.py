"""How long a click on the page Inspect takes, by the clock of a real browser: ``python -m benchmarks.clicks``.

A workbench is started over a home without runs, with the shipped checkpoint beside the embedded teacher. Each kind of
click is made ``--clicks`` times at different places: links, layers, groups and windows, which come from the files, then
changes of a text of ``--tokens`` tokens, for which both models are loaded. Printed is the time from the click to the
new view in the page: the median, what 95 of 100 clicks take at most, and the slowest. Nothing else should work on the
machine.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Locator, Page, expect, sync_playwright

from benchmarks.command_line import command_parser, count, one_message
from benchmarks.report import settings_of, write_report
from lbllm.config import DEFAULT_MODEL, SHIPPED
from lbllm.microscope.microscope import Microscope
from lbllm.models.teacher import load_tokenizer
from lbllm.texts.prompts import example_prompts
from tests.browser.conftest import CHROMIUM, FLAGS, Server
from tests.helpers.homes import own_home

PATIENCE = 300_000  # milliseconds
# Watched in the page itself. ``window.shown`` resolves when a part of the microscope shows another place than before
# the click, painted; to milliseconds since the click, or, for a page that was just opened, since it was asked for.
WATCH = """([selector, before]) => {
    window.clicked = 0;
    const clicked = () => { window.clicked = performance.now(); };
    for (const kind of ["click", "keydown"]) document.addEventListener(kind, clicked, {capture: true, once: true});
    const find = root => {
        for (const node of root.querySelectorAll("[class*='st-key-inspect_'] *")) {
            const found = node.shadowRoot?.querySelector(selector) ?? (node.matches(selector) ? node : null);
            if (found) return found;
        }
    };
    window.shown = new Promise(resolve => {
        const look = () => {
            const node = find(document);
            const place = node && (node.dataset.place ?? node.dataset.stamp);
            // Not by animation frames alone: a browser without a screen may have none where nothing moves.
            if (place && place !== before) setTimeout(() => resolve(performance.now() - window.clicked), 16);
            else setTimeout(look, 8);
        };
        look();
    });
}"""


def text_of(tokens: int) -> str:
    """A text of so many tokens, from the example prompts."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    prompts = " ".join(prompt for kind in example_prompts() for prompt in kind.prompts)
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    text = str(tokenizer.decode(ids[:tokens]))
    found = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if found != tokens:
        raise SystemExit(f"a text of {found} tokens was found instead of {tokens}; give other --tokens")
    return text


def address(server: Server, **wanted: str) -> str:
    """The address of a view."""
    return server.url("inspect?" + urlencode({"model": SHIPPED} | wanted))


class Clicks:
    """Clicks of all kinds on one page; ``rows`` has what they took."""

    def __init__(self, page: Page, clicks: int) -> None:
        self.page, self.clicks = page, clicks
        self.rows: list[dict[str, Any]] = []
        self.random = random.Random(0)

    def one(self, selector: str, click: Callable[[], None]) -> float:
        """Seconds from a click until the part shows another place."""
        part = self.page.locator(selector)
        before = None
        if part.count():
            before = part.first.evaluate("node => node.dataset.place ?? node.dataset.stamp ?? null")
        self.page.evaluate(WATCH, [selector, before])
        click()
        seconds: float = self.page.evaluate("window.shown") / 1000
        self.page.wait_for_timeout(400)
        return seconds

    def keep(self, label: str, seconds: list[float]) -> None:
        """Print the figures of one kind of click, and keep them as a row."""
        ordered = sorted(seconds)
        row = {
            "label": label,
            "clicks": len(ordered),
            "median": round(statistics.median(ordered), 2),
            "p95": round(ordered[math.ceil(0.95 * len(ordered)) - 1], 2),
            "most": round(ordered[-1], 2),
        }
        print(
            f"{label:52} p50 {row['median']:5.2f} s  p95 {row['p95']:5.2f} s  slowest {row['most']:5.2f} s", flush=True
        )
        self.rows.append(row)

    def cells(self) -> list[Locator]:
        """Layers on the map, in random order, as many as clicks are wanted."""
        cells = self.page.locator(".grid .cell.known, .grid .cell.waiting").all()
        return self.random.sample(cells, min(self.clicks, len(cells)))

    def layers(self, label: str, selector: str = ".tiles") -> None:
        """Layers opened on the map."""
        self.keep(label, [self.one(selector, lambda cell=cell: cell.click()) for cell in self.cells()])  # type: ignore[misc]

    def inside(self, label: str, selector: str, part: str) -> None:
        """Clicks inside an element, each in another row, so that each leads to another place."""
        box = self.page.locator(part).bounding_box()
        assert box is not None
        seconds = []
        for number in range(self.clicks):
            at = {
                "x": self.random.uniform(0.02, 0.98) * box["width"],
                "y": (number + 0.5) / self.clicks * box["height"],
            }
            seconds.append(self.one(selector, lambda at=at: self.page.locator(part).click(position=at)))  # type: ignore[misc]
        self.keep(label, seconds)


def links(clicks: Clicks, server: Server, scope: Microscope) -> None:
    """Groups opened by their address."""
    seconds = []
    for _ in range(clicks.clicks):
        block = clicks.random.randrange(scope.blocks)
        layer = clicks.random.choice(list(scope.shapes[block]))
        clicks.page.goto("about:blank")
        clicks.page.goto(address(server, at=f"{block}/{layer}/{clicks.random.randrange(64)}/0"), wait_until="commit")
        clicks.page.evaluate(WATCH, [".group", None])
        seconds.append(clicks.page.evaluate("window.shown") / 1000)
    clicks.keep("a link to a group opened", seconds)


def files(clicks: Clicks, server: Server, scope: Microscope) -> None:
    """What comes from the files."""
    page = clicks.page
    page.goto(address(server))
    expect(page.locator(".grid .cell.known").first).to_be_visible(timeout=PATIENCE)
    clicks.layers("a layer opened while the map fills")
    expect(page.locator(".grid[data-waiting='0']")).to_be_visible(timeout=PATIENCE)
    clicks.layers("a layer opened")
    clicks.inside("a group opened", ".group", ".tile.original .field")
    clicks.inside("another part of the matrix", ".tiles", ".tile.whole canvas")
    blocks = page.locator(".grid .row:not(.head) .name").all()
    chosen = clicks.random.sample(blocks, min(clicks.clicks, len(blocks)))
    clicks.keep("a block opened", [clicks.one(".ranks", lambda one=one: one.click()) for one in chosen])  # type: ignore[misc]
    links(clicks, server, scope)


def texts(clicks: Clicks, server: Server, text: str) -> None:
    """What both loaded models say to a text."""
    page = clicks.page
    page.goto(address(server, text=text, view="change", at="0/mlp.up_proj"))
    page.get_by_role("button", name="Load both models").click(timeout=PATIENCE)
    expect(page.locator(".words")).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".grid[data-waiting='0']")).to_be_visible(timeout=PATIENCE)
    clicks.layers("another layer dense again", ".words")
    page.get_by_role("radio", name="Only it binarized").click()
    page.wait_for_timeout(3_000)
    clicks.layers("only another layer binarized", ".words")
    first_blocks(clicks)
    page.get_by_role("radio", name="Activations").click()
    inputs = "[aria-label^='Inputs of the layer'][data-stamp]"
    expect(page.locator(inputs)).to_be_visible(timeout=PATIENCE)
    clicks.layers("the inputs of another layer", inputs)


def first_blocks(clicks: Clicks) -> None:
    """The slider of the first blocks, one block further at each press; from its end it goes back to none."""
    page, words = clicks.page, clicks.page.locator(".words")
    page.get_by_role("radio", name="First blocks").click()
    slider = page.get_by_role("slider")
    most = int(slider.get_attribute("max") or 0)
    seconds: list[float] = []
    while len(seconds) < clicks.clicks:
        if len(seconds) % most == 0:
            slider.press("Home")
            expect(words).to_have_attribute("data-place", "First 0 blocks binarized", timeout=PATIENCE)
        seconds.append(clicks.one(".words", lambda: slider.press("ArrowRight")))
    clicks.keep("one more of the first blocks binarized", seconds)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--clicks", type=count, default=20, help="clicks of each kind")
    parser.add_argument("--tokens", type=count, default=32, help="length of the text")
    options = parser.parse_args()
    text, scope = text_of(options.tokens), Microscope.open(SHIPPED)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(own_home(Path(folder) / "home", "kernels", "models"))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            server.start(PATIENCE / 1000)
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.set_default_timeout(PATIENCE)
            clicks = Clicks(page, options.clicks)
            files(clicks, server, scope)
            texts(clicks, server, text)
        finally:
            browser.close()
            server.stop()
    if options.out:
        write_report(options.out, "clicks", settings_of(options), clicks.rows)


if __name__ == "__main__":
    main()
