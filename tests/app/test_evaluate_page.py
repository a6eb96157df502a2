"""The page Evaluate, without a browser: the form, the queue's list, and the results of each kind."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from lbllm.config import DEFAULT_MODEL
from lbllm.evaluation.export import answers_csv, answers_page
from lbllm.evaluation.job import make_job
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.store import EvaluationStore, Progress, write_progress
from tests.app.test_runs_page import said
from tests.helpers import ROOT
from tests.helpers.homes import own_home
from tests.helpers.made_evaluations import MODELS, made


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationStore:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    return EvaluationStore()


def page(**params: str) -> AppTest:
    app = AppTest.from_file(ROOT / "app" / "workbench.py", default_timeout=120)
    app._page_hash = calc_hash("evaluate")
    for name, value in params.items():
        app.query_params[name] = value
    return app.run()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(EvaluationStore, "start", lambda self, name: names.append(name))
    return names


def test_an_evaluation_is_set_up_and_started(store: EvaluationStore, started: list[str], tmp_path: Path) -> None:
    app = page()
    assert not app.exception
    assert not app.error
    app.number_input(key="evaluate_windows").set_value(3).run()
    app.button(key="evaluate_start").click().run()
    (made_one,) = store.all()
    assert started == [made_one.id]
    job = made_one.job
    assert (job.measure, job.models, job.teacher, job.windows) == ("text", (DEFAULT_MODEL, "shipped"), DEFAULT_MODEL, 3)
    assert app.query_params["evaluation"] in (made_one.id, [made_one.id])
    # Prompts that can't be, and a path outside the root, are sentences.
    app = page(evaluate_measure="Prompts")
    app.text_area(key="evaluate_prompts").set_value(" \n").run()
    assert "There is no prompt" in said(app, "warning")
    assert app.button(key="evaluate_start").disabled
    app.text_area(key="evaluate_prompts").set_value("Why?\n\nHow?").run()
    assert "2 prompts" in said(app, "caption")
    models = app.multiselect(key="evaluate_models")
    models.options.append("/etc")
    models.set_value([DEFAULT_MODEL, "/etc"]).run()
    app.button(key="evaluate_start").click().run()
    assert "/etc lies outside" in said(app, "error")
    models.set_value([DEFAULT_MODEL]).run()
    app.button(key="evaluate_start").click().run()
    assert store.get(started[-1]).job.prompts == ("Why?", "How?")
    app = page(evaluate_measure="Tasks", models="shipped")
    app.multiselect(key="evaluate_tasks").set_value([]).run()
    assert "No task is chosen" in said(app, "warning")


def test_the_list_says_what_each_does(store: EvaluationStore, started: list[str]) -> None:
    done = made(store, "text", message="Third was left out: it is gone")
    waits, works = (store.create(make_job(measure="text", models=(name,))) for name in ("a", "b"))
    (store.create(make_job(measure="text", models=("c",))).folder / "job.json").write_text("{")
    with store.enqueue(waits.id), store.enqueue(works.id):
        write_progress(works.folder, Progress("b: window", 3, 10, 1, 100.0))
        app = page()
        shown = said(app)
        for words in ("done", "incomplete", "waits", "running", "Teacher, Student", "delete this evaluation"):
            assert words in shown
        assert not app.exception
        app.button(key=f"open {works.id}").click().run()
        assert "running" in said(app)
        app.button(key="evaluation cancel").click().run()
        assert store.get(works.id).is_ending
        assert "ending" in said(app)
    app = page(evaluation=works.id)
    assert "Its process has ended" in said(app, "warning")
    app.button(key="evaluation continue").click().run()
    assert started == [works.id]
    app = page(evaluation=done.id)
    assert "it is gone" in said(app, "warning")
    app.button(key="evaluation delete").click().run()
    assert done.id not in [one.id for one in store.all()]
    assert "no evaluation nowhere" in said(page(evaluation="nowhere"), "error")


def test_results_on_a_text(store: EvaluationStore) -> None:
    app = page(evaluation=made(store, "text").id)
    assert not app.exception
    assert not app.error
    shown = said(app, "html", "caption", "markdown")
    assert "Teacher" in shown
    assert "&lt;b&gt;Third&lt;/b&gt; _one_" in shown
    assert "From Teacher +7.9" in shown
    assert "not comparable" in shown
    assert "KL to the teacher 0.3" in shown
    assert "0.913 bits per byte" in shown
    assert "Perplexity 12.30 (" in shown
    assert "Its tokenizer is not the teacher" in shown
    assert "Word start" in shown
    app.selectbox(key="evaluation other").set_value(1).run()
    assert "From Student −7.9" in said(app, "html")


def test_results_of_tasks(store: EvaluationStore) -> None:
    app = page(evaluation=made(store, "tasks", tasks=("piqa", "boolq")).id)
    assert not app.exception
    shown = said(app, "html", "caption", "markdown")
    assert "100.0% right" in shown
    assert "50.0% right" in shown
    assert "From Teacher −50.0" in shown
    assert "Teacher alone is right on **12**, Student alone on **0** of the questions" in shown
    assert "Question 1 of piqa?" in shown
    assert "Student yes &lt;i&gt;" in shown
    assert "✓ right" in shown
    app.selectbox(key="evaluation winner").set_value("Student").run()
    assert "Question 1 of piqa?" not in said(app, "html")


def test_answers_are_voted_on_and_taken_along(store: EvaluationStore) -> None:
    one = made(store, "prompts", prompts=("Why <b>?", "=How?"))
    app = page(evaluation=one.id)
    assert not app.exception
    shown = said(app, "html", "caption")
    assert "Why &lt;b&gt;?" in shown
    assert "cut off at the limit" in shown
    assert "No answer: the conversation has 900 tokens" in shown
    app.button_group(key="evaluation vote 0").set_value(1).run()
    parts, job = Parts(one.folder), one.job
    assert parts.votes() == {0: 1}
    rows = list(csv.DictReader(io.StringIO(answers_csv(job, parts))))
    assert len(rows) == 6
    assert rows[0]["answer"].startswith("'=Answer 0")
    assert rows[3]["prompt"] == "'=How?"
    assert rows[0]["vote"] == "Student"
    assert (rows[4]["error"], rows[4]["answer"]) == ("the conversation has 900 tokens", "")
    text = answers_page(job, parts)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Why &lt;b&gt;?" in text
    assert "Vote: Student" in text
    assert "http" not in text.replace("http-equiv", "")
    assert MODELS[2] not in text
