"""A run that goes on from a packed checkpoint: where it begins, what it may change, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks.kill_resume import hashes
from lbllm import load, pipeline
from lbllm.commands.options import arguments, run_config
from lbllm.config import RunConfig, make_config
from lbllm.errors import CheckpointError, ConfigError
from lbllm.events import BlockDone, Evaluated, Event, RunStopped, StepMetric
from lbllm.export import export, find
from lbllm.hf import WEIGHTS
from lbllm.run_record import read_record
from lbllm.runs import RunStore
from lbllm.start import settings_to_go_on
from tests.finished_run import finished_run
from tests.tiny_runs import bfloat_teacher, run_tiny, tiny_teacher, token_ids
from tests.tiny_runs import run_config as tiny_config

E2E: dict[str, Any] = {"tokens": 96, "batch_tokens": 64, "epochs": 3, "lr_weight": 1e-3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of all three stages of the paper gave."""
    folder = tmp_path_factory.mktemp("first")
    run_tiny(tiny_config(), folder, bfloat_teacher())
    return folder / "checkpoint"


def further(checkpoint: Path, **changes: Any) -> RunConfig:
    """Settings of a run that goes on from a checkpoint of a tiny teacher."""
    document = {**settings_to_go_on(str(checkpoint)), "model": "tiny"}
    return tiny_config(**document, e2e=E2E | changes)


def steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepMetric)]


