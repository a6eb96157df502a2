"""Lists of runs: what is said of each, which are found, and their order."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbllm.config import make_config
from lbllm.events import Evaluated, Event, RunDone, SpeedMeasured, StageStarted
from lbllm.runs.listed import ORDERS, Listed, Wanted, describe, matching, ordered, scales
from lbllm.runs.notes import Note
from lbllm.runs.store import Run, RunStore
from lbllm.runs.view import SUMMARY_KINDS, RunView
from tests.helpers.run_events import block, started, whole_run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


def evaluated(what: str, text: str, perplexity: float, kl: float | None = None) -> Evaluated:
    return Evaluated(what=what, text=text, perplexity=perplexity, tokens=9, kl=kl)


def listed(store: RunStore, run: Run, *events: Event, note: Note | None = None) -> Listed:
    for event in events:
        store.append(run.id, event)
    view = RunView(run.id, SUMMARY_KINDS)
    with view.caught_up(store):
        return describe(store.get(run.id), view, note or Note(), now=0.0)


def test_what_is_said_of_a_run(store: RunStore) -> None:
    run = store.create(make_config("quick", {"model": "some/model"}), "mine")
    new = listed(store, run)
    assert (new.model, new.format, new.bits, new.parts, new.progress) == ("some/model", "W(1+1)A4KV4", None, (0, 0), 0)
    events = [started(), StageStarted(stage="ptq", steps=0), *block("ptq", 0), *block("ptq", 1)]
    events += [StageStarted(stage="wat", steps=6), *block("wat", 0)]
    half = listed(store, run, *events)
    assert half.parts == (3, 6)
    assert half.progress == 0.5
    assert (half.bits, half.size) == (3.25, None)
    # The newest evaluation of the latest stage counts, and the text that was evaluated last.
    measured = [evaluated("teacher", "a", 9.0), evaluated("ptq", "a", 30.0), evaluated("aar", "a", 20.0)]
    measured += [evaluated("aar", "b", 40.0), evaluated("aar", "a", 21.0, 0.5), evaluated("ptq", "a", 31.0)]
    measured += [evaluated("rtn", "c", 50.0)]
    end = RunDone(path="x", bpw=3.0, disk_bytes=10**8, seconds=5)
    whole = listed(store, run, *measured, SpeedMeasured(tokens_per_second=12.5, tokens=64, machine="here"), end)
    assert {text: one.perplexity for text, one in whole.measured.items()} == {"b": 40.0, "a": 21.0}
    assert whole.latest is not None
    assert (whole.latest.perplexity, whole.latest.kl, whole.teachers["a"].perplexity) == (21.0, 0.5, 9.0)
    assert (whole.bits, whole.size, whole.speed, whole.machine) == (3.0, 10**8, 12.5, "here")


def test_a_finished_run_has_all_its_parts_and_one_without_settings_is_listed(store: RunStore) -> None:
    run = store.create(make_config("quick"))
    assert listed(store, run, *whole_run()).progress == 1
    (run.folder / "config.json").write_text("[")
    damaged = listed(store, run)
    assert (damaged.config, damaged.model, damaged.format) == (None, None, None)


def test_runs_of_one_teacher_are_told_from_others(store: RunStore, tmp_path: Path) -> None:
    runs = [store.create(make_config("quick", {"model": name})) for name in ("some/model", "Some/Model", "other/model")]
    keys = [listed(store, run).teacher for run in runs]
    assert keys[0] == keys[1] != keys[2]
    # What a run has seen of the weights decides, whatever the model is called.
    for run, seen in zip(runs, ("{}", '{"a": 1}', "{}"), strict=True):
        (run.folder / "teacher.json").write_text(seen)
    keys = [listed(store, run).teacher for run in runs]
    assert keys[0] == keys[2] != keys[1]


def test_runs_are_found_by_words_tags_state_and_model(store: RunStore) -> None:
    first = listed(store, store.create(make_config("quick", {"model": "some/model"}), "Small groups"))
    second = listed(store, store.create(make_config("paper", {"model": "other"}), "paper's"), *whole_run())
    first = dataclasses.replace(first, note=Note("with sweeps", ("Paper", "g16")))
    both = [first, second]

    def found(**wanted: object) -> list[Listed]:
        return matching(both, Wanted(**wanted))  # type: ignore[arg-type]

    assert found() == both
    assert found(words="PAPER") == both
    assert found(words="groups sweeps") == [first]
    assert found(words="groups nothing") == []
    assert found(words=second.run.id) == [second]
    assert found(words="w(1+1)") == both
    assert found(tags=("paper",)) == [first]
    assert found(tags=("paper", "none")) == []
    assert found(states=("done", "failed")) == [second]
    assert found(models=("other",)) == [second]


def test_every_order_is_that_of_a_sort_by_hand(store: RunStore) -> None:
    choice = random.Random(0)
    runs = []
    for number in range(24):
        run = dataclasses.replace(store.create(make_config("quick"), choice.choice("aAbB")), created=float(number))
        one = dataclasses.replace(listed(store, run), run=run, bits=choice.choice([None, 2.0, 3.0, 2.5]))
        text = choice.choice(["a", "b"])
        known = {text: evaluated("wat", text, choice.choice([20.0, 30.0, 40.0]))} if choice.random() < 0.7 else {}
        one = dataclasses.replace(one, size=choice.choice([None, 1, 2]), seconds=choice.random(), measured=known)
        runs.append(dataclasses.replace(one, teacher=choice.choice(["t", "u"])))
    choice.shuffle(runs)
    assert [one.run.created for one in ordered(runs, "newest")] == [*range(23, -1, -1)]
    assert [one.run.created for one in ordered(runs, "oldest")] == [*range(24)]
    assert [one.run.name.lower() for one in ordered(runs, "name")] == sorted(one.run.name.lower() for one in runs)
    for order in ORDERS:
        assert sorted(one.run.id for one in ordered(runs, order)) == sorted(one.run.id for one in runs)
    bits = [one.bits for one in ordered(runs, "bits")]
    known_bits = sorted(one.bits for one in runs if one.bits is not None)
    assert bits == [*known_bits, *[None] * (24 - len(known_bits))]
    assert [one.seconds for one in ordered(runs, "time")] == sorted((one.seconds for one in runs), reverse=True)
    # Perplexities rise within a teacher and text, which stay together; runs without one are last.
    best = [one for one in ordered(runs, "perplexity") if one.latest is not None]
    assert all(one.latest is None for one in ordered(runs, "perplexity")[len(best) :])
    groups = [(one.teacher, one.latest.text) for one in best if one.latest is not None]
    assert len(scales(runs)) == len({*groups}) == sum(a != b for a, b in itertools.pairwise(groups)) + 1
    assert [groups.count(group) for group in dict.fromkeys(groups)] == sorted(map(groups.count, {*groups}))[::-1]
    for group in {*groups}:
        values = [one.latest.perplexity for one in best if one.latest and (one.teacher, one.latest.text) == group]
        assert values == sorted(values)
