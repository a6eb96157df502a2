"""The list's filters and the comparison of runs, without a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app.runs import overlay
from lbllm.config import make_config
from lbllm.events import Evaluated, RunDone
from lbllm.runs.compared import Point
from lbllm.runs.listed import Listed
from lbllm.runs.notes import Note, note_of, write_note, write_tags
from lbllm.runs.store import Run, RunStore
from tests.app.test_runs_page import done, made, page, said
from tests.helpers.homes import own_home


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    store = RunStore(tmp_path / "home" / "runs")
    yield store
    store.close()


def finished(store: RunStore, name: str, perplexity: float, bits: float, **changes: object) -> Run:
    config = make_config("quick", {"model": "some/model"} | changes)
    result = Evaluated(what="wat", text="a text", perplexity=perplexity, tokens=9, kl=perplexity / 100)
    run = made(store, name, *done()[:-1], result, config=config)
    store.append(run.id, RunDone(path="x", bpw=bits, disk_bytes=int(bits * 1e6), seconds=5))
    return store.get(run.id)


def shown_runs(app: AppTest) -> list[str]:
    address = app.query_params["compare"]
    return (address if isinstance(address, str) else address[0]).split(",")


def names(app: AppTest) -> list[str]:
    return [button.label for button in app.button if str(button.key).startswith("open ")]


def test_the_list_is_filtered_and_ordered(store: RunStore) -> None:
    a = finished(store, "first", 30.0, 3.0)
    finished(store, "second", 20.0, 2.0)
    made(store, "waits")
    write_tags(store, a.id, ["paper"])
    write_note(store, a.id, "why <b>not</b>")
    app = page()
    assert names(app) == ["waits", "second", "first"]
    assert "why &lt;b&gt;not&lt;/b&gt;" in " ".join(str(one.proto.body) for one in app.get("html"))
    app.selectbox(key="sort").set_value("Lowest perplexity").run()
    assert names(app) == ["second", "first", "waits"]
    app.multiselect(key="state").set_value(["done"]).run()
    assert names(app) == ["second", "first"]
    app.multiselect(key="tag").set_value(["paper"]).run()
    assert names(app) == ["first"]
    assert "1 of 3 runs" in said(app, "caption")
    app.text_input(key="find").set_value("nothing like it").run()
    assert names(app) == []
    assert "No run is like this" in said(app, "info")


def test_a_note_and_tags_are_written_on_the_page_of_a_run(store: RunStore) -> None:
    run = finished(store, "first", 30.0, 3.0)
    app = page(run=run.id)
    app.text_area(key=f"note {run.id}").set_value("the best").run()
    tags = app.multiselect(key=f"tags {run.id}")
    tags.options.append("paper")
    tags.set_value(["paper"]).run()
    app.button(key=f"write {run.id}").click().run()
    assert note_of(store, run.id) == Note("the best", ("paper",))
    assert "the best" in said(app, "html")


def test_ticked_runs_are_compared_at_an_address(store: RunStore) -> None:
    first, second = finished(store, "first", 30.0, 3.0), finished(store, "second", 20.0, 2.0, quant={"group_size": 64})
    app = page()
    assert app.button(key="compare picked").disabled
    for run in (first, second):
        app.checkbox(key=f"pick {run.id} 0").check().run()
    app.button(key="compare picked").click().run()
    assert shown_runs(app) == [first.id, second.id]
    assert not app.exception
    assert not app.error
    shown = said(app, "html")
    assert "1 setting differs, " in shown
    assert "Group size 16 64" in shown
    assert "Perplexity 30.00 20.00" in shown
    assert "Seed" not in shown
    # Another run is added by its name, and the address follows.
    third = finished(store, "third", 5.0, 2.5, model="other/model")
    app = page(compare=f"{first.id},{third.id},nowhere")
    assert "no run nowhere" in said(app, "error")
    assert "2 different teachers" in said(app, "info")
    # The plot has one teacher and text at a time.
    assert len(app.selectbox(key="compared group").options) == 2
    app.multiselect(key="compared runs").set_value([first.id]).run()
    assert shown_runs(app) == [first.id]


def test_a_comparison_of_runs_that_are_gone_or_damaged_is_no_error(store: RunStore) -> None:
    run, other = finished(store, "first", 30.0, 3.0), made(store, "second")
    (run.folder / "config.json").write_text("[")
    app = page(compare=f"{run.id},{other.id}")
    assert not app.exception
    assert not app.error
    assert "two runs with readable settings" in said(app, "html")
    app = page(compare="")
    assert "Choose two runs or more" in said(app, "caption")


def test_the_frontier_is_drawn_between_the_best_points(store: RunStore) -> None:
    runs = [finished(store, f"<b>{n}</b> %{{x}}", 10.0, 1.0) for n in range(3)]
    listed = [Listed(run, Note(), run.config, "t") for run in runs]
    places = [Point(run.id, x, y) for run, x, y in zip(runs, (1.0, 2.0, 3.0), (5.0, 6.0, 1.0), strict=True)]
    figure = overlay.pareto(listed, places, "bits", "perplexity", 0.5)
    line, *dots = figure["data"]
    assert (line["x"], line["y"], line["line"]["shape"]) == ([1.0, 3.0], [5.0, 1.0], "hv")
    assert [dot["text"] for dot in dots] == [["1"], ["2"], ["3"]]
    assert [dot["marker"]["line"]["width"] for dot in dots] == [2, 0, 2]
    assert figure["layout"]["shapes"][0]["y0"] == 0.5
    # A name is shown as it was written.
    assert "<b>" not in dots[0]["hovertemplate"].partition("<br>")[0]
    assert "%{x}" not in dots[0]["hovertemplate"]
    # Where more is better, the last point beats both others, and one point needs no line.
    speed = overlay.pareto(listed, places, "speed", "kl", None)["data"]
    assert [trace["uid"] for trace in speed] == [f"point {run.id}" for run in runs]
    assert [trace["marker"]["line"]["width"] for trace in speed] == [0, 0, 2]
    assert overlay.pareto(listed, [], "bits", "kl", None)["layout"]["annotations"]
    json.dumps(figure, allow_nan=False)
    assert len({(overlay.colour(n), n // len(overlay.PALETTE)) for n in range(28)}) == 28


@pytest.mark.parametrize("curves", ["Every block", "One block", "Each stage"])
def test_every_kind_of_curve_is_drawn(store: RunStore, tmp_path: Path, curves: str) -> None:
    first, second = finished(store, "first", 30.0, 3.0), made(store, "second")
    app = page(compare=f"{first.id},{second.id}", curves=curves)
    assert not app.exception
    assert not app.error
    expected = {"Every block": "Loss of every block", "One block": "Loss of block 1", "Each stage": "after each stage"}
    assert expected[curves] in said(app, "markdown")
