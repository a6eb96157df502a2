"""The course in a real browser: as files without a server of its own, and as a page of the workbench."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from lbllm.course.export import export_course, facts, renderer, style
from lbllm.course.lessons import LESSONS
from tests.browser.conftest import Server
from tests.helpers.sample_course import CHECK, FINGERPRINT, GUESS, TITLE, sample_course
from tests.helpers.screens import PHONE, Screen, screens, serious

REFUSED = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the sample course."""
    return export_course(sample_course(), tmp_path_factory.mktemp("course") / "site").path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[str]:
    """Its address at a plain file server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def scene(page: Page) -> Locator:
    return page.locator(".say")


def fits(page: Page) -> bool:
    # A phone shows a page that is too wide in a wider window.
    return bool(page.evaluate("document.documentElement.scrollWidth <= Math.min(innerWidth, screen.width)"))


def test_a_lesson_by_keys_and_its_progress(page: Page, site: str) -> None:
    page.goto(site)
    expect(page.get_by_text(TITLE).last).to_be_visible()
    expect(page.get_by_text(FINGERPRINT[:16])).to_be_visible()
    page.get_by_role("link", name="Begin").click()
    expect(page).to_have_url(f"{site}#line")
    expect(page.get_by_role("heading", name="Weights", level=1)).to_be_focused()

    # Nothing is shown before the guess; a digit is the guess, and it counts once.
    expect(page.get_by_role("button", name=GUESS.options[0])).to_be_visible()
    expect(page.locator("figure")).to_have_count(0)
    page.keyboard.press("1")
    expect(page.get_by_text(f"Not quite: {GUESS.options[1]}")).to_be_visible()
    page.get_by_role("button", name=GUESS.options[1]).click(force=True)
    expect(page.get_by_text("Not quite")).to_be_visible()
    expect(page.locator("figure svg[role=img]")).to_be_visible()
    expect(page.locator("math")).to_have_count(1)
    expect(page.get_by_text("lbllm.microscope.layer.relative_error")).to_be_visible()

    # A dial moves by arrow keys; the picture stays the same element, and the focus where it is.
    page.locator("figure svg[role=img]").evaluate("node => { node.mine = true; }")
    dial = page.get_by_role("group", name="Levels").get_by_role("radio", name="4", exact=True)
    dial.focus()
    page.keyboard.press("ArrowRight")
    expect(scene(page)).to_have_text("The dials stand at [3, 0].")
    expect(page.get_by_role("radio", name="16").first).to_be_focused()
    assert page.locator("figure svg[role=img]").evaluate("node => node.mine")
    page.get_by_text("As a table").click()
    expect(page.locator("figure tbody tr")).to_have_count(16)

    # The check, the next lesson and back, then the list: answers are kept, also beyond a reload.
    page.keyboard.press("2")
    expect(page.get_by_text(CHECK.because)).to_be_visible()
    page.keyboard.press("n")
    expect(page).to_have_url(f"{site}#histogram")
    expect(page.locator(".part.guess .option").first).to_be_visible()
    page.keyboard.press("2")
    slider = page.get_by_role("slider", name="Width")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(scene(page)).to_have_text("The dials stand at [4].")
    expect(slider).to_be_focused()
    page.keyboard.press("p")
    expect(page.get_by_text("Not quite")).to_be_visible()
    page.reload()
    expect(page.get_by_text("Not quite")).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="All lessons").first.click()
    expect(page.get_by_text("1 of 2 guesses right")).to_be_visible()
    expect(page.get_by_text("1 of 1 checks right")).to_be_visible()
    page.get_by_role("button", name="Start anew").click()
    expect(page.get_by_text("guesses right")).to_have_count(0)


def test_the_whole_course_on_a_projector_and_its_score(page: Page, site: str) -> None:
    page.set_viewport_size({"width": 1920, "height": 1080})
    page.goto(f"{site}#line")
    page.keyboard.press("f")
    course = sample_course()
    for key, title in course.outline:
        lesson = course.lesson(key)
        expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
        expect(page.get_by_text(lesson.idea)).to_be_visible()
        for _ in range(3):  # the guess must be made
            page.keyboard.press("PageDown")
        expect(page.get_by_text(lesson.guess.text)).to_be_visible()
        page.keyboard.press("2")
        page.keyboard.press("PageDown")
        expect(page.locator("figure .drawing > *").first).to_be_visible()
        assert page.locator(".course").evaluate("node => node.scrollHeight <= node.clientHeight"), key
        expect(page.get_by_text(lesson.guess.text)).to_be_hidden()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_text("How each figure is computed")).to_be_visible()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("2")
        assert lesson.check is not None
        expect(page.get_by_text(lesson.check.because)).to_be_visible()
        page.keyboard.press("ArrowRight")
    count = len(course.outline)
    expect(page.get_by_text(f"{count} of {count} guesses right")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Projector")).to_be_visible()


def test_it_opens_from_a_disk_and_where_storage_is_refused(context: BrowserContext, folder: Path) -> None:
    context.add_init_script(REFUSED)
    page = context.new_page()
    page.goto(f"{folder.as_uri()}/index.html#bars")
    page.keyboard.press("2")
    expect(page.locator("figure svg[role=img]")).to_have_count(2)
    page.get_by_role("link", name="All lessons").first.click()
    expect(page.get_by_text("This browser keeps no progress")).to_be_visible()
    expect(page.get_by_text("1 of 1 guesses right")).to_be_visible()
    # A lesson that there is not, and one whose file is missing.
    page.goto(f"{folder.as_uri()}/index.html#no-such-lesson")
    expect(page.get_by_role("alert")).to_contain_text("no-such-lesson")
    (folder / "data" / "grid.js").rename(folder / "grid.js")
    page.goto(f"{folder.as_uri()}/index.html#grid")
    expect(page.get_by_role("alert")).to_contain_text("data/grid.js")
    (folder / "grid.js").rename(folder / "data" / "grid.js")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text(GUESS.text)).to_be_visible()


def test_what_happens_after_the_guess_is_watched_and_then_scored(page: Page) -> None:
    """A host that a test plays: it brings what the workbench brings while a block trains."""
    course = sample_course()
    whole, scene_of = asdict(course.lesson("curve")), asdict(course.scene("curve", (0,)))
    before = whole | {"guess": whole["guess"] | {"right": None, "because": ""}, "check": None}
    page.set_content(f"<style>{style()}</style><div id=course></div>")
    page.add_script_tag(content=f"{renderer()}\nwindow.Course = Course;")
    page.evaluate(
        """facts => {
            window.asked = [];
            const host = {address: key => `#${key}`, opened() {}, ask: (...what) => window.asked.push(what)};
            window.course = new Course(document.getElementById("course"), facts, host);
            course.show("curve");
        }""",
        facts(course),
    )
    page.evaluate("lesson => course.bringLesson(lesson)", before)
    expect(page.get_by_text(GUESS.text)).to_be_visible()
    # Nothing happens before the guess, and then no option is called right or wrong.
    assert page.evaluate("asked") == [["curve", None]]
    page.keyboard.press("1")
    assert page.evaluate("asked.at(-1)") == ["curve", [0]]
    expect(page.get_by_text("Nobody knows yet")).to_be_visible()
    expect(page.locator(".option.right, .option.wrong")).to_have_count(0)
    for step in range(2):
        progress = {"share": step / 2, "say": f"Step {step}.", "pictures": scene_of["pictures"]}
        page.evaluate("progress => course.bringProgress('curve', [0], progress)", progress)
        expect(page.get_by_role("status")).to_have_text(f"Step {step}.")
        expect(page.locator("figure svg[role=img]").first).to_be_visible()
    expect(page.get_by_text(CHECK.text)).to_have_count(0)
    page.evaluate("([scene, lesson]) => course.bringScene('curve', [0], scene, lesson)", [scene_of, whole])
    expect(page.get_by_text(f"Not quite: {GUESS.options[1]}")).to_be_visible()
    expect(page.get_by_text(CHECK.text)).to_be_visible()
    expect(page.get_by_text("Step 1.")).to_have_count(0)


@screens(Screen(*PHONE, "dark"))
def test_every_picture_on_every_screen(browser: Browser, site: str, screen: Screen) -> None:
    context = screen.context(browser)
    page = context.new_page()
    for key, title in sample_course().outline:
        page.goto(f"{site}#{key}")
        page.reload()
        expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
        page.get_by_role("button", name=GUESS.options[1]).click()
        expect(page.locator("figure .drawing > *").first).to_be_visible()
        page.locator("summary").first.click() if page.locator("summary").count() else None
        assert fits(page), key
        # An appearing scene is transparent, so its colours are not yet those that stay.
        page.wait_for_function("document.getAnimations().length === 0")
        assert serious(page) == [], key
    page.goto(site)
    assert serious(page) == []
    context.close()


def test_a_lesson_of_the_workbench(page: Page, server: Server) -> None:
    first, title = LESSONS[0].key, LESSONS[0].title
    page.goto(server.url("learn"))
    page.get_by_role("link", name="Begin").click()
    expect(page).to_have_url(server.url(f"learn?lesson={first}"))
    expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
    expect(page.get_by_text("Guess first")).to_be_visible()
    page.keyboard.press("1")
    expect(page.locator("figure svg[role=img]").first).to_be_visible()

    # A moved dial asks the server; the picture and the focus stay.
    page.locator("figure svg[role=img]").first.evaluate("node => { node.mine = true; }")
    before = scene(page).inner_text()
    page.locator("input[type=radio]:checked, input[type=range]").first.focus()
    page.keyboard.press("ArrowRight")
    expect(scene(page)).not_to_have_text(before)
    expect(page.locator(".look")).to_have_attribute("aria-busy", "false")
    assert page.locator("figure svg[role=img]").first.evaluate("node => node.mine")
    assert page.evaluate("document.activeElement.shadowRoot.activeElement.matches('input')")
    expect(page.get_by_role("link", name="See the same in Inspect")).to_have_attribute(
        "href", re.compile("^inspect[?]")
    )
    assert serious(page) == []

    # The link opens the lesson in a new tab, with the guess made; back and forward lead to the list and here again.
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("figure svg[role=img]").first).to_be_visible()
    other.close()
    page.go_back()
    expect(page.get_by_role("heading", name="Learn binarization")).to_be_visible()
    page.go_forward()
    expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
