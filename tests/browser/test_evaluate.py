"""Evaluate in a real browser: an evaluation of a tiny model is started by keys, works without the page, and is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from lbllm.evaluation.store import ACTIVE, EvaluationStore
from tests.browser.conftest import Server, wait_until
from tests.browser.test_runs_screens import fits
from tests.helpers.made_evaluations import made
from tests.helpers.screens import PHONE, Screen, screens, serious
from tests.helpers.tiny_models import SENTENCES, save_tiny


@pytest.fixture
def evaluations(server: Server) -> Iterator[EvaluationStore]:
    store = EvaluationStore(server.home / "evaluations")
    yield store
    for one in store.all():
        if one.state in ACTIVE:
            store.cancel(one.id)
            wait_until(lambda name=one.id: store.get(name).state not in ACTIVE)  # type: ignore[misc]
        store.delete(one.id)


@screens(Screen(*PHONE, "dark"))
def test_results_are_read_on_every_screen(
    server: Server, browser: Browser, evaluations: EvaluationStore, screen: Screen
) -> None:
    text = made(evaluations, "text")
    tasks = made(evaluations, "tasks", tasks=("piqa", "boolq"))
    prompts = made(evaluations, "prompts", prompts=("Why is the sky blue?", "How?"))
    context = screen.context(browser)
    page = context.new_page()
    page.goto(server.url("evaluate"))
    expect(page.get_by_role("heading", name="Evaluate", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    assert fits(page)
    assert serious(page) == []
    # By keys: open the newest, go back by its button.
    page.locator(f".st-key-evaluation-{text.id}").get_by_role("button").first.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(f"evaluation={text.id}"))
    expect(page.get_by_role("region", name="Perplexity by kind of token")).to_be_visible()
    expect(page.locator("[aria-label='Perplexity by tokens read before']")).to_have_attribute(
        "data-stamp", re.compile(".")
    )
    assert fits(page)
    assert serious(page) == []
    page.goto(server.url(f"evaluate?evaluation={tasks.id}"))
    expect(page.get_by_text("only Teacher is right").first).to_be_visible()
    assert fits(page)
    assert serious(page) == []
    page.goto(server.url(f"evaluate?evaluation={prompts.id}"))
    best = page.locator(".st-key-evaluated-prompt-0").get_by_role("radio", name="Student is best")
    best.focus()
    page.keyboard.press("Space")
    expect(
        page.get_by_role("region", name="The models").get_by_role("row", name="Student").get_by_role("cell").last
    ).to_have_text("1")
    assert fits(page)
    assert serious(page) == []
    context.close()


def test_an_evaluation_works_without_its_page(server: Server, browser: Browser, evaluations: EvaluationStore) -> None:
    folder = save_tiny(server.home / "tiny evaluated", "llama")
    (server.home / "evaluated.txt").write_text("\n".join(SENTENCES * 20))
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.goto(server.url(f"evaluate?models={folder.name}"))
    text = page.get_by_role("combobox", name="Text")
    expect(text).to_be_visible()
    text.fill("evaluated.txt")
    page.keyboard.press("Enter")
    page.get_by_role("spinbutton", name="Tokens in a window").fill("64")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page).to_have_url(re.compile("evaluation="))
    page.close()
    wait_until(lambda: [one.state for one in evaluations.all()] == ["done"])
    (done,) = evaluations.all()
    again = context.new_page()
    again.goto(server.url(f"evaluate?evaluation={done.id}"))
    expect(again.get_by_role("region", name=str(folder.name))).to_contain_text("perplexity")
    context.close()
    assert Path(done.folder, "losses-0.f32").stat().st_size == 10 * 3 * 4 * 63
