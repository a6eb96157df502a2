"""The report in a real browser: read on every screen and printed, without sideways scrolling; and its button."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from lbllm.evaluation.measure import measure
from lbllm.evaluation.store import EvaluationStore, write_end
from lbllm.reporting.evaluations import Wish, groups_of, missing
from lbllm.reporting.page import report
from lbllm.reporting.subjects import find_subjects
from lbllm.runs.store import Run
from tests.browser.conftest import Server
from tests.helpers.finished_run import finished_run
from tests.helpers.screens import PHONE, Screen, screens, serious
from tests.helpers.tiny_models import SENTENCES


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A finished run that is measured beside its teacher."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "read.txt").write_text("\n".join(f"{n} {line}" for n in range(12) for line in SENTENCES))
    store, evaluations = server.store, EvaluationStore(server.home / "evaluations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_HOME", str(server.home))
        patch.setattr("lbllm.reporting.evaluations.ANSWER_TOKENS", 6)
        made = finished_run(store, folder, ("ptq", "wat"))
        wish = Wish(str(folder / "read.txt"), 6, 32, ("Why?", "An answer that is " + "long " * 20))
        for job in missing(evaluations, groups_of(find_subjects([made.id], store)), wish):
            one = evaluations.create(job)
            write_end(one.folder, *measure(one))
        yield made
    for one in evaluations.all():
        evaluations.delete(one.id)


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@screens(Screen(*PHONE, "dark"))
def test_a_report_is_read_on_every_screen_and_printed(
    server: Server, browser: Browser, run: Run, screen: Screen, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_HOME", str(server.home))
        evaluations = EvaluationStore(server.home / "evaluations")
        file.write_text(report(find_subjects([run.id], server.store), evaluations))
    context = screen.context(browser)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(file.as_uri())
    expect(page.get_by_role("heading", name="tiny one", level=1)).to_be_visible()
    expect(page.get_by_role("table", name="On read.txt")).to_contain_text("Round to nearest")
    expect(page.get_by_role("img", name=re.compile("Loss of every block"))).to_be_visible()
    assert fits(page)
    assert serious(page) == []
    # On paper it is dark on white, whatever the screen is.
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 1000})
    assert fits(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert asked == [file.as_uri()]
    context.close()


def test_the_button_downloads_it(server: Server, page: Page, run: Run) -> None:
    page.goto(server.url(f"runs?run={run.id}"))
    page.get_by_text("Report", exact=True).click()
    # Everything is measured, so nothing is queued.
    page.get_by_role("button", name="Make the report").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    assert download.value.suggested_filename == "report-tiny-one.html"
    written = Path(download.value.path()).read_text()
    assert "Round to nearest, W2A16" in written
    assert "Not measured yet" not in written
