"""runs list, note, tag, compare and sweep: what they print, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbllm.config import make_config
from lbllm.events import Evaluated, Event, RunDone
from lbllm.measure.estimate import estimate
from lbllm.runs.store import Run, RunStore
from tests.helpers.homes import own_home
from tests.helpers.run_events import whole_run
from tests.helpers.spoken import Spoken
from tests.helpers.tiny_models import save_tiny


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home")))
    monkeypatch.setenv("COLUMNS", "200")
    return RunStore()


def made(store: RunStore, name: str, perplexity: float, size: int, kl: float | None = None, **changes: Any) -> Run:
    run = store.create(make_config("quick", {"model": "some/model"} | changes), name)
    end: list[Event] = [*whole_run()[:-1]]
    end += [Evaluated(what="aar", text="a text", perplexity=perplexity, tokens=9, kl=kl)]
    for event in [*end, RunDone(path="x", bpw=size / 1e6, disk_bytes=size, seconds=5)]:
        store.append(run.id, event)
    return store.get(run.id)


def test_runs_are_listed_by_tag_state_words_and_order(store: RunStore, say: Spoken) -> None:
    first = made(store, "first", 30.0, 3_000_000)
    second = made(store, "second", 20.0, 2_000_000, quant={"group_size": 128})
    new = store.create(make_config("quick", {"model": "other"}), "new [red]one[/]")
    say("runs", "tag", first.id, "paper", "g16")
    say("runs", "tag", second.id, "paper")

    def ids(*arguments: str) -> list[str]:
        return [run["id"] for run in say("runs", "list", *arguments, "--json")["runs"]]

    assert ids() == [first.id, second.id, new.id]
    assert ids("--sort", "bits") == [second.id, first.id, new.id]
    assert ids("--tag", "Paper", "--tag", "g16") == [first.id]
    assert ids("--state", "done", "--sort", "newest") == [second.id, first.id]
    assert ids("--find", "other") == [new.id]
    assert ids("--find", "nothing") == []
    shown = say("runs", "list")
    assert "new [red]one[/]" in shown
    assert "W(1+1)A4KV4" in shown
    assert "g16, paper" in shown
    assert "no run is like this" in say("runs", "list", "--find", "nothing")
    (document,) = say("runs", "list", "--tag", "g16", "--json")["runs"]
    assert (document["bpw"], document["perplexity"], document["text"]) == (3.0, 30.0, "a text")
    assert document["progress"] == 1
    assert "--sort size2: choose one of newest" in say("runs", "list", "--sort", "size2", code=1)
    assert "--state new: choose one of queued" in say("runs", "list", "--state", "new", code=1)


def test_notes_and_tags_are_written_and_shown(store: RunStore, say: Spoken) -> None:
    run = made(store, "first", 30.0, 3_000_000)
    assert "has no note" in say("runs", "note", run.id)
    assert say("runs", "note", run.id, "why [b]not[/b]", "--json")["note"] == "why [b]not[/b]"
    assert say("runs", "tag", run.id, "a", "b", "--json")["tags"] == ["a", "b"]
    assert say("runs", "tag", run.id, "c", "-r", "A", "--json")["tags"] == ["b", "c"]
    shown = say("runs", "show", run.id)
    assert "why [b]not[/b]" in shown
    assert "tags: b, c" in shown
    assert "has no tag 'x'; it has b, c" in say("runs", "tag", run.id, "-r", "x", code=1)
    assert "no run 'nowhere'" in say("runs", "note", "nowhere", "text", code=1)
    assert "has a comma" in say("runs", "tag", run.id, "a,b", code=1)


def test_runs_are_compared(store: RunStore, say: Spoken) -> None:
    first = made(store, "first", 30.0, 3_000_000, 0.5)
    second = made(store, "second", 20.0, 2_000_000, 0.6, quant={"group_size": 128}, seed=5)
    third = made(store, "third", 40.0, 1_000_000)
    other = made(store, "other", 1.0, 500_000, model="other")
    ids = [first.id, second.id, third.id]
    document = say("runs", "compare", *ids, "--json")
    assert document["settings"] == {"seed": ["0", "5", "0"], "quant.group_size": ["16", "128", "16"]}
    (measured,) = document["measured"]
    assert measured["frontier"] == sorted([second.id, third.id])
    assert measured["runs"][first.id] == {"perplexity": 30.0, "kl": 0.5, "stage": "aar"}
    assert document["cautions"] == []
    by_kl = say("runs", "compare", *ids, "--quality", "kl", "--cost", "size", "--json")["measured"][0]["frontier"]
    assert by_kl == sorted([first.id, second.id])
    shown = say("runs", "compare", *ids)
    assert "Group size" in shown
    assert "2 settings differ" in shown
    # Another teacher: compared, and said that it can't be in this.
    say("runs", "tag", other.id, "t")
    document = say("runs", "compare", first.id, "--tag", "t", "--json")
    assert [group["frontier"] for group in document["measured"]] == [[first.id], [other.id]]
    assert "2 different teachers (some/model, other)" in document["cautions"][0]
    assert "2 different teachers" in say("runs", "compare", first.id, other.id)
    assert "no run 'nowhere'" in say("runs", "compare", first.id, "nowhere", code=1)
    assert "no run is chosen" in say("runs", "compare", "--tag", "none", code=1)
    assert "--cost weight: choose one of bits, size, speed" in say("runs", "compare", *ids, "--cost", "weight", code=1)


def test_a_sweep_is_shown_then_queued(
    store: RunStore, say: Spoken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(RunStore, "start", lambda self, run_id, processes=1: begun.append(run_id))
    monkeypatch.setattr("lbllm.measure.estimate.fastest_matmul_rate", lambda device: 1e10)
    model = str(save_tiny(tmp_path / "teacher", "llama"))
    base = ["runs", "sweep", "--model", model, "--set", "seq_len=64", "--device", "cpu"]
    base += ["--vary", "quant.group_size=8,16", "--vary", "quant.param_bits=4,16"]
    shown = say(*base)
    assert "4 runs, about" in shown
    assert "nothing is started" in shown
    assert store.all() == []
    document = say(*base, "--json")
    assert [run["choice"] for run in document["runs"]] == [
        {"quant.group_size": size, "quant.param_bits": bits} for size in (8, 16) for bits in (4, 16)
    ]
    changes = {"model": model, "seq_len": 64, "device": "cpu", "quant": {"group_size": 16, "param_bits": 4}}
    assert document["runs"][2]["bpw"] == pytest.approx(estimate(make_config("quick", changes)).bpw)
    assert (document["problems"], document["started"]) == ([], [])
    started = say(*base, "--start", "--json")["started"]
    assert started == begun == [run.id for run in store.all()]
    assert say("runs", "list", "--tag", "sweep 1", "--json")["runs"][0]["id"] == started[0]
    # Refused before anything is queued.
    wrong = say(*base, "--vary", "quant.group_size=512", "--start", code=1)
    assert "longer than a row" in wrong
    assert "is not a setting that a sweep can vary" in say("runs", "sweep", "--vary", "preset=quick", code=1)
    assert len(store.all()) == 4
