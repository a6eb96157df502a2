"""Every architecture through all three stages into a packed checkpoint and back: the same outputs, the same words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lbllm
from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.config import RunConfig
from lbllm.events import BlockDone, Event, RunDone, RunStarted
from lbllm.measure.estimate import estimate
from lbllm.models.blocks import decoder_blocks
from lbllm.models.teacher import Teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.quant.kv_cache import KVFormat, PackedKVLayer
from lbllm.quant.packed_layer import PackedLinear
from tests.helpers.tiny_models import ARCHITECTURES, DENSE_ARCHITECTURES, save_tiny, tiny
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids


@dataclass
class Deployed:
    """A finished run and what it was made from."""

    config: RunConfig
    folder: Path
    teacher: Teacher
    events: list[Event]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What lies in the checkpoint's weights file."""
        with safe_open(self.checkpoint / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        return lbllm.load(self.checkpoint, dtype=dtype)[0]


def deploy(folder: Path, architecture: str, *, precision: str = "no", **changes: Any) -> Deployed:
    config = run_config(model=str(save_tiny(folder / "teacher", architecture)), **changes)
    teacher = tiny_teacher(architecture)
    return Deployed(config, folder / "run", teacher, run_tiny(config, folder / "run", teacher, precision=precision))


def logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def assert_computes_what_the_run_did(deployed: Deployed) -> None:
    ids = token_ids(2, seed=1)
    trained = stage_model(deployed.config, deployed.folder, deployed.config.stages[-1], deployed.teacher)
    loaded = logits(deployed.load(), ids)
    assert loaded.isfinite().all()
    assert torch.equal(loaded, logits(trained, ids))


def assert_has_the_size_that_was_said(deployed: Deployed) -> None:
    done, said = deployed.events[-1], estimate(deployed.config)
    assert isinstance(done, RunDone)
    assert done.disk_bytes == (deployed.checkpoint / "model.safetensors").stat().st_size
    assert said.disk_bytes == pytest.approx(done.disk_bytes, rel=0.01)
    stored = sum(
        tensor.nbytes
        for name, tensor in deployed.tensors.items()
        if tensor.dtype == torch.uint8 or name.endswith((".params", ".params_scale"))
    )
    started = next(event for event in deployed.events if isinstance(event, RunStarted))
    assert started.weights == said.weights
    assert done.bpw == started.bpw == pytest.approx(said.bpw) == pytest.approx(8 * stored / said.weights)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy(tmp_path_factory.mktemp(request.param), request.param)


def test_all_stages_end_in_a_checkpoint_that_computes_the_same(deployed: Deployed) -> None:
    done = [event for event in deployed.events if isinstance(event, BlockDone)]
    blocks = range(deployed.teacher.model.config.num_hidden_layers)
    assert [(event.stage, event.block) for event in done] == [(s, b) for s in ("ptq", "wat", "aar") for b in blocks]
    # The error relative to the block's output; two steps of training aren't much, but it is always far below 1.
    assert all(0 < event.loss_after < 0.4 for event in done)
    assert_computes_what_the_run_did(deployed)
    ids = token_ids(2, seed=1)
    assert not torch.equal(logits(deployed.load(), ids), logits(deployed.teacher.model, ids))


def test_the_linear_layers_of_the_blocks_are_packed_and_nothing_else(deployed: Deployed) -> None:
    model, teacher = deployed.load(), deployed.teacher.model
    path, _ = decoder_blocks(teacher)
    packed: dict[str, PackedLinear] = {}
    for name, module in teacher.named_modules():
        if name.startswith(f"{path}.") and isinstance(module, nn.Linear | Conv1D):
            layer = model.get_submodule(name)
            assert isinstance(layer, PackedLinear)
            assert layer.quantizer is not None
            packed[name] = layer
    started = next(event for event in deployed.events if isinstance(event, RunStarted))
    assert started.layers == len(packed) == sum(isinstance(module, PackedLinear) for module in model.modules())
    assert started.weights == sum(layer.in_features * layer.out_features for layer in packed.values())
    parameters = dict(model.named_parameters())
    for name, parameter in teacher.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner not in packed or kind == "bias":
            assert torch.equal(parameters[name], parameter.bfloat16().float()), name


def test_every_tensor_is_stored_once_in_the_size_that_was_said(deployed: Deployed) -> None:
    assert_has_the_size_that_was_said(deployed)
    tensors, model = deployed.tensors, deployed.load()
    # Tied weights are several names of one tensor; the file has one of them.
    assert len(tensors) == len({tensor.data_ptr() for tensor in model.state_dict().values()})
    data = sum(tensor.nbytes for tensor in tensors.values())
    header = int.from_bytes((deployed.checkpoint / "model.safetensors").read_bytes()[:8], "little")
    assert (deployed.checkpoint / "model.safetensors").stat().st_size == 8 + header + data


def test_reading_at_once_and_word_by_word_agree(deployed: Deployed) -> None:
    # In float64, since a difference in the last bit of a float32 can tip a value to the next of 16 levels.
    model, ids = deployed.load(torch.float64), token_ids(1, seed=2)
    whole = logits(model, ids)
    given = DynamicCache(config=model.config)
    assert torch.equal(logits(model, ids, past_key_values=given), whole)
    assert torch.equal(logits(model, ids, use_cache=False), whole)
    grown = DynamicCache()
    with torch.no_grad():
        steps = [model(part, past_key_values=grown).logits for part in (ids[:, :20], *ids[:, 20:].split(1, 1))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)
    for cache in (given, grown):
        assert len(cache.layers) == model.config.num_hidden_layers
        assert all(isinstance(layer, PackedKVLayer) and layer.bits == 4 for layer in cache.layers)
        assert cache.get_seq_length() == ids.shape[1]

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    told = model.generate(ids[:, :20], output_logits=True, **options)
    assert isinstance(told.past_key_values.layers[0], PackedKVLayer)
    again = logits(model, told.sequences)[:, 19:-1]
    torch.testing.assert_close(torch.stack(told.logits, 1), again.float(), rtol=0, atol=1e-5)
    assert (
        told.sequences[0, 20:].tolist()
        == model.generate(ids[:, :20], use_cache=False, **options).sequences[0, 20:].tolist()
    )


def test_the_model_without_its_head_keeps_its_cache_in_four_bits_too(deployed: Deployed) -> None:
    model, ids = deployed.load(), token_ids(1, seed=2)
    decoder = model.get_submodule(decoder_blocks(deployed.teacher.model)[0].rpartition(".")[0])
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True).hidden_states[-1]
        for inner in (model.base_model, decoder):
            output = inner(ids)
            assert torch.equal(output.last_hidden_state, whole)
            assert all(isinstance(layer, PackedKVLayer) for layer in output.past_key_values.layers)
            assert inner(ids, use_cache=False).past_key_values is None
            cache = DynamicCache()
            first = inner(ids[:, :20], past_key_values=cache).last_hidden_state
            second = inner(ids[:, 20:], past_key_values=cache).last_hidden_state
            torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=0.1)
            assert all(isinstance(layer, PackedKVLayer) for layer in cache.layers)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_the_cache_alone_changes_little_and_eight_bits_less_than_four(architecture: str) -> None:
    ids = token_ids(2, seed=3)
    whole = logits(tiny(architecture)[0], ids)
    errors = {}
    for bits in (4, 8, 16):
        model, _ = tiny(architecture)
        attach_kv_cache(model, KVFormat(bits))
        errors[bits] = float((logits(model, ids) - whole).square().mean().sqrt() / whole.std())
    assert errors[16] == 0
    # 17 times finer steps; sliding windows and their masks are the same as without the cache.
    assert 0 < errors[8] < 0.02
    assert 5 * errors[8] < errors[4] < 0.4


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama_bias", {"quant": {"format": "w1", "group_size": -1}}),
        ("phi3", {"quant": {"param_bits": 8, "act_bits": 8, "kv_bits": 8}}),
        ("gpt2", {"quant": {"group_size": 7, "act_bits": 16, "kv_bits": 16}}),
        ("gemma3", {"quant": {"group_size": 48, "format": "w1", "param_bits": 8, "tail_steps": 0}}),
        ("opt", {"stages": ["ptq"]}),
        ("qwen3", {"stages": ["ptq", "wat"], "wat": {"bitmap": "relaxed", "loss": "mse"}}),
        (
            "qwen2",
            {
                "quant": {
                    "group_size": 48,
                    "skip": ["*.1.mlp.down_proj", "*.k_proj"],
                    "overrides": {
                        "*.v_proj": {"format": "w1", "group_size": 5, "act_bits": 8},
                        "*.0.mlp.*": {"param_bits": 8, "act_bits": 16},
                    },
                }
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_comes_back_as_it_was_trained(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    deployed = deploy(tmp_path, architecture, **changes)
    assert all(math.isfinite(event.loss_after) for event in deployed.events if isinstance(event, BlockDone))
    assert_computes_what_the_run_did(deployed)
    assert_has_the_size_that_was_said(deployed)
    model, path = deployed.load(), decoder_blocks(deployed.teacher.model)[0]
    quant = deployed.config.quant if "aar" in deployed.config.stages else deployed.config.quant.weights_only()
    for name, module in deployed.teacher.model.named_modules():
        if name.startswith(f"{path}.") and isinstance(module, nn.Linear | Conv1D):
            assert getattr(model.get_submodule(name), "fmt", None) == quant.layer(name), name
    assert model.generate(token_ids(1), max_new_tokens=3).shape[1] > 32


def test_training_in_bfloat16_gives_a_checkpoint_too(tmp_path: Path) -> None:
    deployed = deploy(tmp_path, "llama_bias", precision="bf16")
    assert all(0 < event.loss_after < 0.4 for event in deployed.events if isinstance(event, BlockDone))
    assert_computes_what_the_run_did(deployed)
