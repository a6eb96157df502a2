"""The compare page in a real browser: the embedded teacher beside the checkpoint that comes with the project."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Cookie, Page, expect

from lbllm.chat.votes import VoteStore
from tests.browser.conftest import Server, wait_until
from tests.helpers.screens import LAPTOP, PHONE, Known, Screen, screens, serious

HOSTILE = "Write a long story about <b>the sea</b> <img src=x onerror=\"document.title='run'\"> ![x](https://example.com/x.png)"
LOADING = 120_000
# How a picked model is described once it is loaded.
# Streamlit's own markup; none of it is ours.
KNOWN: list[Known] = []
READY = re.compile(r"[\d.]+ bits per (binarized weight|weight in memory) ·")


def open_page(page: Page, server: Server, query: str = "") -> None:
    page.goto(server.url(query))
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()


def ask(page: Page, prompt: str) -> None:
    page.get_by_test_id("stChatInputTextArea").fill(prompt)
    page.keyboard.press("Enter")


def answers(page: Page) -> list[str]:
    """Both answers as they are on the screen."""
    return [page.locator(f".st-key-compare_answer_{side}").inner_text() for side in (0, 1)]


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_ask_stop_look_vote_save(
    page: Page, context: BrowserContext, browser: Browser, server: Server, tmp_path: Path
) -> None:
    open_page(page, server)
    expect(page).to_have_url(re.compile("/compare[?]"))
    # The tour comes once.
    expect(page.get_by_text("Begin here")).to_be_visible()
    # The prompt may be asked before the models are there.
    expect(page.get_by_text("Ask both models the same thing")).to_be_visible()
    ask(page, HOSTILE)
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    # Both write at the same time: two pens on the screen at once.
    pens = page.get_by_text("▌")
    expect(pens).to_have_count(2, timeout=LOADING)

    # A setting for the next question leaves the answers to this one alone.
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("spinbutton", name="Seed").fill("7")
    page.get_by_role("spinbutton", name="Seed").press("Enter")
    page.keyboard.press("Escape")
    lengths = [len(text) for text in answers(page)]
    wait_until(lambda: all(len(text) > length + 20 for text, length in zip(answers(page), lengths, strict=True)))
    expect(pens).to_have_count(2)

    stop(page)
    before = answers(page)
    assert all(text.strip() for text in before)
    expect(page.get_by_text("mean divergence")).to_be_visible(timeout=LOADING)
    assert answers(page) == before

    # Nothing that was written is HTML or Markdown.
    expect(page.get_by_test_id("stChatMessage").get_by_text(HOSTILE)).to_be_visible()
    assert page.title() != "run"
    assert page.locator("img[src='x'], img[src^='https://example.com']").count() == 0

    # The lens: a token's details by the pointer and by the keyboard.
    tokens, panel = page.locator(".token"), page.locator(".panel")
    tokens.nth(1).hover()
    expect(panel.locator(".row")).to_have_count(10)
    # Out of the way: where the page scrolls, a resting pointer is over another token.
    page.mouse.move(0, 0)
    page.keyboard.press("Tab")
    tokens.nth(1).focus()
    about = panel.inner_text()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(panel).not_to_have_text(about, use_inner_text=True)
    expect(page.locator(".legend .swatch")).to_have_count(6)

    # The vote is on record, and comes out again.
    page.get_by_role("radio", name="Right is better").click()
    expect(page.get_by_text("1 vote on this pair")).to_be_visible()
    assert [vote.choice for vote in VoteStore(server.store.database).all()] == ["right"]
    page.get_by_role("button", name="Votes").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="As JSON").click()
    (vote,) = json.loads(Path(download.value.path()).read_text())
    assert vote["prompt"] == HOSTILE
    page.keyboard.press("Escape")

    # The saved page stands alone: no script, no request, the lens in it.
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as page").click()
    saved = tmp_path / "comparison.html"
    download.value.save_as(saved)
    other = context.new_page()
    for scheme in ("light", "dark"):
        other.emulate_media(color_scheme=scheme)
        other.goto(saved.as_uri())
        expect(other.get_by_text(HOSTILE)).to_be_visible()
    assert other.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 29)"
    other.locator(".token[tabindex]").first.focus()
    expect(other.locator(".card").first).to_be_visible()
    expect(other.get_by_text("The right answer is better")).to_be_visible()
    other.close()

    # A token that was expected instead: both go on from there, and the old answers come back.
    tokens.nth(2).focus()
    other_token = panel.locator(".student [role='button']").last
    other_token.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("as chosen in the lens")).to_be_visible(timeout=LOADING)
    left, right = answers(page)
    assert left.split()[0] == right.split()[0]
    assert [left, right] != before
    page.get_by_role("button", name="Back").click()
    wait_until(lambda: answers(page) == before)

    # No sideways scrolling, at either size.
    for width, height in ((1280, 720), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    # A reload keeps the conversation, the settings and the votes, and does not bring the tour back.
    before = answers(page)
    page.reload()
    expect(page.get_by_test_id("stChatMessage").get_by_text(HOSTILE)).to_be_visible()
    expect(page.get_by_text(READY)).to_have_count(2)
    wait_until(lambda: answers(page) == before)
    expect(page.get_by_role("button", name="What is this?")).to_be_visible()
    assert page.get_by_text("Begin here").count() == 0
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("7")
    page.keyboard.press("Escape")
    assert len(VoteStore(server.store.database).all()) == 1
    # So does a page that comes back from another one without the conversation in its address.
    page.goto(server.url("runs"))
    page.goto(server.url("compare"))
    expect(page.get_by_test_id("stChatMessage").get_by_text(HOSTILE)).to_be_visible()
    # The same address shows nothing of it to anybody else.
    stranger = browser.new_context()
    theirs = stranger.new_page()
    theirs.goto(page.url)
    expect(theirs.get_by_text("Ask both models the same thing")).to_be_visible()
    assert theirs.get_by_text(HOSTILE).count() == 0
    stranger.close()

    # Without the server, the page says what to do, until it is there again.
    page.route("**/_stcore/health", lambda route: route.abort())
    stopped = page.get_by_role("alert").filter(has_text="The workbench has stopped. Start it again")
    expect(stopped).to_be_visible()
    page.unroute("**/_stcore/health")
    expect(stopped).to_be_hidden()


@pytest.fixture(scope="module")
def answered(browser: Browser, server: Server) -> Iterator[tuple[list[Cookie], str]]:
    """The cookies of a browser that has asked both models something, and the address of that conversation. Its page
    stays open, so that the models stay loaded."""
    context = browser.new_context()
    page = context.new_page()
    open_page(page, server)
    page.get_by_role("button", name="Got it").click()
    ask(page, "Say hello. " + "And again. " * 80)
    expect(page.get_by_text("▌").first).to_be_visible(timeout=LOADING)
    stop(page)
    yield context.cookies(), page.url
    context.close()


@screens(Screen(*PHONE, "light"), Screen(*LAPTOP, "dark"))
def test_every_screen_shows_it_all(browser: Browser, answered: tuple[list[Cookie], str], screen: Screen) -> None:
    cookies, address = answered
    context = screen.context(browser)
    context.add_cookies(cookies)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_text("mean divergence")).to_be_visible(timeout=LOADING)
    assert serious(page, KNOWN) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= screen.width
    # A long prompt is folded, and a text has its own direction.
    bubble = page.get_by_test_id("stChatMessage")
    whole = bubble.locator("details div")
    expect(whole).to_be_hidden()
    bubble.locator("summary").click()
    expect(whole).to_be_visible()
    assert whole.get_attribute("dir") == "auto"
    assert page.locator(".st-key-compare_answer_0 .text").get_attribute("dir") == "auto"

    left, right = (page.locator(f".st-key-compare_answer_{side}") for side in (0, 1))
    tabs = page.get_by_role("tab", name="answer")
    if screen.width > 640:
        expect(tabs).to_have_count(0)
        expect(right).to_be_visible()
        assert left.bounding_box()["y"] == right.bounding_box()["y"]  # type: ignore[index]
    else:
        expect(right).to_be_hidden()
        tabs.nth(1).tap()
        expect(right).to_be_visible()
        expect(left).to_be_hidden()
        expect(tabs.nth(1)).to_have_attribute("aria-selected", "true")
        # What a model is stands below its own picker.
        lines = [page.get_by_text(READY).nth(side).bounding_box() for side in (0, 1)]
        second = page.get_by_role("combobox", name="Right").bounding_box()
        assert lines[0]["y"] < second["y"] < lines[1]["y"]  # type: ignore[index]
    context.close()


def test_regenerate_edit_and_two_settings(page: Page, server: Server) -> None:
    model = "smollm2-135m-instruct"
    open_page(page, server, f"?left={model}&right={model}")
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Two settings").click()
    boxes = page.get_by_role("spinbutton", name="Longest answer")
    expect(boxes).to_have_count(2)
    for number, length in enumerate(("3", "4")):
        boxes.nth(number).fill(length)
        boxes.nth(number).press("Enter")
    page.keyboard.press("Escape")
    ask(page, "What is the capital of France?")
    regenerate = page.get_by_role("button", name="Regenerate")
    expect(regenerate).to_be_visible(timeout=LOADING)
    expect(page.get_by_text(f"{model} (longest answer 3)")).to_be_visible()
    expect(page.get_by_text("Cut off at 3 tokens")).to_be_visible()
    expect(page.get_by_text("Both sides are the same model")).to_be_visible()
    first = answers(page)
    regenerate.click()
    wait_until(lambda: regenerate.is_visible() and answers(page) != first)
    # The prompt is edited where it stands, or left as it is.
    bubble = page.get_by_test_id("stChatMessage")
    bubble.get_by_role("button", name="Edit").click()
    bubble.get_by_role("textbox", name="Edit the prompt").fill("Something else")
    bubble.get_by_role("button", name="Cancel").click()
    expect(bubble.get_by_text("What is the capital of France?")).to_be_visible()
    bubble.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit the prompt").fill("What is the capital of Spain?")
    page.get_by_role("button", name="Ask again").click()
    expect(page.get_by_test_id("stChatMessage").get_by_text("Spain")).to_be_visible()
    expect(regenerate).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("Ask both models the same thing")).to_be_visible()


def test_models_that_can_not_be_had(page: Page, server: Server) -> None:
    open_page(page, server, "?right=../../etc")
    expect(page.get_by_text("lies outside")).to_be_visible()
    # A link only chooses: nothing is loaded before a click.
    open_page(page, server, "?right=smollm2-135m")
    expect(page.get_by_text("Nothing is loaded until you say so.")).to_be_visible()
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_disabled()
    assert page.get_by_text("Loading for").count() == 0
    page.get_by_role("button", name="Load these models").click()
    expect(page.get_by_text(re.compile("can't be downloaded.*use smollm2-135m-instruct"))).to_be_visible(
        timeout=LOADING
    )
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    # The other side is of use nevertheless.
    expect(page.get_by_text(READY)).to_be_visible(timeout=LOADING)
    assert page.get_by_text("Traceback").count() == 0
