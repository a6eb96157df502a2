"""Files that earlier versions wrote are read, and the command line keeps its options, exit codes and JSON keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lbllm
from lbllm.chat.votes import VoteStore
from lbllm.config import parse_config
from lbllm.events import RunStarted
from lbllm.models.teacher import load_teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.run import run as run_pipeline
from lbllm.runs.store import RunStore
from lbllm.runs.view import RunView
from lbllm.sections import STAGES
from lbllm.stages.block_store import BlockStore
from tests.frozen.record import BAD_USAGE, call, differences, options, own_place, prepare

VERSIONS = sorted(path for path in Path(__file__).parent.iterdir() if path.name.startswith("v"))
# What differs from an earlier version's record on purpose, with its reason.
INTENDED = {
    "/options/lbllm chat/temperature/default": "one chat temperature on the command line and the pages, 0.2",
    "/options/lbllm evaluate/model/type": "may be given several times",
    "/options/lbllm evaluate/model/multiple": "may be given several times",
}


@pytest.fixture(params=VERSIONS, ids=lambda path: str(path.name))
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a version left behind, as working directory; returns the only run's folder in it."""
    target = tmp_path / "files"
    shutil.copytree(request.param, target)
    monkeypatch.chdir(target)
    (folder,) = (path.parent for path in target.glob("*/precision"))
    return folder


def test_the_run_store_is_read(place: Path) -> None:
    store = RunStore(place.parent)
    (run,) = store.all()
    assert (run.id, run.state, run.folder) == (place.name, "done", place)
    view = RunView(run.id)
    with view.caught_up(store):
        assert view.result is not None
        assert view.failure is None
        assert [block.done is not None for block in view.blocks.values()] == [True] * 7
        assert set(view.perplexities) == {"teacher", *STAGES}
    (vote,) = VoteStore(store.database).all()
    assert (vote.choice, vote.left_settings) == ("left", vote.right_settings)


def test_settings_are_read_and_say_the_same(place: Path) -> None:
    document = json.loads((place / "config.json").read_text())
    # Settings that came later say what this run did before there were any.
    later: dict[str, Any] = {"stream_dtype": "float32"}
    sections: dict[str, Any] = {"aar": {"loss": "relative"}, "wat": {"streams": "student"}}
    sections["e2e"] = {"gram_weight": 0.0, "lr_embeddings": 4e-3}
    sections["quant"] = {"embedding_bits": 16, "kv_group_size": -1, "kv_first": 1}
    grown = {name: more | document[name] for name, more in sections.items()}
    assert json.loads(parse_config(document).model_dump_json()) == later | document | grown


def test_the_checkpoint_is_loaded_and_computes_what_its_run_left(place: Path) -> None:
    model, tokenizer = lbllm.load(place / "checkpoint")
    ids = tokenizer("The river runs past the old mill.", return_tensors="pt")["input_ids"]
    config = parse_config(json.loads((place / "config.json").read_text()))
    made = stage_model(config, place, "e2e", load_teacher("teacher"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.float(), made(ids).logits, rtol=5e-2, atol=5e-2)


def test_block_states_are_taken_over_without_any_training(place: Path) -> None:
    config = parse_config(json.loads((place / "config.json").read_text()))
    states = [BlockStore(place, None).finished(stage, number) for stage in STAGES for number in range(2)]
    assert all(state.tensors for state in states)
    before = (place / "checkpoint" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "checkpoint")
    events = list(run_pipeline(config, place, request=lambda: None))
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert started.resumed_blocks == len(states)
    assert not [event for event in events if event.kind == "step"]
    assert (place / "checkpoint" / "model.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def spoken() -> dict[str, Any]:
    """What the command line offers and answers now."""
    with own_place() as folder:
        prepare(folder)
        return {"options": options(), "exit codes": {name: call(line)[0] for name, line in BAD_USAGE.items()}}


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: str(path.name))
def test_options_and_exit_codes_are_those_of_earlier_versions(version: Path, spoken: dict[str, Any]) -> None:
    recorded = json.loads((version / "record.json").read_text())
    found = list(differences({key: recorded[key] for key in spoken}, json.loads(json.dumps(spoken))))
    assert [line for line in found if line.partition(": ")[0] not in INTENDED and not line.endswith("is new")] == []
