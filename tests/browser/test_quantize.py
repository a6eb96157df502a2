"""From the Quantize page's settings over a preview of one block to a run that has begun, in a real browser."""

from __future__ import annotations

import json
import re

from playwright.sync_api import Browser, Locator, Page, Route, expect

from lbllm.runs.store import ACTIVE
from tests.browser.conftest import Server, wait_until
from tests.helpers.screens import LAPTOP, PHONE, Screen, screens, serious
from tests.helpers.tiny_runs import stored_run_config

BITS = "Bits per binarized weight"


def choose(page: Page, label: str, option: str) -> None:
    """Press one of a setting's buttons."""
    group = page.get_by_test_id("stButtonGroup").filter(has=page.get_by_text(label, exact=True))
    group.get_by_role("radio", name=option, exact=True).click()


def type_in(page: Page, label: str, text: str) -> None:
    """Type what is no option of a picker."""
    box = page.get_by_test_id("stSelectbox").filter(has=page.get_by_text(label, exact=True)).locator("input")
    box.fill(text)
    box.press("Enter")


def figure(page: Page, label: str) -> Locator:
    return page.get_by_test_id("stMetric").filter(has_text=label).get_by_test_id("stMetricValue")


def test_settings_are_shown_though_a_widget_loads_after_a_second_run(server: Server, page: Page) -> None:
    late: list[Route] = []
    widgets = re.compile(r"/(NumberInput|ButtonGroup|Selectbox)\.[^/]*\.js$")
    page.route(widgets, lambda route: late.append(route))
    page.goto(server.url("quantize"))
    expect(figure(page, BITS)).to_have_text("3.02", timeout=60_000)
    app = page.get_by_test_id("stApp")
    expect(app).to_have_attribute("data-test-script-state", "notRunning")
    assert {found[1] for route in late if (found := widgets.search(route.request.url))} == {
        "NumberInput",
        "ButtonGroup",
        "Selectbox",
    }
    page.keyboard.press("r")
    page.wait_for_timeout(1_000)
    expect(app).to_have_attribute("data-test-script-state", "notRunning")
    for route in late:
        route.continue_()
    expect(page.get_by_role("radio", name="Quick", exact=True)).to_be_checked()
    expect(page.get_by_role("radio", name="W(1+1)", exact=True)).to_be_checked()
    expect(page.get_by_role("spinbutton", name="Stage 2, training tokens")).to_have_value("24576")
    expect(page.get_by_role("combobox", name="Stages")).to_have_value("1–4")


