"""W(1+1+1), mixed with W(1+1) by layer, through all stages: the same outputs, sizes, bytes after a stop, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_resume import hashes
from lbllm import load
from lbllm.config import RunConfig
from lbllm.errors import CheckpointError, ConfigError
from lbllm.events import BlockDone, Event, RunDone, StepMetric
from lbllm.measure.estimate import estimate
from lbllm.models.teacher import Teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.start import settings_to_go_on
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.plan import block_formats
from lbllm.sections import STAGES, LayerOverride, QuantConfig
from lbllm.stages.block_state import restore
from lbllm.stages.distill import binary_layers
from lbllm.stages.wat import thaw_layers
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

QUANT: dict[str, Any] = {
    "format": "w1+1+1",
    "group_size": -1,
    "overrides": {
        "*.down_proj": {"format": "w1+1", "group_size": 16},
        "*.up_proj": {"group_size": 16, "param_bits": 4},
        "*.o_proj": {"group_size": 16, "param_bits": 8},
    },
}
E2E: dict[str, Any] = {"tokens": 64, "batch_tokens": 32, "seq_len": 32, "epochs": 1}
WEIGHTS = "model.safetensors"


def settings(**changes: Any) -> RunConfig:
    return run_config(**{"stages": STAGES, "quant": QUANT, "e2e": E2E | {"lr_weight": 1e-3}} | changes)


def rounded_teacher() -> Teacher:
    """A tiny teacher whose parameters are bfloat16 values: what stays dense is the same in its packed student."""
    teacher = tiny_teacher("llama")
    for parameter in teacher.model.parameters():
        parameter.data = parameter.bfloat16().float()
    return teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    folder = tmp_path_factory.mktemp("planes")
    return folder, run_tiny(settings(), folder, rounded_teacher())


@pytest.fixture
def teacher() -> Teacher:
    return rounded_teacher()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(token_ids(2, seed=1)).logits
    return found


def test_the_checkpoint_computes_what_the_run_did_and_every_stage_learns(
    made: tuple[Path, list[Event]], teacher: Teacher
) -> None:
    folder, events = made
    trained = stage_model(settings(), folder, "e2e", teacher)
    model, _ = load(folder / "checkpoint")
    assert torch.equal(logits(model), logits(trained))
    done = [event for event in events if isinstance(event, BlockDone)]
    assert {event.stage for event in done} == set(STAGES)
    assert all(0 < event.loss_after < 0.4 for event in done if event.stage != "e2e")
    formats = {name: m.fmt.format for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert all(kind == ("w1+1" if name.endswith("down_proj") else "w1+1+1") for name, kind in formats.items())


def test_the_sizes_are_those_of_the_estimate(made: tuple[Path, list[Event]], tmp_path: Path) -> None:
    said = estimate(settings(model=str(save_tiny(tmp_path / "teacher", "llama"))))
    done = made[1][-1]
    assert isinstance(done, RunDone)
    assert said.bpw == pytest.approx(done.bpw)
    assert said.disk_bytes == pytest.approx(done.disk_bytes, rel=0.01)
    stored = load_file(made[0] / "checkpoint" / WEIGHTS)
    names = (".params", ".params_scale", ".params_range", ".table")
    bits = 8 * sum(t.nbytes for name, t in stored.items() if t.dtype == torch.uint8 or name.endswith(names))
    assert bits / said.weights == pytest.approx(said.bpw)


def test_a_word_at_a_time_gives_what_the_whole_text_does(tmp_path: Path) -> None:
    """Through the operator that decodes one token, where there is a compiler."""
    some = {"*.down_proj": LayerOverride(format="w1+1", group_size=16)}
    quant = QuantConfig(format="w1+1+1", group_size=20, act_bits=16, kv_bits=16, overrides=some)
    model, _ = load(tiny_checkpoint(tmp_path, "llama", quant)[0])
    ids, cache, found = token_ids(1)[:, :10], None, []
    with torch.no_grad():
        for place in range(10):
            out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, 0])
        torch.testing.assert_close(torch.stack(found), model(ids).logits[0], rtol=0, atol=5e-3)  # keys in float16


@pytest.mark.parametrize("kept", [["ptq-0000"], ["ptq-0000", "ptq-0001", "wat-0000", "wat-0001", "aar-0000"]])
def test_a_run_goes_on_to_the_same_bytes(
    made: tuple[Path, list[Event]], kept: list[str], teacher: Teacher, tmp_path: Path
) -> None:
    (tmp_path / "blocks").mkdir()
    for name in kept:
        shutil.copy(made[0] / "blocks" / f"{name}.safetensors", tmp_path / "blocks")
    run_tiny(settings(), tmp_path, teacher)
    assert hashes(tmp_path / "checkpoint") == hashes(made[0] / "checkpoint")


def test_a_run_from_the_checkpoint_that_changes_nothing_keeps_it(
    made: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    document = {**settings_to_go_on(str(made[0] / "checkpoint")), "model": "tiny"}
    still = run_config(**document, e2e=E2E | {"lr_weight": 0, "lr_levels": 0, "lr_act": 0})
    events = run_tiny(still, tmp_path / "run", teacher)
    assert any(isinstance(event, StepMetric) for event in events)
    before, after = (load_file(folder / "checkpoint" / WEIGHTS) for folder in (made[0], tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = {**document, "quant": document["quant"] | {"format": "w1+1"}}
    with pytest.raises(ConfigError, match=r"quant\.format.*w1\+1\+1"):
        run_tiny(run_config(**other, e2e=E2E), tmp_path / "other", teacher)


@pytest.mark.parametrize("bad", ["order", "nan", "scale"])
def test_a_table_or_scale_that_is_none_is_refused_when_it_is_loaded(
    made: tuple[Path, list[Event]], bad: str, tmp_path: Path
) -> None:
    model, tokenizer = load(made[0] / "checkpoint")
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(layer, PackedLinear)
    assert layer.table is not None
    if bad == "scale":
        layer.params[0, 0, 0] = torch.inf
    else:
        layer.table[3] = torch.nan if bad == "nan" else 5
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    named = r"layers\.1\.self_attn\.q_proj\.(params|table) has values that are not finite"
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path)


@pytest.mark.parametrize("change", ["missing", "order", "shape"])
def test_a_damaged_table_in_the_state_of_a_block_is_named(
    made: tuple[Path, list[Event]], change: str, teacher: Teacher
) -> None:
    formats = block_formats(teacher.model, settings().quant)[2][0]
    tensors = load_file(made[0] / "blocks" / "ptq-0000.safetensors")
    table = tensors.pop("mlp.gate_proj.table")
    if change != "missing":
        tensors["mlp.gate_proj.table"] = table.flip(0) if change == "order" else table[:4]
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj: table .*delete the file and resume"):
        restore(teacher.model.model.layers[0], formats, tensors, 3)


def test_a_relaxed_bitmap_is_that_of_two_planes_alone(made: tuple[Path, list[Event]], teacher: Teacher) -> None:
    formats = block_formats(teacher.model, settings().quant)[2][0]
    tensors = load_file(made[0] / "blocks" / "ptq-0000.safetensors")
    layers = binary_layers(restore(teacher.model.model.layers[0], formats, tensors, 3))
    latents = {name: tensors[f"{name}.latent"] for name in layers}
    groups = thaw_layers(layers, latents, settings(wat={"bitmap": "relaxed"}).wat)
    assert {name for name, layer in layers.items() if layer.bitmap is not None} == {"mlp.down_proj"}
    trained = [parameter for layer in layers.values() for parameter in layer.trained()]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}
