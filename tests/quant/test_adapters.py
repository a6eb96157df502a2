"""Adapters of PEFT on a packed model: LoRA on packed layers, as docs/extend.md shows it, and on dense parts, prompt
tuning, transformers' Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lbllm
from lbllm.sections import QuantConfig
from tests.helpers import ROOT
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.helpers.tiny_runs import token_ids

peft = pytest.importorskip("peft", reason="PEFT is not in the lock")
IDS = token_ids(2, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quant = QuantConfig(group_size=16, act_group_size=16, kv_bits=4)
    return tiny_checkpoint(tmp_path_factory.mktemp("adapters"), "llama", quant)[0]


def base(folder: Path) -> Any:
    return lbllm.load(folder)[0]


def train(model: Any, rate: float) -> Tensor:
    """Train ten steps; returns the logits afterwards."""
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], rate)
    losses = []
    for _ in range(10):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def test_lora_trains_beside_packed_bits(folder: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    before = logits(base(folder))
    model = names["with_lora"](base(folder))
    assert torch.equal(logits(model), before)
    after = train(model, 1e-2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(folder), tmp_path, config=names["lora_config"]())
    torch.testing.assert_close(logits(again), after)
    with pytest.raises(NotImplementedError, match="packed bits"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), before)


CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# What each is, and a learning rate.
CONFIGS: dict[str, tuple[Callable[[], Any], float]] = {
    "prompt tuning": (lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=4), 0.3),
    "LoRA on head and embeddings": (
        lambda: peft.LoraConfig(**CAUSAL, r=4, target_modules=["lm_head", "embed_tokens"]),
        3e-2,
    ),
    "norms": (lambda: peft.LNTuningConfig(**CAUSAL, target_modules=["norm", "input_layernorm"]), 3e-2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_adapters_are_trained_saved_and_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    config, rate = CONFIGS[name]
    model = peft.get_peft_model(base(folder), config())
    after = train(model, rate)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(folder), tmp_path)
    torch.testing.assert_close(logits(again), after)
    assert not torch.allclose(after[:, -IDS.shape[1] :], logits(base(folder)), atol=1e-3)
    # One token at a time, from the packed KV cache.
    prompt = {"input_ids": IDS[:1, :8], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    written = [one.generate(**prompt, max_new_tokens=6, do_sample=False) for one in (model, again)]
    assert torch.equal(*written)


def test_the_trainer_of_transformers_takes_adapters_and_no_bare_model(folder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    settings = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base(folder), settings, train_dataset=rows)
    model = peft.get_peft_model(base(folder), CONFIGS["prompt tuning"][0]())
    before = logits(model)
    Trainer(model, settings, train_dataset=rows).train()
    assert not torch.equal(logits(model), before)


def test_an_adapter_that_transformers_added_is_saved_alone(folder: Path, tmp_path: Path) -> None:
    model = base(folder)
    model.add_adapter(peft.LoraConfig(**CAUSAL, r=4, target_modules=["lm_head"]))
    after = train(model, 3e-2)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = base(folder)
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(again), after)
