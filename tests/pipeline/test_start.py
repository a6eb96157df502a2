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
from torch import Tensor

from benchmarks.kill_resume import hashes
from lbllm import load
from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.record import read_record
from lbllm.checkpoints.seal import format_sha256
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.commands.options import run_config
from lbllm.config import RunConfig, arguments, make_config
from lbllm.errors import CheckpointError, ConfigError
from lbllm.events import BlockDone, Evaluated, Event, RunStopped, StepMetric
from lbllm.models.streamed import BlockModel
from lbllm.pipeline import run as pipeline
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.start import open_start, settings_to_go_on, start_blocks
from lbllm.quant.levels import from_groups, params_to_levels, take_levels, to_groups
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.store import RunStore
from lbllm.sections import ACT_GROUP_SIZE, Stage
from lbllm.share.export import export
from lbllm.stages.block_store import BlockStore
from tests.helpers.cases import cases
from tests.helpers.finished_run import finished_run
from tests.helpers.tiny_runs import bfloat_teacher, run_tiny, tiny_teacher, token_ids
from tests.helpers.tiny_runs import run_config as tiny_config

E2E: dict[str, Any] = {"tokens": 96, "batch_tokens": 64, "epochs": 3, "lr_weight": 1e-3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of all three stages of the paper gave."""
    folder = tmp_path_factory.mktemp("first")
    run_tiny(tiny_config(), folder, bfloat_teacher())
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def weights_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of stages 1 and 2: its settings and its folder."""
    settings, folder = tiny_config(stages=["ptq", "wat"]), tmp_path_factory.mktemp("weights")
    run_tiny(settings, folder, bfloat_teacher())
    return settings, folder


def further(checkpoint: Path, **changes: Any) -> RunConfig:
    """Settings of a run that goes on from a checkpoint of a tiny teacher."""
    document = {**settings_to_go_on(str(checkpoint)), "model": "tiny"}
    return tiny_config(**document, e2e=E2E | changes)


def taken_blocks(settings: RunConfig) -> list[dict[str, Tensor]]:
    """The states that a run begins with."""
    teacher = BlockModel.of(bfloat_teacher().model)
    return list(start_blocks(settings, open_start(settings, teacher), teacher.path))


def steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepMetric)]


