"""The page Inspect in a real browser: the shipped checkpoint beside the embedded teacher."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Cookie, Page, expect

from lbllm.microscope.microscope import Microscope
from tests.browser.conftest import Server, wait_until
from tests.helpers.screens import LAPTOP, PHONE, Known, Screen, screens, serious

LOADING = 120_000
PLACE = "14/mlp.up_proj/211/7"
# Streamlit's own markup; none of it is ours.
KNOWN: list[Known] = []


def open_place(page: Page, server: Server, query: str = "") -> None:
    page.goto(server.url(f"inspect?model=shipped{query}"))
    expect(page.get_by_role("grid")).to_be_visible()


def fits(page: Page) -> bool:
    wide = page.get_by_test_id("stMain").evaluate("node => node.scrollWidth <= node.clientWidth")
    return bool(wide and page.evaluate("document.documentElement.scrollWidth <= Math.min(innerWidth, screen.width)"))


def test_from_the_map_to_a_bit_by_keys_and_by_a_link(
    page: Page, context: BrowserContext, browser: Browser, server: Server
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(server.url())
    page.get_by_role("link", name="Inspect").click()
    grid = page.get_by_role("grid")
    expect(grid).to_be_visible()
    # The map fills block by block, and can be used meanwhile.
    expect(page.get_by_text("blocks are computed")).to_be_visible()
    cells = grid.get_by_role("gridcell")
    expect(cells.first).to_have_attribute("aria-label", re.compile("%"))
    cells.first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    focused = page.locator(".cell:focus")
    expect(focused).to_have_attribute("aria-label", re.compile("Block 3, self_attn.k_proj"))
    page.keyboard.press("Enter")
    tiles = page.locator(".tiles")
    expect(tiles).to_have_attribute("data-place", "2/self_attn.k_proj")
    expect(grid.locator(".cell.chosen")).to_have_attribute("aria-label", re.compile("Block 3, self_attn.k_proj"))

    # One weight is marked in all five tiles, by keys and by the pointer.
    line = page.locator(".tiles + .line")
    tiles.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(line).to_contain_text("row 1, column 1")
    expect(page.locator(".tile .mark:visible")).to_have_count(5)
    field = page.locator(".tile.sign .field")
    box = field.bounding_box()
    assert box is not None
    field.hover(position={"x": 0.5 * box["width"] / 64, "y": 20.5 * box["height"] / 32})
    expect(line).to_contain_text("row 20, column 0")
    # Past the edge the window moves along; Enter opens the group.
    page.keyboard.press("PageDown")
    expect(tiles).to_have_attribute("data-place", "2/self_attn.k_proj/52/0")
    group = page.locator(".group")
    expect(group).to_have_attribute("data-place", "2/self_attn.k_proj/52/0")

    # The group's bits are those of the engine.
    found = Microscope.open("shipped").layer("2/self_attn.k_proj").group(52, 0)
    page.locator(".chart").focus()
    page.keyboard.press("ArrowRight")
    bit = found.signs[1]
    expect(group.locator(".line")).to_contain_text(f"sign {int(bit.value)}: bit {bit.bit} of byte {bit.offset:,}")
    expect(group.locator(".bit.here")).to_have_count(2)
    for shown, stored in zip(group.locator(".plane").all(), (found.signs, found.bitmap), strict=True):
        texts = [shown.locator(f"[data-number='{number}']").inner_text() for number in range(len(stored))]
        assert texts == [str(int(one.value)) for one in stored]

    # The link opens the same group for somebody else, who has to load nothing for it.
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    stranger = browser.new_context()
    theirs = stranger.new_page()
    theirs.goto(link)
    expect(theirs.locator(".group")).to_have_attribute("data-place", "2/self_attn.k_proj/52/0")
    assert theirs.locator(".params").inner_text() == page.locator(".params").inner_text()
    stranger.close()
    # The browser's way back leads to the layer.
    page.go_back()
    expect(group).to_have_count(0)
    expect(tiles).to_have_attribute("data-place", "2/self_attn.k_proj")


def test_cause_and_effect(page: Page, server: Server) -> None:
    open_place(page, server, "&at=14/mlp.up_proj&view=change")
    load = page.get_by_role("button", name="Load both models")
    load.click()
    words = page.locator(".words")
    expect(words).to_have_attribute("data-place", "Block 15, mlp.up_proj dense again", timeout=LOADING)
    expect(words.locator("section")).to_have_count(3)
    expect(words.locator(".row")).to_have_count(15)
    figures = page.locator(".inspect-figures")
    before = figures.inner_text()
    page.get_by_role("radio", name="Its whole block").click()
    expect(words).to_have_attribute("data-place", "Block 15 dense again")
    expect(figures).not_to_have_text(before, use_inner_text=True)
    # All blocks binarized are the student.
    page.get_by_role("radio", name="First blocks").click()
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("End")
    expect(words).to_have_attribute("data-place", "First 30 blocks binarized")
    sections = [section.locator(".row").all_inner_texts() for section in words.locator("section").all()]
    assert sections[1] == sections[2] != sections[0]
    # A reload has it all, and this browser need not ask again.
    page.reload()
    expect(words).to_have_attribute("data-place", "First 30 blocks binarized")
    expect(load).to_have_count(0)


@pytest.fixture(scope="module")
def asked(browser: Browser, server: Server) -> Iterator[list[Cookie]]:
    """The cookies of a browser that has loaded both models; its page stays open, so that they stay loaded."""
    context = browser.new_context()
    page = context.new_page()
    open_place(page, server, "&at=14/mlp.up_proj&view=change")
    page.get_by_role("button", name="Load both models").click()
    expect(page.locator(".words")).to_be_visible(timeout=LOADING)
    yield context.cookies()
    context.close()


@screens(Screen(*PHONE, "dark"), Screen(*LAPTOP, "light"))
def test_every_view_on_every_screen(browser: Browser, server: Server, asked: list[Cookie], screen: Screen) -> None:
    context = screen.context(browser)
    context.add_cookies(asked)  # type: ignore[arg-type]
    page = context.new_page()
    for query, shown in (
        (f"&at={PLACE}", ".group .bit"),
        (f"&at={PLACE}&view=activations", "[aria-label^='Largest input'][data-stamp]"),
        (f"&at={PLACE}&view=change&change=levels:", ".words .row"),
    ):
        open_place(page, server, query)
        expect(page.locator(shown).first).to_be_visible(timeout=LOADING)
        assert fits(page)
        assert serious(page, KNOWN) == []
    # Numbers beside the weights are as large as other text, on a phone, too.
    open_place(page, server, f"&at={PLACE}")
    label = page.locator(".chart .label").first
    expect(label).to_be_visible()
    wait_until(lambda: label.evaluate("node => node.getBoundingClientRect().height") > 9, seconds=10)
    context.close()