def test_configure_preview_start(server: Server, page: Page) -> None:
    page.goto(server.url("quantize"))
    expect(figure(page, BITS)).to_have_text("3.02", timeout=60_000)

    # Every change shows at once, and the page is as wide as the window.
    choose(page, "Preset", "Preview")
    # What the preset sets is on the page before anything is changed by hand: it would replace that.
    expect(page.get_by_role("spinbutton", name="Stage 2, training tokens")).to_have_value("2048")
    choose(page, "Group size", "128")
    expect(figure(page, BITS)).to_have_text("2.16")
    choose(page, "Weights", "W1")
    expect(figure(page, BITS)).to_have_text("1.09")
    choose(page, "Weights", "W(1+1)")
    expect(page.get_by_text("Changed from Preview: Group size")).to_be_visible()
    main = page.get_by_test_id("stMain")
    assert main.evaluate("m => m.scrollWidth <= m.clientWidth")

    # One block of a tiny model is tried out; "you are here" then follows the choice without another computation.
    stored_run_config(server.home)
    type_in(page, "Model", "teacher")
    page.get_by_role("button", name="Back to Preview").click()
    expect(page.get_by_text("Changed from Preview")).to_have_count(0)
    choose(page, "Group size", "32")
    type_in(page, "Text", "text.txt")
    page.get_by_test_id("stSelectbox").filter(has=page.get_by_text("Stages", exact=True)).locator("input").click()
    page.get_by_role("option", name="1", exact=True).click()
    expect(page.get_by_role("spinbutton", name="Stage 2, training tokens")).to_be_disabled()
    page.get_by_role("spinbutton", name="Block").fill("2")
    page.get_by_role("button", name="Preview", exact=True).click()
    chart = page.get_by_test_id("stPlotlyChart")
    expect(chart).to_be_visible(timeout=300_000)
    expect(chart.get_by_text("you are here")).to_be_visible()
    choose(page, "Group size", "row")
    expect(page.get_by_text("Changed from Preview: Text, Stages, Group size")).to_be_visible()
    expect(chart.get_by_text("you are here")).to_have_count(1)  # the old one leaves after the new one has come
    expect(chart.get_by_text("you are here").first).to_be_visible()
    expect(page.get_by_text("press Preview again")).to_have_count(0)

    # What is downloaded is what is set, and a settings file is taken in.
    page.get_by_text("As a command, as a file").click()
    expect(page.get_by_test_id("stCode").first).to_contain_text("--group-size -1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as file").click()
    document = json.loads(download.value.path().read_text())
    assert document["quant"]["group_size"] == -1
    document["quant"]["overrides"] = {"*.down_proj": {"group_size": 16}}
    changed = {"name": "mine.json", "mimeType": "application/json", "buffer": json.dumps(document).encode()}
    page.get_by_test_id("stFileUploader").locator("input").set_input_files(changed)  # type: ignore[arg-type]
    expect(page.get_by_test_id("stCode").first).to_contain_text("down_proj")
    page.get_by_role("textbox", name="Name of the run").fill("from a browser")
    page.get_by_role("textbox", name="Name of the run").press("Enter")

    # The settings are still there when the page is opened again from another, and after a reload.
    page.get_by_role("link", name="Runs").click()
    expect(figure(page, BITS)).to_have_count(0)
    page.get_by_role("link", name="Quantize").click()
    page.get_by_text("As a command, as a file").click()
    expect(page.get_by_test_id("stCode").first).to_contain_text("down_proj")
    page.reload()
    expect(page.get_by_role("textbox", name="Name of the run")).to_have_value("from a browser")
    page.get_by_text("As a command, as a file").click()
    expect(page.get_by_test_id("stCode").first).to_contain_text("down_proj")

    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/runs?run=*")
    (run,) = [run for run in server.store.all() if run.name == "from a browser"]
    assert run.id in page.url
    assert (run.config.quant.group_size, run.config.stages) == (-1, ("ptq",))
    assert run.config.quant.overrides["*.down_proj"].group_size == 16
    wait_until(lambda: server.store.get(run.id).state in ("running", "done"))
    server.store.request(run.id, "cancel")
    wait_until(lambda: server.store.get(run.id).state not in ACTIVE)


@screens(Screen(*PHONE, "dark"), Screen(*LAPTOP))
def test_figures_and_start_stay_in_sight(server: Server, browser: Browser, screen: Screen) -> None:
    context = screen.context(browser)
    page = context.new_page()
    page.goto(server.url("quantize"))
    expect(figure(page, BITS)).to_have_text("3.02", timeout=60_000)
    page.get_by_text("Advanced", exact=True).click()
    expect(page.get_by_text("Stage 4", exact=True)).to_be_attached()
    main = page.get_by_test_id("stMain")
    start = page.get_by_role("button", name="Start", exact=True)
    # On a phone the rest of the page follows below the settings.
    last = page.get_by_text("Stage 4", exact=True)

    def centred() -> bool:  # again while what lies above still opens
        last.evaluate("e => e.scrollIntoView({block: 'center'})")
        box = last.bounding_box()
        return box is not None and 0 <= box["y"] <= screen.height - box["height"]

    wait_until(centred)
    for part in (figure(page, BITS), figure(page, "Estimated time"), start):
        expect(part).to_be_in_viewport(ratio=1)
    # What is in sight can be pressed: nothing lies above it.
    start.click(trial=True)
    assert main.evaluate("m => m.scrollWidth <= m.clientWidth")
    assert serious(page) == []
    context.close()