@pytest.mark.parametrize(
    "first",
    [
        {},
        {"quant": {"param_bits": 4}},
        {"quant": {"overrides": {"*.down_proj": {"act_bits": 8}}, "skip": ["*.1.*"]}},
        *(
            pytest.param(settings, marks=pytest.mark.soak)
            for settings in ({"quant": {"param_bits": 8}}, {"quant": {"format": "w1"}}, {"stages": ["ptq"]})
        ),
    ],
    ids=str,
)
def test_a_run_that_changes_nothing_gives_the_same_checkpoint(first: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_config(**first)
    run_tiny(settings, tmp_path / "first", bfloat_teacher())
    begun = tmp_path / "first" / "checkpoint"
    still = further(begun, lr_weight=0, lr_levels=0, lr_act=0)
    kept = still.quant.weights_only() if still.quant.weights_alone else still.quant
    assert kept == settings.precision(settings.stages[-1])
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
    lent = Path(shutil.copytree(checkpoint, tmp_path / "lent"))
    settings = further(checkpoint).model_copy(update={"start": str(lent)})
    whole = run_tiny(settings, tmp_path / "whole", bfloat_teacher())
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


def weights_first(folder: Path, rate: float) -> RunConfig:
    """Settings of a run that brings down the activations of what a run of weights alone gave in ``folder``."""
    first = tiny_config(stages=["ptq", "wat", "e2e"], e2e=E2E | {"lr_weight": rate})
    run_tiny(first, folder, bfloat_teacher())
    document = settings_to_go_on(str(folder / "checkpoint")) | {"model": "tiny", "stages": ["aar", "e2e"]}
    assert (document["quant"]["act_bits"], document["quant"]["kv_bits"]) == (16, 16)
    document["quant"] |= {"act_bits": 4, "kv_bits": 4}
    return tiny_config(**document, e2e=E2E)


def test_activations_are_brought_down_after_the_weights_were_trained_alone(tmp_path: Path) -> None:
    settings = weights_first(tmp_path / "first", 1e-3)
    events = run_tiny(settings, tmp_path / "second", bfloat_teacher())
    assert [event.stage for event in events if isinstance(event, BlockDone)] == ["aar", "aar", "e2e"]
    first, second = (load(tmp_path / name / "checkpoint")[0] for name in ("first", "second"))
    stated = [model.config.quantization_config.format for model in (first, second)]
    assert [(quant.act_bits, quant.kv_bits) for quant in stated] == [(16, 16), (4, 4)]
    # It begins with the first checkpoint's weights; the activations then have their bits.
    begun = stage_model(settings, tmp_path / "second", "start", bfloat_teacher())
    with torch.no_grad():
        expected = stage_model(tiny_config(stages=["ptq", "wat", "e2e"]), tmp_path / "first", "e2e", bfloat_teacher())
        assert torch.equal(begun(token_ids(2, seed=1)).logits, expected(token_ids(2, seed=1)).logits)
    assert all(layer.quantizer is not None for layer in second.modules() if isinstance(layer, PackedLinear))


@pytest.mark.parametrize(
    ("groups", "same"),
    [
        ({"group_size": 8}, True),
        ({"group_size": 16, "overrides": {"*.down_proj": {"group_size": 4}}}, True),
        pytest.param({"group_size": 1}, True, marks=pytest.mark.soak),
        pytest.param({"param_bits": 8}, False, marks=pytest.mark.soak),
        ({"group_size": 8, "param_bits": 8}, False),
        ({"group_size": 4, "param_bits": 4}, False),
    ],
    ids=str,
)
def test_groups_may_be_cut_and_their_parameters_get_other_bits(
    groups: dict[str, Any], same: bool, weights_alone: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    first, folder = weights_alone
    document = settings_to_go_on(str(folder / "checkpoint")) | {"model": "tiny"}
    document["quant"] |= groups
    settings = tiny_config(**document, e2e=E2E)
    run_tiny(settings, tmp_path / "second", bfloat_teacher())
    assert load(tmp_path / "second" / "checkpoint")[0].config.quantization_config.format == settings.quant
    before = stage_model(first, folder, "wat", bfloat_teacher())
    begun = stage_model(settings, tmp_path / "second", "start", bfloat_teacher())
    with torch.no_grad():
        meant, found = (model(token_ids(2, seed=1)).logits for model in (before, begun))
    # Parts of a group have its levels; parameters in 8 bits are nearly the same, in 4 bits less so.
    away = float((found - meant).norm() / meant.norm())
    assert away == 0 if same else 0 < away < (0.5 if settings.quant.param_bits == 4 else 0.05)


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_latent_weights_are_taken_over_from_the_run_that_trained_them(rate: float, tmp_path: Path) -> None:
    settings = weights_first(tmp_path / "first", rate)
    taken = taken_blocks(settings)
    store = BlockStore(tmp_path / "first", None)
    for number, tensors in enumerate(taken):
        # Stage 4 ends with latent weights where they trained; else stage 1's are the last ones.
        stage: Stage = "e2e" if rate else "ptq"
        left = {name: t for name, t in store.finished(stage, number).tensors.items() if name.endswith(".latent")}
        assert len(left) > 0
        assert left.keys() == {name for name in tensors if name.endswith(".latent")}
        for name, latent in left.items():
            layer = name.removesuffix(".latent")
            assert torch.equal(tensors[name], latent)
            if not rate:
                continue
            # The latent weights say the same as the bits: each lies nearest to its weight's level.
            levels = params_to_levels(tensors[f"{layer}.params"])
            groups = to_groups(latent.float(), 16)
            chosen = take_levels(levels, to_groups(tensors[f"{layer}.index"], 16))
            best = (groups[..., None] - levels[..., None, :]).abs().amin(-1)
            farther = from_groups((groups - chosen).abs() - best, latent.shape[1])
            assert farther.max() < 1e-3  # float16's steps
    # A copy of the checkpoint alone has none, and goes on from the teacher's.
    copy = Path(shutil.copytree(tmp_path / "first" / "checkpoint", tmp_path / "copy"))
    for tensors in taken_blocks(settings.model_copy(update={"start": str(copy)})):
        assert not any(name.endswith(".latent") for name in tensors)


def test_what_does_not_fit_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    settings = further(checkpoint)
    with pytest.raises(ConfigError, match=r"was not made from tiny \(.* differs\), but from tiny; choose that"):
        run_tiny(settings, tmp_path / "teacher", tiny_teacher("llama", seed=1))
    other = settings.model_copy(update={"quant": settings.quant.model_copy(update={"group_size": 8, "kv_bits": 8})})
    with pytest.raises(
        ConfigError, match=r"made with quant\.kv_bits \(KV cache bits\) 4; .* can change only .*group_size"
    ):
        run_tiny(other, tmp_path / "format", bfloat_teacher())
    for size, length in ((12, 12), (-1, 48)):
        across = settings.model_copy(update={"quant": settings.quant.model_copy(update={"group_size": size})})
        complaint = rf"q_proj has groups of 16, which can't be cut into groups of {length}; .* for example 8"
        with pytest.raises(ConfigError, match=complaint):
            run_tiny(across, tmp_path / f"groups{size}", bfloat_teacher())
    lowered = settings.model_copy(update={"stages": ("aar", "e2e")})
    with pytest.raises(ConfigError, match=r"made with .*\(Activation bits\) 4, .* 4; stage aar needs .* 16-bit"):
        run_tiny(lowered, tmp_path / "activations", bfloat_teacher())
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="its hash differs"):
        run_tiny(settings.model_copy(update={"start": str(damaged)}), tmp_path / "bytes", bfloat_teacher())
    with pytest.raises(CheckpointError, match="is not a packed checkpoint; give 'shipped'"):
        settings_to_go_on(str(tmp_path))


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"stages": ["e2e"]}, "start .*stage e2e needs a stage before it, or a packed checkpoint here"),
        ({"start": "shipped"}, "start .*run from a checkpoint has only stage e2e, or aar and e2e"),
        ({"start": "shipped", "stages": ["ptq", "e2e"]}, "start .*has only stage e2e, or aar and e2e"),
        (
            {"start": "shipped", "stages": ["aar", "e2e"], "quant": {"act_bits": 16, "kv_bits": 16}},
            r"quant \(Format\): stage aar has no bits to lower: set quant\.act_bits .* or quant\.kv_bits .* below 16",
        ),
        ({"stages": ["aar", "e2e"]}, "start .*stage aar needs a stage before it, or a packed checkpoint here"),
        ({"start": "", "stages": ["e2e"]}, "start .*at least 1 character"),
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
    group_size=st.sampled_from([-1, 32, 48, 64]),
    param_bits=st.sampled_from([4, 8, 16]),
    overrides=st.sampled_from([{}, {"*.down_proj": {"group_size": 32}}]),
)
@cases(100)
def test_the_settings_survive_their_command(
    tokens: int, rate: float, seed: int, corpus: str, group_size: int, param_bits: int, overrides: dict[str, Any]
) -> None:
    document = {**settings_to_go_on("shipped"), "corpus": corpus, "seed": seed}
    document["quant"] |= {"group_size": group_size, "param_bits": param_bits, "overrides": overrides}
    settings = make_config("quick", document | {"e2e": {"tokens": tokens, "lr_weight": rate}})
    words = arguments(settings)
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert values["--from"] == "shipped"
    assignments = [value for word, value in zip(words[::2], words[1::2], strict=True) if word == "--set"]
    again = run_config(
        model=values["--model"],
        preset=values["--preset"],
        corpus=values.get("--corpus"),
        group_size=int(values["--group-size"]),
        assignments=assignments,
        start=values["--from"],
    )
    assert again == settings


