"""Half a minute of the workbench as an animated picture, docs/screens/workbench.webp, made from real screenshots.

    python -m benchmarks.animation

A visitor in headless Chromium, over a home of its own: settings move the figures, one block is previewed, a run of
the preset `preview` is started and watched to its end, and both models answer a question. What takes longer on this
machine than anybody wants to watch is shown in fewer pictures: the animation's time is not the machine's.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.screenshots import PATIENCE, PROMPT, settle
from lbllm.models import home
from lbllm.runs import ACTIVE
from tests.browser.conftest import CHROMIUM, FLAGS, ROOT, Server
from tests.browser.test_quantize import choose, figure

SIZE = {"width": 1280, "height": 720}
SHOWN = (960, 540)
QUALITY = 70


class Film:
    """Pictures of a page and how long each is shown, in milliseconds."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.pictures: list[Image.Image] = []
        self.durations: list[int] = []

    def take(self, milliseconds: int) -> None:
        """Add the page as it is; where nothing has changed the last picture is shown longer."""
        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB").resize(SHOWN, Image.Resampling.LANCZOS)
        if self.pictures and picture.tobytes() == self.pictures[-1].tobytes():
            self.durations[-1] += milliseconds
            return
        self.pictures.append(picture)
        self.durations.append(milliseconds)

    def until(self, done: Callable[[], bool], every: int, milliseconds: int) -> None:
        """Take a picture ``every`` so many milliseconds until ``done``, each shown for ``milliseconds``."""
        for _ in range(PATIENCE // every):
            self.take(milliseconds)
            if done():
                return
            self.page.wait_for_timeout(every)
        raise TimeoutError("the page did not come to its end")

    def save(self, path: Path) -> None:
        """Write all of it as one animated WebP that begins again at its end."""
        first, *others = self.pictures
        first.save(
            path, save_all=True, append_images=others, duration=self.durations, loop=0, quality=QUALITY, method=6
        )


def configure(page: Page, server: Server, film: Film) -> None:
    """Settings, and what they give; then one block."""
    page.goto(server.url("quantize"))
    expect(figure(page, "Bits a weight")).to_have_text("3.00", timeout=PATIENCE)
    settle(page)
    film.take(2000)
    for label, option, bits in (
        ("Group size", "128", "2.54"),
        ("Weights", "W1", "1.27"),
        ("Weights", "W(1+1)", "2.54"),
    ):
        choose(page, label, option)
        expect(figure(page, "Bits a weight")).to_have_text(bits, timeout=PATIENCE)
        settle(page)
        film.take(1500)
    page.get_by_role("button", name="Preview", exact=True).click()
    chart = page.get_by_test_id("stPlotlyChart").get_by_text("you are here")
    film.until(lambda: chart.count() > 0, 1000, 300)
    settle(page)
    film.take(2000)


def watch(page: Page, server: Server, film: Film) -> None:
    """A run from its start to its end."""
    choose(page, "Preset", "Preview")
    page.get_by_role("textbox", name="Name of the run").fill("first try")
    page.get_by_role("textbox", name="Name of the run").press("Enter")
    settle(page)
    film.take(1000)
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/runs?run=*")
    film.until(lambda: server.store.all()[-1].state not in ACTIVE, 6000, 250)
    settle(page)
    film.take(2500)


def ask(page: Page, server: Server, film: Film) -> None:
    """Both models answer."""
    page.goto(server.url())
    page.get_by_role("button", name="Got it").click(timeout=PATIENCE)
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled(timeout=PATIENCE)
    film.take(1000)
    box.fill(PROMPT)
    film.take(1000)
    box.press("Enter")
    page.wait_for_timeout(500)
    running = page.locator("[data-testid=stApp][data-test-script-state=running]")
    film.until(lambda: running.count() == 0, 500, 300)
    settle(page)
    film.take(3500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screens" / "workbench.webp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for kept in ("models", "kernels"):
            (home() / kept).mkdir(parents=True, exist_ok=True)
            (Path(folder) / kept).symlink_to(home() / kept)
        server = Server(Path(folder))
        server.start()
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
            page.set_default_timeout(PATIENCE)
            film = Film(page)
            for scene in (configure, watch, ask):
                scene(page, server, film)
            browser.close()
        finally:
            server.stop()
        film.save(arguments.out)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(film.pictures)} pictures, {sum(film.durations) / 1000:.0f} s, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
