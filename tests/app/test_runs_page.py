"""The Runs page's logic, without a browser: what the list and a run's page say, in each state of a run."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app.runs.state import state_text
from lbllm.config import RunConfig, make_config
from lbllm.events import BlockDone, Evaluated, Event, RunDone, RunLoading, RunQueued, RunStopped, StageStarted
from lbllm.runs.store import Run, RunStore
from lbllm.runs.view import RunView
from tests.helpers import ROOT
from tests.helpers.homes import own_home
from tests.helpers.run_events import block, started

TEXT = "held-out part of embedded, 4 windows of 512 tokens"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    store = RunStore(tmp_path / "home" / "runs")
    yield store
    store.close()


def made(store: RunStore, name: str, *events: Event, config: RunConfig | None = None) -> Run:
    run = store.create(config or make_config("quick"), name)
    for event in events:
        store.append(run.id, event)
    return store.get(run.id)


def done(*more: Event) -> tuple[Event, ...]:
    begun = (RunQueued(), RunLoading(), started(), Evaluated(what="teacher", text=TEXT, perplexity=15.2, tokens=9))
    end = RunDone(path="x", bpw=3.25, disk_bytes=10**8, seconds=50)
    stages = (
        StageStarted(stage="ptq", steps=0),
        *block("ptq", 0),
        *block("ptq", 1),
        StageStarted(stage="wat", steps=6),
    )
    return (*begun, *stages, *block("wat", 0), *more, end)


def page(**params: str) -> AppTest:
    app = AppTest.from_file(ROOT / "app" / "workbench.py", default_timeout=60)
    # ``switch_page`` only knows pages after a run of the first one, which would load models.
    app._page_hash = calc_hash("runs")
    for name, value in params.items():
        app.query_params[name] = value
    return app.run()


def said(app: AppTest, *kinds: str) -> str:
    """All that is read on the page, its Markdown escapes and tags taken out."""
    elements: list[Any] = [element for kind in kinds or KINDS for element in app.get(kind)]
    texts = (str(getattr(one, "value", None) or getattr(one.proto, "body", "")) for one in elements)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"\\(.)", r"\1", " ".join(texts))))


KINDS = ("markdown", "caption", "error", "warning", "info", "success", "html")


def links(app: AppTest) -> dict[str, dict[str, list[str]]]:
    """The address parameters of the page's links, by their labels."""
    return {one.proto.label: parse_qs(one.proto.query_string) for one in app.get("page_link")}