def test_fewer_bits_of_activations_bring_stage_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    first = finished_run(RunStore(), tmp_path, ("ptq", "wat"))
    plain = run_config(start=first.id)
    assert (plain.stages, plain.quant.act_bits, plain.quant.kv_bits) == (("e2e",), 16, 16)
    same = run_config(start=first.id, act_bits=16, kv_bits=16)
    assert same == plain
    assert plain.quant.weights_alone
    for act_bits, kv_bits in ((4, 4), (8, 16), (16, 4)):
        settings = run_config(start=first.id, act_bits=act_bits, kv_bits=kv_bits)
        assert settings.quant.act_group_size == ACT_GROUP_SIZE  # the checkpoint has none that are quantized
        assert settings.stages == ("aar", "e2e")
        assert (settings.quant.act_bits, settings.quant.kv_bits) == (act_bits, kv_bits)
        by_set = [f"quant.act_bits={act_bits}", f"quant.kv_bits={kv_bits}"]
        assert run_config(start=first.id, assignments=by_set) == settings
        words = arguments(settings)
        values = dict(zip(words[::2], words[1::2], strict=True))
        assert (values["--act-bits"], values["--kv-bits"]) == (str(act_bits), str(kv_bits))
        given_ = [value for word, value in zip(words[::2], words[1::2], strict=True) if word == "--set"]
        again = run_config(values["--model"], values["--preset"], act_bits=act_bits, kv_bits=kv_bits,
                           corpus=values.get("--corpus"), device=values.get("--device"), assignments=given_,
                           start=values["--from"])  # fmt: skip
        assert again == settings
    row = run_config(start=first.id, act_bits=4, assignments=["quant.act_group_size=-1"])
    assert "quant.act_group_size=-1" in arguments(row)


