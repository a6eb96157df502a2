"""Pictures of the workbench's pages and of the showcase in both themes, for docs/screens.

    python -m benchmarks.screenshots                       pages over the usual home
    python -m benchmarks.screenshots --size 1920x1080 --out /tmp/large --pages quantize,runs

It starts a workbench and a showcase of its own, opens each page in headless Chromium, does what a visitor would (asks
both models, previews a block, looks at a run), and takes a picture when nothing moves any more. Shown are the newest
finished run and evaluation; where there is none, a run of the preset `preview` or an evaluation of the shipped
checkpoint beside its teacher is done first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from app.showcase.page import serve
from benchmarks.command_line import one_message
from lbllm.chat.showcase import open_showcase
from lbllm.config import DEFAULT_MODEL, SHIPPED, make_config
from lbllm.errors import RunError
from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.store import EvaluationStore
from lbllm.microscope.address import EXAMPLE
from lbllm.places import home
from lbllm.runs.store import RunStore
from tests.browser.conftest import CHROMIUM, FLAGS, Server
from tests.browser.test_showcase import ask
from tests.helpers import ROOT
from tests.helpers.ports import free_port

PROMPT = "Why is the sky blue? Answer in two sentences."
QUESTION = "What is the capital of France?"
PATIENCE = 300_000  # milliseconds for whatever a page computes


def settle(page: Page) -> None:
    """Wait until the script has ended and the charts have had a moment to be drawn."""
    state = "document.querySelector('[data-testid=stApp]').getAttribute('data-test-script-state')"
    page.wait_for_function(f"{state} === 'notRunning'", timeout=PATIENCE)
    page.wait_for_timeout(1500)
    # The pointer rests on nothing that would show a tooltip.
    page.mouse.move(1, 1)


def finished_run() -> str:
    """The newest run that is done, or a short one that is done now."""
    store = RunStore()
    if not (done := [run.id for run in store.all() if run.state == "done"]):
        run = store.create(make_config("preview"))
        store.start(run.id).wait()
        done = [one.id for one in store.all() if one.state == "done"]
        if not done:
            raise RunError(f"run {run.id} did not end well; its log says why: {run.folder / 'worker.log'}")
    return done[-1]


def finished_evaluation() -> str:
    """The newest evaluation that is done, or one of the shipped checkpoint beside its teacher, done now."""
    store = EvaluationStore()
    if not (done := [one.id for one in store.all() if one.state == "done"]):
        models = (DEFAULT_MODEL, SHIPPED)
        job = EvaluationJob(measure="text", models=models, teacher=DEFAULT_MODEL)
        made = store.create(job)
        store.start(made.id).wait()
        done = [one.id for one in store.all() if one.state == "done"]
        if not done:
            raise RunError(f"evaluation {made.id} did not end well: {store.get(made.id).message}")
    return done[-1]


def compare(page: Page, server: Server) -> None:
    """Both models have answered."""
    page.goto(server.url())
    page.get_by_role("button", name="Got it").click()
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled(timeout=PATIENCE)
    box.fill(PROMPT)
    box.press("Enter")
    page.wait_for_timeout(3000)


def quantize(page: Page, server: Server) -> None:
    """A block has been tried out."""
    page.goto(server.url("quantize"))
    button = page.get_by_role("button", name="Preview", exact=True)
    button.click(timeout=PATIENCE)
    expect(page.get_by_test_id("stPlotlyChart")).to_be_visible(timeout=PATIENCE)
    page.get_by_test_id("stMain").evaluate("main => main.scrollTo(0, 0)")


def runs(page: Page, server: Server) -> None:
    """The newest finished run."""
    page.goto(server.url(f"runs?run={finished_run()}"))
    page.get_by_test_id("stMain").wait_for(timeout=PATIENCE)
    page.wait_for_timeout(3000)


def evaluate(page: Page, server: Server) -> None:
    """The newest finished evaluation."""
    page.goto(server.url(f"evaluate?evaluation={finished_evaluation()}"))
    page.get_by_test_id("stMain").wait_for(timeout=PATIENCE)
    page.wait_for_timeout(3000)


def inspect(page: Page, server: Server) -> None:
    """A group of a layer is open, and the map is full."""
    page.goto(server.url(f"inspect?model={SHIPPED}&at={EXAMPLE}"))
    page.locator(".grid[data-waiting='0']").wait_for(timeout=PATIENCE)
    page.locator(".group").wait_for(timeout=PATIENCE)


def learn(page: Page, server: Server) -> None:
    """A lesson is guessed, and its scene stands."""
    page.goto(server.url("learn?lesson=one-bit"))
    expect(page.get_by_text("Guess first")).to_be_visible(timeout=PATIENCE)
    page.keyboard.press("1")
    expect(page.locator("figure svg[role=img]").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(1500)  # the page itself scrolls to the guess
    page.locator(".part.scene").evaluate("part => part.scrollIntoView({block: 'start'})")


PAGES: dict[str, Callable[[Page, Server], None]] = {
    "compare": compare,
    "quantize": quantize,
    "runs": runs,
    "evaluate": evaluate,
    "inspect": inspect,
    "learn": learn,
}
SHOWCASE = "showcase"


def showcase(page: Page, address: str) -> None:
    """Both models have answered an audience."""
    page.goto(address)
    ask(page, QUESTION)
    expect(page.get_by_text("tokens/s, both at once")).to_have_count(2, timeout=PATIENCE)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible(timeout=PATIENCE)
    page.mouse.move(1, 1)
    page.wait_for_timeout(1500)


def take(browser: Browser, size: ViewportSize, path: Path, show: Callable[[Page], None]) -> None:
    """A picture in each theme of what ``show`` leaves on a page; ``path`` without the theme."""
    for theme in ("light", "dark"):
        context = browser.new_context(viewport=size, color_scheme=theme)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        show(page)
        written = path.with_name(f"{path.name}-{theme}.png")
        page.screenshot(path=written)
        print(written, flush=True)
        context.close()


def visit(show: Callable[[Page, Server], None], server: Server, page: Page) -> None:
    """A page of the workbench, when nothing moves any more."""
    show(page, server)
    settle(page)


def pixels(text: str) -> ViewportSize:
    """The size that ``--size`` names. Raises ArgumentTypeError."""
    width, _, height = text.partition("x")
    if not width.isdigit() or not height.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: give width and height in pixels, as in 1280x720")
    return ViewportSize(width=int(width), height=int(height))


def named(text: str) -> list[str]:
    """The pages that ``--pages`` names. Raises ArgumentTypeError."""
    names = text.split(",")
    for name in names:
        if name not in (*PAGES, SHOWCASE):
            raise argparse.ArgumentTypeError(f"{name}: choose from {', '.join((*PAGES, SHOWCASE))}")
    return names


@one_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens")
    parser.add_argument("--size", type=pixels, default="1280x720", help="width x height in pixels")
    parser.add_argument("--pages", type=named, default=",".join([*PAGES, SHOWCASE]), help="joined by commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        server = Server(home())
        try:
            for name in arguments.pages:
                if name == SHOWCASE:
                    with serve(open_showcase(), host="127.0.0.1", port=free_port()) as address:
                        take(browser, arguments.size, arguments.out / name, partial(showcase, address=address))
                    continue
                if server.process is None:
                    server.start()
                take(browser, arguments.size, arguments.out / name, partial(visit, PAGES[name], server))
        finally:
            server.stop()
        browser.close()


if __name__ == "__main__":
    main()
