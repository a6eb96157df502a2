"""The showcase in a real browser, over a real server with tiny models: what an audience does, in few journeys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from app.showcase.page import serve
from lbllm.chat.showcase import Limits, Showcase, Visitor
from lbllm.runs.store import RunStore
from tests.browser.conftest import wait_until
from tests.helpers.ports import free_port
from tests.helpers.screens import LAPTOP, PHONE, Screen, screens, serious
from tests.helpers.tiny_showcase import NAMES, endless_slots, tiny_pair

HOSTILE = "Tell of <b>the sea</b> <img src=x onerror=\"document.title='run'\"> ![x](https://example.com/x.png)"


@pytest.fixture(scope="module")
def showcase(tmp_path_factory: pytest.TempPathFactory) -> Showcase:
    root = tmp_path_factory.mktemp("showcase")
    limits = Limits(prompt_chars=200, answer_tokens=4000, per_minute=3)
    return Showcase(endless_slots(*tiny_pair(root)), NAMES, RunStore(root / "votes"), limits)


@pytest.fixture(scope="module")
def address(showcase: Showcase) -> Iterator[str]:
    with serve(showcase, host="127.0.0.1", port=free_port()) as url:
        yield url


def ask(page: Page, question: str) -> None:
    page.locator("#prompt textarea, #prompt input").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def answers(page: Page) -> list[str]:
    return [page.get_by_label(f"Answer {letter}").inner_text() for letter in "AB"]


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_ask_stop_vote_reveal(page: Page, address: str, showcase: Showcase) -> None:
    page.goto(address)
    expect(page.get_by_role("button", name="What is the capital of France?")).to_be_visible()
    expect(page.get_by_text("No blind votes yet")).to_be_visible()
    ask(page, HOSTILE)
    # Both write at the same time, and go on.
    wait_until(lambda: all(answers(page)))
    lengths = [len(text) for text in answers(page)]
    wait_until(lambda: all(len(text) > length for text, length in zip(answers(page), lengths, strict=True)))
    stop(page)
    expect(page.get_by_text("Stopped.")).to_be_visible()
    written = answers(page)
    assert all(len(text) > length for text, length in zip(written, lengths, strict=True))
    for name in NAMES:
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    expect(page.get_by_text("tokens/s, both at once")).to_have_count(2)
    expect(page.get_by_text("Both answers: temperature 0.2, top-p 0.9")).to_be_visible()
    expect(page.locator(".format").nth(1)).to_contain_text("W(1+1)A")
    assert page.title() == "LBLLM Showcase"
    assert page.locator("img[src='x'], img[src^='https://example.com']").count() == 0

    # Blind: no name and no figure before the vote, all of them after it.
    page.get_by_label("Blind: the names after your vote").check()
    ask(page, "What is the capital of France?")
    expect(page.get_by_text("Its figures are shown after your vote.")).to_have_count(2)
    wait_until(lambda: all(answers(page)) and answers(page) != written)
    stop(page)
    expect(page.get_by_text("Which answer is better?")).to_be_visible()
    assert NAMES[0] not in page.locator("#answers").inner_text()
    expect(page.locator(".format")).to_have_count(0)
    page.get_by_role("button", name="B is better").click()
    expect(page.get_by_text("You preferred teacher")).to_be_visible()
    expect(page.get_by_text("1 blind vote:")).to_be_visible()
    expect(page.get_by_text("tokens/s, both at once")).to_have_count(2)
    expect(page.get_by_role("button", name="B is better")).to_be_hidden()
    assert showcase.tally().total == 1

    # No sideways scrolling at either size, and no downward one where an audience looks on.
    for width, height in ((1280, 720), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.documentElement.scrollHeight") <= height


def test_refusals_and_the_line(page: Page, address: str, showcase: Showcase) -> None:
    page.goto(address)
    ask(page, "x" * 201)
    expect(page.get_by_text("The question has 201 characters; 200 are allowed. Shorten it.")).to_be_visible()
    first = showcase.ask(Visitor("somebody else"), "elsewhere", "Who is first?")
    page.get_by_role("button", name="What is the capital of France?").click()
    expect(page.get_by_text("Your question is next in the line.")).to_be_visible()
    showcase.stop(first)
    wait_until(lambda: all(answers(page)))
    stop(page)
    for _ in range(2):
        page.wait_for_timeout(1_000)  # a click in the moment in which an answer ends is not taken
        ask(page, "Again?")
        expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        stop(page)
    page.wait_for_timeout(1_000)
    ask(page, "Once more?")
    expect(page.get_by_text("That was many questions in a minute.")).to_be_visible()
    # The page that is closed takes its question with it.
    showcase.ask(Visitor("somebody else"), "elsewhere", "Who is first?")
    other = page.context.new_page()
    other.goto(address)
    ask(other, "Still here?")
    expect(other.get_by_text("Your question is next in the line.")).to_be_visible()
    other.close()
    wait_until(lambda: not showcase._line)
    showcase.leave("somebody else")


@screens(Screen(*PHONE, "light"), Screen(640, 900), Screen(*LAPTOP, "dark"))
def test_every_screen_shows_it_all(browser: Browser, address: str, showcase: Showcase, screen: Screen) -> None:
    votes = showcase.tally().total
    context = screen.context(browser)
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.locator("#suggested button").first).to_be_visible()
    assert serious(page) == []
    page.get_by_label("Blind: the names after your vote").check()
    ask(page, "Tell of {{the}} ${sea} `and` <b>more</b>")
    wait_until(lambda: all(len(text) > 300 for text in answers(page)))
    stop(page)
    assert serious(page) == []
    width, height = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert width <= screen.width
    # A large window has everything in it; a small one scrolls to it.
    assert (height <= screen.height) == (screen.width > 720)
    boxes = [page.locator(".block.answer").nth(side) for side in (0, 1)]
    boxes += [page.get_by_role("button", name=name) for name in ("A is better", "B is better", "Tie", "Both bad")]
    areas = [box.bounding_box() for box in (page.get_by_role("button", name="Ask", exact=True), *boxes)]
    for number, one in enumerate(areas):
        for other in areas[:number]:
            assert one
            assert other
            assert 0 <= one["x"] <= screen.width - one["width"]
            beside = one["x"] >= other["x"] + other["width"] or other["x"] >= one["x"] + one["width"]
            assert beside or one["y"] >= other["y"] + other["height"], (one, other)
    for box in boxes:
        box.scroll_into_view_if_needed()
        expect(box).to_be_in_viewport()
    texts = [page.get_by_label("Answer A"), page.get_by_label("Answer B"), page.locator("#prompt textarea")]
    assert all(text.get_attribute("dir") == "auto" for text in texts)
    best = page.get_by_role("button", name="A is better")
    best.tap() if screen.width <= 640 else best.click()
    expect(page.get_by_text("You preferred")).to_be_visible()
    assert showcase.tally().total == votes + 1
    context.close()


def test_a_showcase_that_has_stopped_says_what_to_do(page: Page, address: str) -> None:
    page.clock.install()
    page.goto(address)
    expect(page.locator("#suggested button").first).to_be_visible()
    page.route("**/app_id", lambda route: route.abort())
    for _ in range(3):
        page.clock.run_for(5000)
    expect(page.get_by_role("alert").filter(has_text="The showcase has stopped.")).to_be_visible()