def test_a_checkpoint_from_before_there_were_ranges_goes_on_with_one_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    first = tiny_config()
    run_tiny(first, tmp_path / "first", bfloat_teacher())
    folder = tmp_path / "first" / "checkpoint"
    document = json.loads((folder / "config.json").read_text())
    stated = document["quantization_config"]
    assert [stated["quant"].pop(name) for name in ("act_group_size", "kv_group_size", "kv_first")] == [-1, -1, 1]
    stated["format_sha256"] = format_sha256(stated["quant"])
    del stated["seal"]  # which came later
    (folder / "config.json").write_text(json.dumps(document))
    for preset in ("quick", "preview"):  # whichever ranges the preset has
        settings = run_config(start=str(folder), preset=preset)
        assert settings.quant == first.quant
    events = run_tiny(further(folder, tokens=64), tmp_path / "second", bfloat_teacher())
    assert [event.stage for event in events if isinstance(event, BlockDone)] == ["e2e"]


@pytest.mark.parametrize(
    "change",
    [
        {"quant": {"format": "w1+1", "colour": "red"}},
        {"quant": []},
        {"quant": None},
        {"provenance": "x"},
        {"provenance": [1]},
        {"provenance": {"model": 5}},
        {"quant": {"group_size": 10**30}},
    ],
)
def test_a_format_that_cannot_be_read_is_one_message(checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    document = json.loads((checkpoint / "config.json").read_text())
    document["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"config\.json: its quantization_config can't be read .*copy") as raised:
        settings_to_go_on(str(folder))
    assert len(str(raised.value).splitlines()) == 1


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
    export(find_checkpoint(str(run.folder / "checkpoint"), store), "packed", out)
    card = (out / "README.md").read_text()
    assert f"--from {first.id}" in card
    assert "Run 1 of 2" in card
    assert "Run 2 of 2" in card
    assert "Starting checkpoint" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (out / "lbllm_run.json").read_text() + (out / "config.json").read_text()
