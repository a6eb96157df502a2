"""Workers of evaluations as processes: one after the other, killed and continued, cancelled while they wait."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from lbllm.evaluation.job import make_job
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.store import ACTIVE, EvaluationStore
from lbllm.files import try_lock
from tests.helpers.homes import own_home
from tests.helpers.tiny_models import SENTENCES, save_tiny
from tests.helpers.waiting import wait_until

SECONDS = 300.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationStore:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home")))
    return EvaluationStore()


@pytest.mark.soak
def test_a_killed_worker_is_noticed_and_the_queue_goes_on(store: EvaluationStore, tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model", "llama"))
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 3_000))
    text = {"measure": "text", "text": str(tmp_path / "text.txt"), "seq_len": 256}
    long = store.create(make_job(models=(model,), windows=2_000, **text))
    bad = store.create(make_job(models=(str(tmp_path / "gone"),), **text))
    short = store.create(make_job(models=(model,), windows=2, **text))
    process = store.start(long.id)
    wait_until(lambda: len(Parts(long.folder).losses(0, 255).nll) >= 8, SECONDS)
    for one in (bad, short):
        store.start(one.id)
    assert [store.get(one.id).state for one in (long, bad, short)] == ["running", "queued", "queued"]
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: store.get(long.id).state == "interrupted", SECONDS)
    # A model that is gone fails by itself, and the next one is measured.
    wait_until(lambda: store.get(short.id).state == "done", SECONDS)
    # Two that begin to wait at almost the same moment may get their turn in either order.
    wait_until(lambda: store.get(bad.id).state == "failed", SECONDS)
    assert "gone does not exist" in store.get(bad.id).message
    before = (long.folder / "losses-0.f32").read_bytes()
    store.start(long.id)
    wait_until(
        lambda: (progress := store.get(long.id).progress) is not None and progress.done > progress.before, SECONDS
    )
    store.cancel(long.id)
    wait_until(lambda: store.get(long.id).state == "cancelled", SECONDS)
    after = (long.folder / "losses-0.f32").read_bytes()
    whole = len(before) // (12 * 255) * 12 * 255
    assert after[:whole] == before[:whole]
    assert len(after) > whole


@pytest.mark.soak
def test_one_that_waits_for_its_turn_is_cancelled_at_once(store: EvaluationStore, tmp_path: Path) -> None:
    (tmp_path / "home" / "runs").mkdir()
    turn = try_lock(tmp_path / "home" / "runs" / "worker.lock")
    assert turn is not None
    with turn:
        one = store.create(make_job(measure="text", models=("nothing",)))
        store.start(one.id)
        assert store.get(one.id).state == "queued"
        store.cancel(one.id)
        wait_until(lambda: store.get(one.id).state not in ACTIVE, SECONDS)
    assert json.loads((one.folder / "end.json").read_text())["state"] == "cancelled"
