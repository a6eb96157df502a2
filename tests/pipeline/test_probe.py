"""The loss on a few fixed tokens beside the loss of single batches: it costs little and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbllm.config import RunConfig
from lbllm.events import StepMetric
from lbllm.pipeline import run as pipeline
from lbllm.runs.database import Database
from lbllm.runs.store import RunStore
from lbllm.sections import STAGES
from lbllm.stages import probe
from tests.helpers.run_events import folded, step
from tests.helpers.tiny_models import SENTENCES
from tests.helpers.tiny_runs import stored_run_config


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> float:
        self.now += seconds
        return 0.5


@pytest.mark.parametrize("cost", [0.001, 0.03, 0.3, 5.0])
def test_measuring_takes_at_most_a_fiftieth_of_the_time(cost: float) -> None:
    clock = Clock()
    budget = probe.Budget(clock)
    clock.pass_by(20.0)  # loading
    measured = []
    for _ in range(30):
        one = probe.Probe(lambda: clock.pass_by(cost), 48, budget)
        for number in range(1, 49):
            clock.pass_by(0.3)
            if one.after(number) is not None:
                measured.append(number)
            # The first one may come before its cost is known.
            assert budget.spent <= max(0.02 * clock.now, cost)
    # The cheaper it is, the more often.
    assert len(measured) >= {0.001: 300, 0.03: 150, 0.3: 20, 5.0: 1}[cost]


def config_with_held_out_text(folder: Path) -> RunConfig:
    config = stored_run_config(folder)
    text = folder / "text.jsonl"
    documents = (" ".join(f"{number} {line}" for line in SENTENCES) for number in range(100))
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    e2e = config.e2e.model_copy(update={"tokens": 256, "batch_tokens": 64})
    return config.model_copy(update={"corpus": str(text), "stages": STAGES, "e2e": e2e})


@pytest.mark.soak
def test_the_checkpoint_is_the_same_without_it_and_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_held_out_text(tmp_path)
    monkeypatch.setattr(probe, "EVERY", 1)

    def steps(name: str, share: float, stop_after: int | None = None) -> list[StepMetric]:
        monkeypatch.setattr(probe, "SHARE", share)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "precision").write_text("no")
        found: list[StepMetric] = []

        def request() -> str | None:
            return "stop" if stop_after is not None and len(found) >= stop_after else None

        for event in pipeline.run(config, folder, request=request):  # type: ignore[arg-type]
            if isinstance(event, StepMetric):
                found.append(event)
        return found

    without = steps("without", 0.0)
    with_it = steps("with", 1000.0)
    steps("resumed", 1000.0, stop_after=12)
    after = steps("resumed", 1000.0)
    assert all(event.probe is None for event in without)
    assert all(event.probe is not None and event.probe > 0 for event in with_it)
    assert [event.loss for event in without] == [event.loss for event in with_it]
    # The same tokens: a resumed run measures the same numbers.
    assert [event.probe for event in after] == [event.probe for event in with_it][-len(after) :]
    weights = [
        (tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("without", "with", "resumed")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_a_step_without_it_is_stored_as_before(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create(RunConfig())
    measured = step("wat", 0, 1, 0.5).model_copy(update={"probe": 0.4})
    for event in (step("wat", 0, 1, 0.5), measured):
        store.append(run.id, event)
    bodies = [body for (body,) in store.database.query("SELECT body FROM events ORDER BY seq")]
    assert "probe" not in bodies[0]
    assert json.loads(bodies[1])["probe"] == 0.4
    assert [stored.event for stored in store.events(run.id)] == [step("wat", 0, 1, 0.5), measured]
    # A version that knows no probe refuses the store in one message, by its number.
    assert Database(tmp_path).query("PRAGMA user_version")[0][0] >= 3


def test_a_view_keeps_it_by_step_and_forgets_what_a_resumed_stage_repeats() -> None:
    taken = [step("e2e", 0, number, 1.0).model_copy(update={"probe": number / 10}) for number in (1, 2, 3, 4)]
    again = step("e2e", 0, 3, 1.0)
    view = folded(*((float(time), event) for time, event in enumerate([*taken, again])))
    assert view.blocks["e2e", 0].probes == {1: 0.1, 2: 0.2}
    assert len(view.blocks["e2e", 0].losses) == 3
