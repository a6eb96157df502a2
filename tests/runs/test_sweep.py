"""A sweep: each combination once, refusals that name setting and value, and a queue that is whole or not there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbllm.config import make_config
from lbllm.errors import ConfigError, LbllmError, RunError
from lbllm.runs.notes import Note, notes
from lbllm.runs.store import Run, RunStore
from lbllm.runs.sweep import MOST_RUNS, free_name, parse_axis, planned, queue
from tests.helpers.cases import cases

CONFIG = make_config("quick", {"model": "some/model"})
AXES: dict[str, list[Any]] = {"quant.group_size": [16, 32, -1], "quant.param_bits": [4, 8]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("quant.group_size=16,32,-1", ("quant.group_size", [16, 32, -1])),
        ("wat.bitmap=coupled, relaxed", ("wat.bitmap", ["coupled", "relaxed"])),
        ("ptq.damping=0.1", ("ptq.damping", [0.1])),
        ('stages=[["ptq"], ["ptq", "wat"]]', ("stages", [["ptq"], ["ptq", "wat"]])),
    ],
)
def test_axes_are_read(text: str, axis: tuple[str, list[Any]]) -> None:
    assert parse_axis(text) == axis


def test_every_combination_is_one_run() -> None:
    runs = planned(CONFIG, AXES)
    assert [tuple(one.choice.values()) for one in runs] == [*itertools.product(*AXES.values())]
    for one in runs:
        quant = one.config.quant
        assert (quant.group_size, quant.param_bits) == (*one.choice.values(),)
        assert one.config.model_copy(update={"quant": CONFIG.quant}) == CONFIG
    assert runs[0].name == "Group size 16, Bits of group parameters 4"
    assert runs[4].name == "Group size whole row, Bits of group parameters 4"


@cases(20)
@given(
    sizes=st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=4),
    epochs=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_repeated_values_make_no_further_runs(sizes: list[int], epochs: list[int]) -> None:
    runs = planned(CONFIG, {"quant.group_size": sizes, "wat.epochs": epochs})
    found = {(one.config.quant.group_size, one.config.wat.epochs) for one in runs}
    assert found == {*itertools.product(sizes, epochs)}
    assert len(runs) == len(found)


def test_combinations_that_make_the_same_run_are_one() -> None:
    stages = [["ptq"], ["ptq", "wat"]]
    runs = planned(CONFIG, {"stages": stages, "wat.epochs": [1, 2, 3]})
    assert [one.choice["wat.epochs"] for one in runs] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "varies no setting"),
        ({"quant.group_size": []}, r"quant.group_size \(Group size\) has no values"),
        ({"quant.group_size": [16, 0]}, "a group has at least one member"),
        ({"quant.param_bits": [4, 5]}, "quant.param_bits.*given: 5"),
        ({"quant.nothing": [1]}, "quant.nothing"),
        ({"preset": ["quick", "paper"]}, "is not a setting that a sweep can vary"),
        ({"seed": [*range(MOST_RUNS + 1)]}, "has 33 runs, and at most 32"),
        ({"seed": [*range(1000)], "wat.epochs": [*range(1, 1000)]}, "has 999,000 runs"),
    ],
)
def test_what_cannot_be_varied_is_named(axes: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(CONFIG, axes)


def test_a_setting_that_no_run_reads_is_refused() -> None:
    weights = make_config("preview", {"model": "some/model"})
    with pytest.raises(ConfigError, match="Stage 3 is not among the stages"):
        planned(weights, {"aar.epochs": [1, 2]})
    further = make_config("quick", {"model": "some/model", "start": "shipped", "stages": ["e2e"]})
    with pytest.raises(ConfigError, match=r"quant.format \(Weights\) is decided by the starting checkpoint shipped"):
        planned(further, {"quant.format": ["w1", "w1+1"]})
    assert len(planned(further, {"e2e.epochs": [1, 2]})) == 2


@pytest.mark.parametrize("text", ["", "=1", "quant.group_size", "stages=[1,"])
def test_what_is_no_axis_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected setting=value|not valid JSON"):
        parse_axis(text)


def test_a_sweep_is_queued_in_order_with_its_tag(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int]] = []
    monkeypatch.setattr(RunStore, "start", lambda self, run_id, processes=1: begun.append((run_id, processes)))
    runs = queue(store, planned(CONFIG, AXES), "sweep 1", 2)
    assert [run.id for run in runs] == [run_id for run_id, _ in begun]
    assert {processes for _, processes in begun} == {2}
    assert [run.config.quant.group_size for run in runs] == [16, 16, 32, 32, -1, -1]
    assert runs[0].name == "Group size 16, Bits of group parameters 4"
    assert notes(store) == {run.id: Note("", ("sweep 1",)) for run in runs}
    assert free_name(notes(store)) == "sweep 2"
    assert free_name({}) == "sweep 1"


def test_a_sweep_that_cannot_be_created_leaves_no_run(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    create, count = RunStore.create, iter(range(9))

    def full(self: RunStore, *arguments: Any) -> Run:
        if next(count) == 3:
            raise LbllmError("no space")
        return create(self, *arguments)

    monkeypatch.setattr(RunStore, "create", full)
    monkeypatch.setattr(RunStore, "start", lambda *_: pytest.fail("a run of half a sweep was started"))
    with pytest.raises(LbllmError, match="no space"):
        queue(store, planned(CONFIG, AXES), "sweep 1")
    with pytest.raises(RunError, match="comma"):
        queue(store, planned(CONFIG, AXES), "a, b")
    assert store.all() == store.deleted() == []
    assert [path for path in store.root.iterdir() if path.is_dir() and path.name != "deleted"] == []
