"""The panel of plans on the Quantize page: what it shows of a plan, how it fills the form, what it asks and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from lbllm.config import RunConfig
from tests.app.test_quantize_page import PAGE, PAGE_SECONDS, figure, opened, said, settings, upload
from tests.helpers.homes import own_home
from tests.helpers.tiny_plans import quick_plans
from tests.helpers.tiny_runs import stored_run_config
from tests.helpers.waiting import wait_until


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    quick_plans(monkeypatch)
    return stored_run_config(tmp_path)


@pytest.fixture
def app(config: RunConfig) -> AppTest:
    """The page with the settings of a tiny run."""
    page = opened(AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS))
    return opened(upload(page, config.model_dump_json().encode()))


def plan(app: AppTest, target: str, *, check: bool = False) -> None:
    app.text_input(key="quantize plan target").set_value(target)
    app.toggle(key="quantize plan check").set_value(check)
    app.run()
    app.button(key="quantize plan").click().run()
    wait_until(lambda: not any(button.key == "quantize plan cancel" for button in app.run().button), PAGE_SECONDS)
    assert not app.exception


def test_a_plan_is_drawn_and_fills_the_form(app: AppTest) -> None:
    plan(app, "3 bits")
    assert "Plan for 3 bits per weight: formats layer by layer" in said(app.markdown)
    spec = json.loads(next(c for c in app.get("plotly_chart") if "this plan" in c.proto.spec).proto.spec)
    assert [trace["name"] for trace in spec["data"]] == ["plans", "one format for all", "this plan"]
    app.button(key="quantize plan fill").click().run()
    assert not app.exception
    assert 2.8 < float(figure(app, "Bits per binarized weight")) <= 3
    assert settings(app).quant.overrides
    # Another plan chooses anew for the layers that the first one has set; the user's own ones are kept.
    plan(app, "2.7 bits")
    app.button(key="quantize plan fill").click().run()
    assert float(figure(app, "Bits per binarized weight")) <= 2.7


def test_a_target_that_can_not_be_reached_is_a_message(app: AppTest) -> None:
    plan(app, "1 bit")
    assert "is below what the formats can reach" in said(app.warning)
    app.text_input(key="quantize plan target").set_value("very small").run()
    app.button(key="quantize plan").click().run()
    assert "can't be read; give for example" in said(app.error)
