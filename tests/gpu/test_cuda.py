"""On a real GPU: the kernels are used, a run gives a checkpoint, and its answers are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lbllm import load
from lbllm.events import BlockDone, RunDone
from lbllm.quant.gpu_trial import faults, on_gpu
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_the_kernels_are_used() -> None:
    assert faults() == []
    assert on_gpu() is not None


@pytest.mark.parametrize("architecture", ["llama", "llama_bias", "gpt2", "gemma3"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_and_its_checkpoint(architecture: str, precision: str, tmp_path: Path) -> None:
    stages = ["ptq", "wat", "aar", "e2e"]
    e2e = {"tokens": 96, "epochs": 1, "batch_tokens": 64, "lr_weight": 1e-3}
    config = run_config(device="cuda", stages=stages, quant={"param_bits": 4, "act_group_size": 64}, e2e=e2e)
    events = run_tiny(config, tmp_path, tiny_teacher(architecture), precision=precision)
    assert isinstance(events[-1], RunDone)
    assert all(event.loss_after < 0.5 for event in events if isinstance(event, BlockDone))
    here, there = (load(tmp_path / "checkpoint", device=device)[0] for device in ("cpu", "cuda"))
    ids = token_ids(2, seed=1)
    with torch.no_grad():
        wanted, found = here(ids).logits, there(ids.cuda()).logits.cpu()
        assert float((found - wanted).square().mean() / wanted.square().mean()) < 0.02
        told = there.generate(ids[:1].cuda(), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert told.shape == (1, 36)
