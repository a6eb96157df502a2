"""Whole runs on a device in name only: what would mix the CPU and a GPU raises, and the results are those of a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lbllm import kernels, load
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.config import RunConfig
from lbllm.events import BlockDone, Event, RunStarted, RunStopped
from lbllm.measure.perplexity import divergence, perplexity
from lbllm.models.teacher import Teacher
from lbllm.pipeline import run as pipeline
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.start import settings_to_go_on
from lbllm.stages import aar, e2e
from tests.helpers.named_device import DEVICE, accelerator, fuse_optimizers, named_device
from tests.helpers.tiny_models import DENSE_ARCHITECTURES
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

STAGES = ["ptq", "wat", "aar", "e2e"]
FINE = {"param_bits": 4, "act_group_size": 64}
PLANES = {"overrides": {"*.o_proj": {"format": "w1+1+1"}, "*.up_proj": {"format": "w1+1+1", "param_bits": 16}}}
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
# architecture -> precision, settings of the run, changes to the tiny model
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("no", {"ptq": {"sweeps": 1}}, SMALL),
    # biases; three planes in some layers
    "qwen2": ("bf16", {"stages": STAGES, "quant": FINE | PLANES}, SMALL | {"num_hidden_layers": 1}),
    # windows
    "gemma3": (
        "no",
        {"wat": {"bitmap": "relaxed", "loss": "mse"}, "quant": {"param_bits": 8, "kv_bits": 8}},
        SMALL | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # experts
    "qwen3_moe": (
        "no",
        {"stages": ["ptq", "wat", "aar"]},
        SMALL | {"num_hidden_layers": 1, "moe_intermediate_size": 16},
    ),
}
OTHERS = [name for name in DENSE_ARCHITECTURES if name not in RUNS]


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    """The CPU computes as the device does: in PyTorch. The fewer operators, the faster: the device is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ready", lambda: False)
        patch.setattr(e2e, "attend_by_products", lambda model: None)
        patch.setattr(aar, "KNEES", (0.25,))
        fuse_optimizers(patch)
        yield


@dataclass
class Finished:
    """The folder of a run on the device and of the same run on the CPU."""

    config: RunConfig
    teacher: Teacher
    there: Path
    here: Path
    exact: bool
    events: tuple[list[Event], list[Event]]


def run_on(device: torch.device, config: RunConfig, folder: Path, teacher: Teacher, **options: Any) -> list[Event]:
    """The events of a run on the device or the CPU."""
    precision = options.get("precision", "no")
    with pytest.MonkeyPatch.context() as patch, named_device():
        teacher.model.to(device)  # type: ignore[arg-type]
        teacher.model.tie_weights()  # a GPU's parameters stay the same objects, those of the device are new ones
        patch.setattr(pipeline, "make_accelerator", lambda *_: accelerator(precision, device))
        return run_tiny(config, folder, teacher, **options)


def small_config(**changes: Any) -> RunConfig:
    ptq = {"tokens": 64, "em_steps": 1, "sweeps": 0}
    e2e = {"tokens": 96, "epochs": 1, "batch_tokens": 64, "lr_weight": 1e-3, "feature_weight": 0.5}
    return run_config(**({"e2e": e2e} | changes | {"ptq": ptq | changes.get("ptq", {})}))


def blocks_done(events: list[Event]) -> list[BlockDone]:
    return [event for event in events if isinstance(event, BlockDone)]


@pytest.fixture(scope="module", params=[*RUNS, *(pytest.param(name, marks=pytest.mark.soak) for name in OTHERS)])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run on the device is stopped in the middle of stage 2 and goes on."""
    precision, settings, changes = RUNS.get(request.param, ("bf16", {"stages": STAGES, "quant": FINE}, {}))
    config, folder = small_config(**settings), tmp_path_factory.mktemp(request.param)
    here, there = (tiny_teacher(request.param, attn_implementation="eager", **changes) for _ in range(2))
    beside = run_on(torch.device("cpu"), config, folder / "here", here, precision=precision)
    seen: list[Event] = []
    blocks = there.model.config.num_hidden_layers

    def asked() -> Any:
        return "stop" if len(blocks_done(seen)) == blocks + blocks // 2 else None

    stopped = run_on(DEVICE, config, folder / "there", there, precision=precision, request=asked, seen=seen)
    assert isinstance(stopped[-1], RunStopped)
    more = run_on(DEVICE, config, folder / "there", there, precision=precision)
    return Finished(
        config,
        there,
        folder / "there",
        folder / "here",
        precision == "no" and "e2e" not in config.stages,
        (stopped + more, beside),
    )


def test_all_stages_give_what_they_give_on_a_cpu(finished: Finished) -> None:
    there, here = finished.events
    started = next(event for event in there if isinstance(event, RunStarted))
    assert torch.device(started.device) == DEVICE
    assert {event.stage for event in blocks_done(there)} == set(finished.config.stages)
    for one, other in zip(blocks_done(there), blocks_done(here), strict=True):
        assert (one.stage, one.block, one.diverged) == (other.stage, other.block, other.diverged)
        # bfloat16's products, and the norm of the whole model's gradients, are sums in another order.
        apart = 0.05 if one.stage == "e2e" else 0 if finished.exact else 0.01
        assert one.loss_before == pytest.approx(other.loss_before, rel=apart)
        assert one.loss_after == pytest.approx(other.loss_after, rel=apart)
    stored, wanted = (load_file(folder / "checkpoint" / WEIGHTS) for folder in (finished.there, finished.here))
    assert stored.keys() == wanted.keys()
    assert not finished.exact or all(torch.equal(stored[name], wanted[name]) for name in stored)


def test_the_packed_model_and_its_perplexity(finished: Finished) -> None:
    loaded, ids = load(finished.there / "checkpoint")[0], token_ids(2, seed=1)
    with named_device():
        model = stage_model(finished.config, finished.there, finished.config.stages[-1], finished.teacher)
        assert all(tensor.device == DEVICE for tensor in (*model.parameters(), *model.buffers()))
        value = perplexity(model, ids).perplexity
        apart = divergence(finished.teacher.model, model, ids)
    # In another order of sums, a value may be rounded to the next of 16 levels.
    assert value == pytest.approx(perplexity(loaded, ids).perplexity, rel=0.02)
    assert apart.student_perplexity == pytest.approx(value, rel=1e-3)
    assert apart.kl > 0


def test_a_run_from_a_checkpoint(finished: Finished, tmp_path: Path) -> None:
    start = {**settings_to_go_on(str(finished.there / "checkpoint")), "model": "tiny"}
    (done,) = blocks_done(run_on(DEVICE, small_config(**start), tmp_path, finished.teacher))
    assert math.isfinite(done.loss_after)
