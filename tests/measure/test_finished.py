"""Finished runs measured on one text: the figures are those of the engine's own functions, and events of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lbllm.checkpoints.hf import load
from lbllm.config import make_config
from lbllm.errors import RunError
from lbllm.events import Evaluated, SpeedMeasured
from lbllm.measure.finished import ANSWER, measure_finished
from lbllm.measure.perplexity import divergence
from lbllm.models.teacher import load_teacher
from lbllm.runs.listed import describe
from lbllm.runs.notes import Note
from lbllm.runs.store import RunStore
from lbllm.runs.view import SUMMARY_KINDS, RunView
from lbllm.texts.corpus import load_corpus
from tests.helpers.finished_run import finished_run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


def test_kl_and_speed_of_a_finished_run(store: RunStore, tmp_path: Path) -> None:
    run = finished_run(store, tmp_path, ("ptq",))
    told: list[tuple[int, str]] = []
    before = [stored.event for stored in store.events(run.id, kinds=("evaluated",))]
    text = measure_finished(store, [run], on_progress=lambda done, what: told.append((done, what)))
    # The same tokens as the run's own evaluations, by the same name.
    assert {event.text for event in before if isinstance(event, Evaluated)} == {text}
    view = RunView(run.id, SUMMARY_KINDS)
    with view.caught_up(store):
        found = describe(run, view, Note(), 0.0)
    windows = load_corpus(
        run.config.corpus, load_teacher(run.config.model).tokenizer, seq_len=32, tokens=2_048, part="heldout"
    ).sequences
    student, _ = load(run.folder / "checkpoint")
    expected = divergence(load_teacher(run.config.model).model, student, windows)
    assert found.measured[text].kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.measured[text].perplexity == pytest.approx(expected.student_perplexity, rel=1e-4)
    assert found.teachers[text].perplexity == pytest.approx(expected.teacher_perplexity, rel=1e-4)
    assert found.teachers[text].kl == 0
    assert found.speed is not None
    assert found.speed > 0
    (speed,) = [stored.event for stored in store.events(run.id, kinds=("speed_measured",))]
    assert isinstance(speed, SpeedMeasured)
    assert speed.tokens == ANSWER
    assert speed.machine
    assert [what.partition(": ")[2] for _, what in told] == ["loading", "perplexity and KL", "speed"]


def test_a_run_that_is_not_done_is_refused_before_anything_is_loaded(store: RunStore) -> None:
    run = store.create(make_config("quick"))
    with pytest.raises(RunError, match="is queued; only a finished run"):
        measure_finished(store, [run])
    with pytest.raises(RunError, match="no run is chosen"):
        measure_finished(store, [])
