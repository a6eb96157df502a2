"""Nothing inside a training step waits for the host: every copy counted, over 100 steps in `make soak`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.models.blocks import capture_calls, decoder_blocks, first_inputs, linear_layers, share_copy, shared_inputs
from lbllm.quant.kv_cache import KVFormat, TrainingCache
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import AarConfig, E2eConfig, LayerFormat, WatConfig
from lbllm.stages import aar
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.distill import Step, binary_layers
from lbllm.stages.e2e import EndToEnd
from lbllm.stages.wat import wat_block
from tests.helpers.named_device import DEVICE, Host, bfloat16_autocast, fuse_optimizers, named_device
from tests.helpers.tiny_models import tiny
from tests.helpers.tiny_runs import token_ids

STEPS = 100 if os.environ.get("LBLLM_SOAK") else 5
FORMAT = LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=4, act_group_size=64)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    fuse_optimizers(monkeypatch)
    monkeypatch.setattr(aar, "KNEES", (0.25,))
    with named_device() as host:
        yield host


def model_there() -> Any:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny("qwen2", num_hidden_layers=1, **small)[0].requires_grad_(False).to(DEVICE)  # type: ignore[arg-type]
    model.tie_weights()
    return model


def binarize(block: Any) -> dict[str, Tensor]:
    """Replace the block's layers by frozen ones of random levels; returns latent weights."""
    latents = {}
    for name, layer in linear_layers(block).items():
        latents[name] = layer.weight.detach().cpu().clone()  # type: ignore[operator]
        rows, columns = layer.weight.shape  # type: ignore[misc]
        params = torch.tensor([0.2, 0.0, 0.07, 0.0]).repeat(rows, -(-columns // 16), 1)
        index = torch.randint(0, 4, (rows, columns), dtype=torch.uint8)
        block.set_submodule(name, BinaryLinear(layer, FORMAT, params.to(DEVICE), index.to(DEVICE)))
    return latents


def copies_a_step(steps: Iterator[Step | None], host: Host) -> list[list[str]]:
    """What each step copied to the host, from the second one on: the first prepares."""
    found: list[list[str]] = []
    for step in steps:
        if step is not None:
            found.append(list(host.copies))
            host.copies.clear()
    assert len(found) == STEPS
    return found[1:]


@pytest.mark.random
@pytest.mark.parametrize("stage", ["wat", "wat relaxed", "aar"])
def test_a_step_of_a_block_copies_its_loss_alone(stage: str, host: Host) -> None:
    model, ids = model_there(), token_ids(2)[:, :8]
    block = share_copy(decoder_blocks(model)[1][0])
    call = capture_calls(model, ids[:1].to(DEVICE))[0]
    inputs = first_inputs(model, ids, 2).cpu()
    targets, sharing = torch.randn_like(inputs), shared_inputs(block, inputs[:1], call)
    latents = binarize(block)
    small: dict[str, Any] = {"tokens": 16, "epochs": STEPS, "batch_tokens": 16}
    if stage == "aar":
        config = AarConfig(**small, search_tokens=16)
        add_quantizers(block, sharing, call, inputs, config, tail=3, cache=TrainingCache(4), batch=2)
        steps = aar_block(
            block, call, inputs, targets, config, cache=TrainingCache(4), seed=0, autocast=bfloat16_autocast
        )
    else:
        wat = WatConfig(**small, bitmap="relaxed" if "relaxed" in stage else "coupled")
        steps = wat_block(block, call, inputs, targets, latents, wat, seed=0, autocast=nullcontext)
    assert all(len(binary_layers(block)) and layer.index.device == DEVICE for layer in binary_layers(block).values())
    found = copies_a_step(steps, host)
    assert {len(copies) for copies in found} == {1}, found[0]


@pytest.mark.random
def test_a_step_of_the_whole_model_copies_its_loss_alone(host: Host) -> None:
    model, ids = model_there(), token_ids(2)[:, :9].to(DEVICE)
    student = share_copy(model)
    attach_kv_cache(student, KVFormat(4), training=True)
    block = decoder_blocks(student)[1][0]
    binarize(block)
    config = E2eConfig(tokens=18, epochs=STEPS, batch_tokens=18, feature_weight=0.5)
    layers = list(binary_layers(block).values())
    training = EndToEnd(student, model, layers, ids, config, seed=0, autocast=bfloat16_autocast)
    found = copies_a_step(training.steps(), host)
    assert {len(copies) for copies in found} == {1}, found[0]
