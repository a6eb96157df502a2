"""A plan on the Quantize page, in a real browser: made by keys, drawn, and filled into the form, on every screen."""

from __future__ import annotations

import re

from playwright.sync_api import Browser, expect

from tests.browser.conftest import Server
from tests.browser.test_quantize import BITS, figure
from tests.helpers.screens import LAPTOP, PHONE, Screen, screens, serious
from tests.helpers.tiny_runs import stored_run_config


@screens(Screen(*PHONE, "dark"), Screen(*LAPTOP))
def test_a_plan_is_made_and_fills_the_form(server: Server, browser: Browser, screen: Screen) -> None:
    config = stored_run_config(server.home)
    context = screen.context(browser)
    page = context.new_page()
    page.goto(server.url("quantize"))
    expect(figure(page, BITS)).to_have_text("3.02", timeout=60_000)
    page.get_by_text("As a command, as a file").click()
    settings = {"name": "tiny.json", "mimeType": "application/json", "buffer": config.model_dump_json().encode()}
    page.get_by_test_id("stFileUploader").locator("input").set_input_files(settings)  # type: ignore[arg-type]
    expect(figure(page, BITS)).not_to_have_text("3.02")

    page.get_by_text("Plan by size: a format for each layer").click()
    target = page.get_by_role("textbox", name="At most")
    target.fill("small")
    target.press("Enter")
    plan = page.get_by_role("button", name="Plan", exact=True)
    expect(plan).to_be_enabled()
    plan.press("Enter")
    expect(page.get_by_text("can't be read; give for example")).to_be_visible()
    target.fill("3.1 bits")
    target.press("Enter")
    plan.press("Enter")
    fill = page.get_by_role("button", name="Fill the form with this plan")
    expect(fill).to_be_visible(timeout=300_000)
    expect(page.get_by_text("Plan for 3.1 bits per weight")).to_be_visible()
    chart = page.get_by_test_id("stPlotlyChart")
    expect(chart.get_by_text("one format for all", exact=True)).to_be_visible()
    main = page.get_by_test_id("stMain")
    assert main.evaluate("m => m.scrollWidth <= m.clientWidth")
    assert serious(page) == []

    # The form then has the plan: its bits, and settings per layer.
    fill.press("Enter")
    expect(figure(page, BITS)).to_have_text(re.compile(r"3\.(0[5-9]|10)"), timeout=60_000)
    expect(page.get_by_test_id("stCode").first).to_contain_text("quant.overrides")
    context.close()
