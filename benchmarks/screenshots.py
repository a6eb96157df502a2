"""Pictures of the workbench's pages in both themes, for docs/screens.

    python -m benchmarks.screenshots                       pages over the usual home: newest finished run, two models
    python -m benchmarks.screenshots --size 1920x1080 --out /tmp/large --pages quantize,runs

It starts a workbench of its own, opens each page in headless Chromium, does what a visitor would (asks both models,
previews a block, looks at a run), and takes a picture when nothing moves any more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from lbllm.models import home
from lbllm.runs import RunStore
from tests.browser.conftest import CHROMIUM, FLAGS, ROOT, Server

PROMPT = "Why is the sky blue? Answer in two sentences."
PATIENCE = 300_000  # milliseconds for whatever a page computes


def settle(page: Page) -> None:
    """Wait until the script has ended and the charts have had a moment to be drawn."""
    state = "document.querySelector('[data-testid=stApp]').getAttribute('data-test-script-state')"
    page.wait_for_function(f"{state} === 'notRunning'", timeout=PATIENCE)
    page.wait_for_timeout(1500)
    # The pointer rests on nothing that would show a tooltip.
    page.mouse.move(1, 1)


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
    """The newest finished run, or the page without one."""
    finished = [run.id for run in RunStore().all() if run.state == "done"]
    page.goto(server.url("runs" + (f"?run={finished[-1]}" if finished else "")))
    page.get_by_test_id("stMain").wait_for(timeout=PATIENCE)
    page.wait_for_timeout(3000)


PAGES: dict[str, Callable[[Page, Server], None]] = {"compare": compare, "quantize": quantize, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens")
    parser.add_argument("--size", default="1280x720", help="width x height in pixels")
    parser.add_argument("--pages", default=",".join(PAGES))
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    server = Server(home())
    with ExitStack() as stack:
        stack.callback(server.stop)
        server.start()
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for theme in ("light", "dark"):
            for name in arguments.pages.split(","):
                size = {"width": width, "height": height}
                context = browser.new_context(viewport=size, color_scheme=theme)  # type: ignore[arg-type]
                page = context.new_page()
                page.set_default_timeout(PATIENCE)
                PAGES[name](page, server)
                settle(page)
                path = arguments.out / f"{name}-{theme}.png"
                page.screenshot(path=path)
                print(path)
                context.close()
        browser.close()


if __name__ == "__main__":
    main()