def test_list_and_page_say_what_a_run_makes_from_what(store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    own = make_config("quick", {"model": str(tmp_path / "teacher"), "seed": 7, "quant": {"group_size": 64}})
    run = made(store, "mine", *done(), config=own)
    for shown in (said(page()), said(page(run=run.id))):
        for label, value in (("Model", "teacher"), ("Format", r"W\(1\+1\)A4KV4"), ("Group size", "64"), ("Seed", "7")):
            assert re.search(rf"{label} {value}", shown)
        assert re.search(r"Text embedded Tokens 24,576", shown)
    app = page()
    assert "Perplexity" in said(app, "html")
    assert "Time used" in said(app, "html")
    # The run's own teacher, not the one that Compare begins with; and the run's settings for another one.
    app = page(run=run.id)
    assert links(app)["Talk to it beside its teacher"] == {"left": [str(tmp_path / "teacher")], "right": [run.id]}
    assert links(app)["Measure it beside its teacher"] == {"models": [f"{tmp_path / 'teacher'},{run.id}"]}
    assert links(app)["Run again with these"] == {"again": [run.id]}
    assert "**Perplexity**" in said(app, "markdown")
    assert {metric.label: metric.value for metric in app.metric}["Teacher"] == "15.20"


def test_each_end_of_a_run_is_said(store: RunStore) -> None:
    early = made(store, "early")
    store.request(early.id, "cancel")
    later = made(store, "later", *done()[:-1], RunStopped(request="cancel"))
    stopped = made(store, "stopped", RunQueued(), RunStopped(request="stop"))
    assert "cancelled before its model was loaded" in said(page(run=early.id), "info")
    assert "its finished blocks are deleted" in said(page(run=later.id), "info")
    assert "stopped before its model was loaded" in said(page(run=stopped.id), "info")
    for run in (early, later, stopped):
        assert "charts begin" not in said(page(run=run.id))


def test_a_missing_folder_is_said_and_hides_nothing_else(store: RunStore) -> None:
    other, run = made(store, "other", *done()), made(store, "gone", *done())
    shutil.rmtree(run.folder)
    app = page()
    assert "folder missing" in said(app, "markdown")
    assert other.name in [button.label for button in app.button]
    app = page(run=run.id)
    assert not app.exception
    assert "was moved or deleted" in said(app, "error")
    assert "Talk to it beside its teacher" not in links(app)
    assert {metric.label: metric.value for metric in app.metric}["Teacher"] == "15.20"
    # Settings that can't be read are one line of their run, and an event that can't be read is a matter of its run.
    (other.folder / "config.json").write_text("[")
    with store.database.transaction() as db:
        query = "INSERT INTO events (run_id, seq, time, body) VALUES (?, 1000, 1.0, ?)"
        db.execute(query, (run.id, '{"kind": "evaluated"}'))
    made(store, "third", *done())
    app = page()
    assert not app.exception
    assert "settings can't be read" in said(app)
    assert {"other", "gone", "third"} <= {button.label for button in app.button}


def test_an_address_that_names_no_run_leads_back(store: RunStore) -> None:
    run = made(store, "there", *done())
    app = page(run="nonsense")
    assert "no run nonsense" in said(app, "error")
    assert "there" in [button.label for button in app.button]
    next(button for button in app.button if button.label == "All runs").click().run()
    assert "run" not in app.query_params
    assert not app.error
    store.delete(run.id)
    app = page(run=run.id)
    assert "is deleted" in said(app, "warning")
    app.button(key="restore this").click().run()
    assert store.get(run.id).name == "there"


def test_rename_delete_undo_and_remove(store: RunStore) -> None:
    run = made(store, "first name", *done())
    app = page(run=run.id)
    app.text_input(key=f"name {run.id}").set_value("second name").run()
    app.button(key=f"rename {run.id}").click().run()
    assert "second name" in said(app, "markdown")
    app.button(key=f"delete {run.id}").click().run()
    assert "run" not in app.query_params
    assert "second name is deleted" in said(app, "info")
    assert store.all() == []
    app.button(key="undo delete").click().run()
    assert [found.id for found in store.all()] == [run.id]
    assert not app.info
    store.delete(run.id)
    app = page()
    app.button(key=f"remove {run.id}").click().run()
    assert store.deleted() == []
    assert not run.folder.exists()


def test_a_run_waits_for_its_turn_only_while_another_one_has_it(store: RunStore) -> None:
    view = RunView("none")
    with ExitStack() as held:

        def worked(name: str, *events: Event) -> Run:
            run = made(store, name)
            lock = held.enter_context((run.folder / "alive.lock").open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for event in events:
                store.append(run.id, event)
            return store.get(run.id)

        def text(run: Run) -> str:
            return state_text(store, store.get(run.id), view, 0.0, {})

        # Never started, so nobody waits for it.
        made(store, "new")
        old = worked("old")
        alone = worked("alone", RunQueued())
        assert text(alone) == "starts"
        # A resumed run is old, but was queued last.
        store.append(old.id, RunQueued())
        assert text(old) == "waits for its turn, after 1 other run"
        assert text(alone) == "starts"
        store.append(alone.id, RunLoading())
        assert text(old) == "waits for its turn, after 1 other run"
        worked("third", RunQueued())
        assert text(old) == "waits for its turn, after 1 other run"
        store.append(alone.id, RunStopped(request="stop"))
        assert text(old) == "starts"
        page_of_waiting = said(page(run=old.id))
        assert "starts" in page_of_waiting
        assert "The charts begin when the model is loaded" in page_of_waiting


def test_blocks_that_training_made_worse_are_hatched_in_the_colour_of_their_stage() -> None:
    from app.runs.charts import timeline
    from app.view import COLOURS
    from tests.helpers.run_events import folded

    worse = BlockDone(stage="wat", block=0, loss_before=1, loss_after=1, seconds=1, memory_bytes=1, diverged=True)
    events = [event for event in done(worse) if not isinstance(event, RunDone)]
    figure = timeline(folded(*((float(time), event) for time, event in enumerate(events))), None)
    assert COLOURS["bad"] not in str(figure["data"][0]["colorscale"])
    assert figure["data"][0]["z"][1][0] == figure["data"][0]["z"][0][0] + 1
    assert [shape["type"] for shape in figure["layout"]["shapes"]] == ["path"]


def test_run_again_fills_the_form_with_the_run_s_settings(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def form() -> None:
        from app.quantize import form

        form.start()

    # Relative paths begin where the run was started, and not where the workbench was.
    (tmp_path / "there" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    run = made(store, "first", config=make_config("quick", {"model": "teacher", "seed": 7, "wat": {"epochs": 3}}))
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_function(form, default_timeout=60)
    app.query_params["again"] = run.id
    app.run()
    assert not app.exception
    assert "again" not in app.query_params
    filled = RunConfig.model_validate(app.session_state["quantize document"])
    assert filled == run.config.model_copy(update={"model": str(tmp_path / "there" / "teacher")})
