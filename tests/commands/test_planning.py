"""plan: what it prints and writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbllm.config import RunConfig, read_config
from lbllm.measure.estimate import estimate
from tests.helpers.homes import own_home
from tests.helpers.spoken import Spoken
from tests.helpers.tiny_plans import quick_plans
from tests.helpers.tiny_runs import stored_run_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    monkeypatch.setenv("COLUMNS", "200")
    quick_plans(monkeypatch)
    return stored_run_config(tmp_path)


def test_a_plan_is_printed_and_written_for_quantize(config: RunConfig, tmp_path: Path, say: Spoken) -> None:
    given = [config.model, "--corpus", config.corpus, "--no-check", "--set", "quant.embedding_bits=8"]
    given += ["--set", "seq_len=64"]
    out = tmp_path / "plan.json"
    shown = say("plan", *given, "--target", "3 bits", "--out", str(out))
    assert "Plan for 3 bits per weight: formats layer by layer" in shown
    assert "KL of a plan" in shown
    settings = read_config(out)
    assert settings.quant.embedding_bits == 8
    assert 2.8 < estimate(settings, rate=1e12).bpw <= 3
    document: dict[str, Any] = say("plan", *given, "--target", "3 bits", "--json")
    assert document["settings"] == settings.model_dump(mode="json")
    assert document["chosen"]["measured_kl"] is None
    assert len(document["curve"]) == 32
    # The settings are those that a run takes.
    assert say("estimate", "--config", str(out), "--json")["bpw"] == pytest.approx(document["chosen"]["bits"])
    again = [*given, "--config", str(out), "--target", "2.7 bits"]
    assert "the format is set already" in say("plan", *again, code=1)
    assert "--overridden replace" in say("plan", *again, code=1)
    assert say("plan", *again, "--overridden", "replace", "--json")["chosen"]["bits"] <= 2.7


def test_what_can_not_be_a_plan_is_said(config: RunConfig, tmp_path: Path, say: Spoken) -> None:
    assert 'give for example "2.6 bits", "70 MB"' in say("plan", config.model, "--target", "small", code=1)
    assert "choose from refuse, keep, replace" in say(
        "plan", config.model, "--target", "3 bits", "--overridden", "ask", code=1
    )
    missing = tmp_path / "none" / "plan.json"
    assert "give a file in a folder that exists" in say(
        "plan", config.model, "--target", "3 bits", "--out", str(missing), code=1
    )
