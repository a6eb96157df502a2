"""``lbllm.quantize`` on a model that is already loaded: a working packed model, and the given one as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lbllm
from lbllm.config import RunConfig
from lbllm.errors import CheckpointError, ConfigError, CorpusError
from lbllm.events import BlockStarted, Event, RunDone, RunStarted
from lbllm.quant.packed_layer import PackedLinear
from tests.helpers.tiny_models import SENTENCES, tiny
from tests.helpers.tiny_runs import run_config, token_ids


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_a_loaded_model_becomes_a_packed_one_and_stays_as_it_was(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama_bias")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = str(model)
    events: list[Event] = []
    packed = lbllm.quantize(model, tokenizer, run_config(), sequences=token_ids(), on_event=events.append)

    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunDone)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == events[0].layers
    dense, close = logits(model.eval(), token_ids(2, seed=1)), logits(packed, token_ids(2, seed=1))
    assert close.shape == dense.shape
    assert float((close - dense).square().mean()) < float(dense.square().mean())
    assert packed.generate(token_ids(1), max_new_tokens=4).shape[1] > 32
    # It lives on without the folder it was made in.
    packed.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(lbllm.load(tmp_path / "saved")[0], token_ids()), logits(packed, token_ids()))

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert str(model) == modules
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_training_mode_is_left_alone() -> None:
    model, tokenizer = tiny("gpt2")
    model.train()
    lbllm.quantize(model, tokenizer, run_config(stages=["ptq"]), sequences=token_ids())
    assert model.training


def test_the_folder_keeps_the_work(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama")
    first = lbllm.quantize(model, tokenizer, run_config(stages=["ptq"]), sequences=token_ids(), out=tmp_path)
    events: list[Event] = []
    lbllm.quantize(model, tokenizer, run_config(), sequences=token_ids(), out=tmp_path, on_event=events.append)
    assert {event.stage for event in events if isinstance(event, BlockStarted)} == {"wat", "aar"}
    again, _ = lbllm.load(tmp_path / "checkpoint")
    assert not torch.equal(logits(again, token_ids()), logits(first, token_ids()))
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(CheckpointError, match="another model"):
        lbllm.quantize(model, tokenizer, run_config(), sequences=token_ids(), out=tmp_path)


def test_a_model_in_bfloat16_is_trained_in_float32_and_comes_back_in_bfloat16(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama")
    model.bfloat16()
    small = lbllm.quantize(model, tokenizer, run_config(), sequences=token_ids(), out=tmp_path / "bf16")
    assert small.dtype == model.dtype == torch.bfloat16
    assert logits(small, token_ids()).dtype == torch.bfloat16
    large = lbllm.quantize(model.float(), tokenizer, run_config(), sequences=token_ids(), out=tmp_path / "fp32")
    assert logits(large, token_ids()).dtype == torch.float32
    one, other = (lbllm.load(tmp_path / name / "checkpoint")[0] for name in ("bf16", "fp32"))
    assert torch.equal(logits(one, token_ids()), logits(other, token_ids()))


def test_the_text_can_come_from_the_settings(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama")
    (tmp_path / "text.txt").write_text("\n".join(f"{index}. {line}" for index in range(60) for line in SENTENCES))
    events: list[Event] = []
    config = run_config(stages=["ptq"], corpus=str(tmp_path / "text.txt"))
    packed = lbllm.quantize(model, tokenizer, config, on_event=events.append)
    assert isinstance(events[0], RunStarted)
    assert events[0].tokens == config.tokens
    assert logits(packed, token_ids()).isfinite().all()


def test_what_cannot_work_is_said() -> None:
    model, tokenizer = tiny("llama")
    for sequences in (token_ids()[0], token_ids()[:, :7]):
        with pytest.raises(CorpusError, match=r"sequences of shape .* \(n, T\)"):
            lbllm.quantize(model, tokenizer, run_config(), sequences=sequences)
    with pytest.raises(
        ConfigError, match=r"seq_len \(Sequence length\) 257 is more than the model's context of 256 tokens"
    ):
        lbllm.quantize(model, tokenizer, run_config(), sequences=token_ids().repeat(1, 9)[:, :257])
    with pytest.raises(ConfigError, match=r"Group size\) 64 is longer than a row"):
        lbllm.quantize(model, tokenizer, RunConfig(), sequences=token_ids())
