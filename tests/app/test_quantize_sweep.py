"""A sweep on the Quantize page: its runs, time and disk before it starts, refusals, and the queue."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from lbllm.config import make_config
from lbllm.measure.sweep import SweepEstimate, estimate_sweep
from lbllm.runs.notes import notes
from lbllm.runs.store import RunStore
from lbllm.runs.sweep import Planned, planned
from lbllm.units import size
from tests.app.test_quantize_page import PAGE, PAGE_SECONDS, opened, said
from tests.helpers.homes import own_home


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    """The page over a home without runs."""
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    return opened(AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS))


def test_a_sweep_is_seen_before_it_starts_and_then_queued(
    app: AppTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(RunStore, "start", lambda self, run_id, processes=1: begun.append(run_id))
    app.multiselect(key="quantize sweep settings").set_value(["quant.group_size", "wat.epochs"]).run()
    assert not app.exception
    # It begins with the values of the form.
    assert "1 run, about" in said(app.markdown)
    app.button_group(key="quantize sweep quant.group_size").set_value([16, 32]).run()
    app.text_input(key="quantize sweep wat.epochs").set_value("1, 2, 3").run()
    runs = planned(make_config("quick"), {"quant.group_size": [16, 32], "wat.epochs": [1, 2, 3]})
    expected = estimate_sweep(runs, tmp_path, rate=1e10)
    assert "6 runs, about" in said(app.markdown)
    assert size(expected.disk_bytes) in said(app.markdown)
    table = app.dataframe[-1].value
    assert [*zip(table["Group size"], table["Stage 2, epochs"], strict=True)] == [
        (str(size), str(epochs)) for size in (16, 32) for epochs in (1, 2, 3)
    ]
    assert [*table["Bits"]] == [round(r.bpw, 3) for r in expected.runs if r is not None]
    app.button(key="quantize start sweep").click().run()
    store = RunStore(tmp_path / "home" / "runs")
    assert [run.id for run in store.all()] == begun
    assert [(run.config.quant.group_size, run.config.wat.epochs) for run in store.all()] == [
        (one.config.quant.group_size, one.config.wat.epochs) for one in runs
    ]
    assert {note.tags for note in notes(store).values()} == {("sweep 1",)}


def test_what_keeps_a_sweep_from_starting_is_said_before(app: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    app.multiselect(key="quantize sweep settings").set_value(["wat.epochs"]).run()
    for text, reason in (
        ("1, x", "given: 'x'"),
        ("", "has no values to try"),
        (",".join(map(str, range(1, 40))), "has 39 runs, and at most 32"),
    ):
        app.text_input(key="quantize sweep wat.epochs").set_value(text).run()
        assert reason in said(app.warning)
        assert not [button for button in app.button if button.key == "quantize start sweep"]

    def refused(runs: list[Planned], *_: object, **__: object) -> SweepEstimate:
        return SweepEstimate((None,) * len(runs), 0.0, 0, ("the runs need more disk space",))

    monkeypatch.setattr("app.quantize.sweep.estimate_sweep", refused)
    app.text_input(key="quantize sweep wat.epochs").set_value("5, 6").run()
    assert "The runs need more disk space" in said(app.warning)
    assert app.button(key="quantize start sweep").disabled
    # A setting that no chosen stage reads isn't offered.
    stages = next(box for box in app.selectbox if box.key == "quantize stages")
    stages.set_value(("ptq",)).run()
    assert "Stage 2, epochs" not in app.multiselect(key="quantize sweep settings").options
    assert app.multiselect(key="quantize sweep settings").value == []
