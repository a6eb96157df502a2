"""The report's section of the Runs page, without a browser: what it queues, what it waits for, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from lbllm.evaluation.store import EvaluationStore, write_end
from lbllm.runs.store import Run, RunStore
from tests.helpers.finished_run import finished_run
from tests.helpers.homes import own_home


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run; what is started waits for ever."""
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    monkeypatch.setattr(EvaluationStore, "start", EvaluationStore.enqueue)
    return finished_run(RunStore(tmp_path / "home" / "runs"), tmp_path, ("ptq",))


def section() -> None:
    from app.runs.report import show_report
    from app.view import store

    show_report(store(), [store().all()[0].id])


def test_the_button_queues_what_is_missing_once(run: Run) -> None:
    evaluations = EvaluationStore()
    app = AppTest.from_function(section, default_timeout=60).run()
    assert not app.get("download_button")
    app.button[0].click().run()
    assert not app.exception
    assert not app.error
    assert sorted(one.job.measure for one in evaluations.all()) == ["prompts", "text"]
    # They end, and the page says how.
    for one in evaluations.all():
        write_end(one.folder, "failed", "the text is gone")
    app.run()
    assert ["text is gone" in warning.value for warning in app.warning] == [True, True]
    (download,) = app.get("download_button")
    assert download.proto.label == "Download"


def test_without_measuring_it_is_there_at_once(run: Run) -> None:
    app = AppTest.from_function(section, default_timeout=60).run()
    app.toggle[0].set_value(False).run()
    app.button[0].click().run()
    assert not app.exception
    assert EvaluationStore().all() == []
    assert [one.proto.label for one in app.get("download_button")] == ["Download"]
