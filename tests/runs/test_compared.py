"""Runs side by side: what differs, what can be compared, and the frontier against brute force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbllm.config import SETTINGS, make_config
from lbllm.errors import RunError
from lbllm.events import Evaluated
from lbllm.runs.compared import (
    NOT_USED,
    Group,
    Point,
    cautions,
    differing,
    find,
    frontier,
    groups,
    loss_caution,
    missing,
    points,
    setting_text,
)
from lbllm.runs.listed import Listed, teacher_key
from lbllm.runs.notes import Note
from lbllm.runs.store import RunStore
from tests.helpers.cases import cases


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


def one(store: RunStore, changes: dict[str, Any], preset: str = "quick", **known: Any) -> Listed:
    run = store.create(make_config(preset, {"model": "some/model"} | changes))
    return Listed(run, Note(), config=run.config, teacher=teacher_key(run, run.config), **known)


def result(text: str, perplexity: float, kl: float | None = None) -> dict[str, Evaluated]:
    return {text: Evaluated(what="e2e", text=text, perplexity=perplexity, tokens=9, kl=kl)}


def test_only_the_settings_that_differ_are_told(store: RunStore) -> None:
    first = one(store, {"quant": {"group_size": 64}, "seed": 1})
    second = one(store, {"quant": {"group_size": -1, "skip": ["*.down_proj"]}, "seed": 1, "wat": {"tokens": 65_536}})
    rows, same = differing([first, second])
    assert rows == {
        "quant.group_size": ["64", "whole row"],
        "quant.skip": ["none", "*.down_proj"],
        "wat.tokens": ["24,576", "65,536"],
    }
    assert same == len(SETTINGS) - len(rows) - 2  # neither the preset nor the schema version says anything of a run
    assert differing([first, first]) == ({}, len(SETTINGS) - 2)
    assert differing([]) == ({}, 0)
    # A run whose settings can't be read hides nothing of the others.
    rows, _ = differing([first, replace(first, config=None), second])
    assert rows["quant.group_size"] == ["64", "?", "whole row"]


def test_a_setting_that_no_stage_reads_is_not_used(store: RunStore) -> None:
    whole = one(store, {"stages": ["ptq", "wat", "aar"], "aar": {"epochs": 3}})
    short = one(store, {"stages": ["ptq"], "aar": {"epochs": 5}})
    rows, _ = differing([whole, short])
    assert rows["stages"] == ["1–3", "1"]
    assert rows["aar.epochs"] == ["3", NOT_USED]
    assert rows["wat.epochs"] == ["1", NOT_USED]
    # Without stage 3 nothing quantizes the activations.
    assert rows["quant.act_bits"] == ["4", "16"]
    assert not {path for path in rows if path.startswith("ptq.")}


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("quant.format", "w1", "W1"),
        ("start", None, "none"),
        ("ptq.damping", 0.1, "0.1"),
        ("quant.act_group_size", -1, "whole row"),
        ("quant.overrides", {"*.q": {"group_size": 16}}, '1 pattern: "*.q": {"group_size": 16}'),
        ("quant.overrides", {}, "none"),
    ],
)
def test_values_as_people_read_them(path: str, value: object, text: str) -> None:
    assert setting_text(path, value) == text


def test_a_long_plan_of_layers_is_shortened() -> None:
    text = setting_text("quant.overrides", {f"layers.{n}": {"group_size": 16} for n in range(200)})
    assert text.startswith("200 patterns: ")
    assert len(text) < 120


def test_perplexities_of_other_teachers_and_texts_are_kept_apart(store: RunStore) -> None:
    a, b = (one(store, {}, bits=bits, measured=result("x", 20.0 + bits, 0.5)) for bits in (2.0, 3.0))
    c = one(store, {"model": "other"}, bits=2.5, measured=result("x", 1.0))
    d = one(store, {}, bits=1.0, measured=result("y", 2.0) | result("x", 30.0))
    found = groups([c, a, b, d])
    assert [(group.text, group.model, len(group.runs)) for group in found] == [
        ("x", "some/model", 3),
        ("x", "other", 1),
        ("y", "some/model", 1),
    ]
    made = points([c, a, b, d], found[0], "bits", "perplexity")
    assert made == [Point(a.run.id, 2.0, 22.0), Point(b.run.id, 3.0, 23.0), Point(d.run.id, 1.0, 30.0)]
    assert missing([c, a, b, d], made) == [c]
    assert points([c, a, b, d], found[0], "bits", "kl") == [Point(a.run.id, 2.0, 0.5), Point(b.run.id, 3.0, 0.5)]
    assert points([c, a, b, d], found[0], "size", "kl") == []
    said = " ".join(cautions([a, b, c, d]))
    assert "2 different teachers (some/model, other)" in said
    assert "measured on 2 different texts" in said
    assert cautions([a, b]) == []
    machines = [replace(a, speed=1.0, machine="here"), replace(b, speed=2.0, machine="there")]
    assert "2 different machines" in cautions(machines)[0]


def test_a_number_that_is_not_finite_has_no_place(store: RunStore) -> None:
    bad = one(store, {}, bits=float("nan"), measured=result("x", 20.0))
    worse = one(store, {}, bits=2.0, measured=result("x", float("inf")))
    group = groups([bad, worse])[0]
    assert points([bad, worse], group, "bits", "perplexity") == []


def test_losses_of_other_kinds_or_teachers_are_not_compared(store: RunStore) -> None:
    a, b = one(store, {}), one(store, {"wat": {"loss": "mse"}})
    assert loss_caution([a, a], "wat") is None
    assert "different losses here (mse, relative)" in str(loss_caution([a, b], "wat"))
    assert loss_caution([a, b], "aar") is None
    assert loss_caution([a, b], "ptq") is None
    assert "different teachers" in str(loss_caution([a, one(store, {"model": "other"})], "ptq"))


def test_runs_are_found_by_their_ids_in_that_order(store: RunStore) -> None:
    a, b = one(store, {}), one(store, {})
    assert find([a, b], [b.run.id, a.run.id, b.run.id]) == [b, a]
    with pytest.raises(RunError, match="no run 'nowhere'"):
        find([a, b], ["nowhere"])


coordinates = st.integers(0, 6).map(float)


@cases(200)
@given(made=st.lists(st.builds(Point, st.uuids().map(str), coordinates, coordinates), max_size=12), more=st.booleans())
def test_the_frontier_is_what_no_other_point_beats(made: list[Point], more: bool) -> None:
    def beats(other: Point, point: Point) -> bool:
        better_x = other.x > point.x if more else other.x < point.x
        return (better_x or other.x == point.x) and other.y <= point.y and (better_x or other.y < point.y)

    kept = frontier(made, more_is_better=more)
    assert {point.run for point in kept} == {p.run for p in made if not any(beats(other, p) for other in made)}
    assert [point.x for point in kept] == sorted(point.x for point in kept)


def test_a_group_without_its_runs_has_no_points() -> None:
    assert points([], Group("t", "x", "m", ()), "bits", "kl") == []
    assert frontier([]) == []