@pytest.mark.parametrize(
    "first",
    [{}, {"quant": {"param_bits": 8}}, {"quant": {"format": "w1"}}, {"stages": ["ptq"]},
     {"quant": {"overrides": {"*.down_proj": {"act_bits": 8}}, "skip": ["*.1.*"]}}],
    ids=str,
)  # fmt: skip
def test_a_run_that_changes_nothing_gives_the_same_checkpoint(first: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_config(**first)
    run_tiny(settings, tmp_path / "first", bfloat_teacher())
    begun = tmp_path / "first" / "checkpoint"
    still = further(begun, lr_weight=0, lr_levels=0, lr_act=0)
    assert still.quant == settings.precision(settings.stages[-1])
    events = run_tiny(still, tmp_path / "second", bfloat_teacher())
    (done,) = [event for event in events if isinstance(event, BlockDone)]
    assert done.loss_after == done.loss_before
    ended = tmp_path / "second" / "checkpoint"
    before, after = load_file(begun / WEIGHTS), load_file(ended / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        logits = [load(folder)[0](token_ids(2, seed=1)).logits for folder in (begun, ended)]
    assert torch.equal(*logits)


def test_it_begins_with_the_checkpoint_and_learns(tmp_path: Path) -> None:
    run_tiny(tiny_config(stages=["ptq"]), tmp_path / "first", bfloat_teacher())
    checkpoint = tmp_path / "first" / "checkpoint"
    events = run_tiny(further(checkpoint, epochs=8), tmp_path / "second", bfloat_teacher())
    (done,) = [event for event in events if isinstance(event, BlockDone)]
    assert not done.diverged
    sequences = token_ids()[-3:]
    with torch.no_grad():
        meant, given_ = (
            model(input_ids=sequences).logits[:, :-1].log_softmax(-1)
            for model in (bfloat_teacher().model, load(checkpoint)[0])
        )
    first = torch.nn.functional.kl_div(given_, meant, log_target=True, reduction="none").sum(-1).mean()
    assert done.loss_before == pytest.approx(float(first), rel=1e-3)
    assert done.loss_after < 0.99 * done.loss_before


def test_it_goes_on_to_the_same_bytes_without_the_first_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    whole = run_tiny(further(checkpoint), tmp_path / "whole", bfloat_teacher())
    lent = Path(shutil.copytree(checkpoint, tmp_path / "lent"))
    settings = further(checkpoint).model_copy(update={"start": str(lent)})
    seen: list[Event] = []

    events = run_tiny(
        settings,
        tmp_path / "run",
        bfloat_teacher(),
        request=lambda: "stop" if len(steps(seen)) == 3 else None,
        seen=seen,
    )
    assert events[-1] == RunStopped(request="stop")
    (lent / WEIGHTS).unlink()  # its blocks were taken over at the start; only its record is still asked for
    rest = run_tiny(settings, tmp_path / "run", bfloat_teacher())
    assert steps(events) + steps(rest) == steps(whole)
    assert hashes(tmp_path / "run" / "checkpoint")[WEIGHTS] == hashes(tmp_path / "whole" / "checkpoint")[WEIGHTS]


def test_what_does_not_fit_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    settings = further(checkpoint)
    with pytest.raises(ConfigError, match=r"was not made from tiny \(.* differs\), but from tiny; choose that"):
        run_tiny(settings, tmp_path / "teacher", tiny_teacher("llama", seed=1))
    other = settings.model_copy(update={"quant": settings.quant.model_copy(update={"group_size": 12, "kv_bits": 8})})
    with pytest.raises(ConfigError, match=r"was made with quant\.group_size=16, quant\.kv_bits=4; a run keeps"):
        run_tiny(other, tmp_path / "format", bfloat_teacher())
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="its hash differs"):
        run_tiny(settings.model_copy(update={"start": str(damaged)}), tmp_path / "bytes", bfloat_teacher())
    with pytest.raises(CheckpointError, match="is no packed checkpoint; give the folder"):
        settings_to_go_on(str(tmp_path))


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"stages": ["e2e"]}, "start: .*stage e2e needs a stage before it, or a packed checkpoint here"),
        ({"start": "shipped"}, "start: .*goes on from a checkpoint with stages e2e alone"),
        ({"start": "shipped", "stages": ["ptq", "e2e"]}, "start: .*with stages e2e alone"),
        ({"start": "", "stages": ["e2e"]}, "start: .*at least 1 character"),
    ],
)
def test_stage_4_alone_and_a_checkpoint_need_each_other(document: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_config("quick", document)


@given(
    tokens=st.integers(1, 10**7),
    rate=st.sampled_from([0.0, 0.001, 0.3]),
    seed=st.integers(0, 9),
    corpus=st.sampled_from(["embedded", "embedded+wikitext2"]),
)
def test_the_settings_survive_their_command(tokens: int, rate: float, seed: int, corpus: str) -> None:
    document = {**settings_to_go_on("shipped"), "corpus": corpus, "seed": seed}
    settings = make_config("quick", document | {"e2e": {"tokens": tokens, "lr_weight": rate}})
    words = arguments(settings)
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert values["--from"] == "shipped"
    assignments = [value for word, value in zip(words[::2], words[1::2], strict=True) if word == "--set"]
    again = run_config(
        model=values["--model"],
        preset=values["--preset"],
        corpus=values.get("--corpus"),
        assignments=assignments,
        start=values["--from"],
    )
    assert again == settings


def test_from_a_run_in_the_store_to_a_card_that_tells_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    store = RunStore()
    first = finished_run(store, tmp_path)
    settings = run_config(start=first.id, corpus=str(tmp_path / "text.jsonl"), assignments=["seq_len=32"])
    settings = settings.model_copy(update={"e2e": settings.e2e.model_copy(update={"tokens": 64})})
    assert (settings.model, settings.quant) == (first.config.model, first.config.quant)
    run = store.create(settings)
    (run.folder / "precision").write_text("no")
    events = list(pipeline.run(settings, run.folder, request=lambda: None))
    assert [event.what for event in events if isinstance(event, Evaluated)] == ["teacher", "start", "e2e"]
    record = read_record(run.folder / "checkpoint")
    assert record.start is not None
    assert record.start.settings == first.config
    assert "start" in json.loads((run.folder / "config.json").read_text())
    out = tmp_path / "given"
    export(find(str(run.folder / "checkpoint"), store), "packed", out)
    card = (out / "README.md").read_text()
    assert f"--from {first.id}" in card
    assert "Run 1 of 2" in card
    assert "Run 2 of 2" in card
    assert "The checkpoint gone on from" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (out / "lbllm_run.json").read_text() + (out / "config.json").read_text()
