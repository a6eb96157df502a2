"""A checkpoint whose activations and KV cache are quantized, run with them left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lbllm
from lbllm.chat.pool import load_model
from lbllm.checkpoints.find import find_checkpoint, find_model, open_model
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.commands.main import main
from lbllm.errors import CheckpointError, ModelError
from lbllm.quant.packed_layer import PackedLinear
from lbllm.share.export import export
from tests.helpers.tiny_models import SENTENCES, save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the paper's three stages, A4KV4, one layer's inputs in 8 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    save_tiny(folder / "teacher", "llama")
    changes = {"overrides": {"*.down_proj": {"act_bits": 8}}, "kv_group_size": 8}
    run_tiny(run_config(model="tiny", quant=changes), folder / "run", tiny_teacher("llama"))
    return folder / "run/checkpoint"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(token_ids(2, seed=1)).logits)


def test_its_weights_compute_as_a_dense_copy_of_them_does(checkpoint: Path, tmp_path: Path) -> None:
    own, _ = lbllm.load(checkpoint)
    alone, _ = lbllm.load(checkpoint, activations=False)
    dense = AutoModelForCausalLM.from_pretrained(
        export(find_checkpoint(str(checkpoint)), "dense", tmp_path / "dense").path, dtype=torch.float32
    )
    wanted = logits(dense)
    assert (logits(alone) - wanted).norm() < 0.02 * wanted.norm()  # its weights are rounded to bfloat16
    assert (logits(own) - wanted).norm() > 0.05 * wanted.norm()
    assert alone.config.quantization_config.format.weights_alone
    assert all(layer.quantizer is None for layer in alone.modules() if isinstance(layer, PackedLinear))
    # Token by token, with a cache and the fast operator, it is the same model.
    ids = token_ids(1, seed=2)[:1, :7]
    written = alone.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)  # type: ignore[operator]
    with torch.no_grad():
        for length in range(7, 19):
            assert int(alone(written[:, :length]).logits[0, -1].argmax()) == int(written[0, length])
    # The next load is as the checkpoint states again.
    assert torch.equal(logits(lbllm.load(checkpoint)[0]), logits(own))


def test_saved_again_it_is_a_checkpoint_of_weights_alone(checkpoint: Path, tmp_path: Path) -> None:
    alone, tokenizer = lbllm.load(checkpoint, activations=False)
    tokenizer.save_pretrained(tmp_path / "saved")
    alone.save_pretrained(tmp_path / "saved")
    again, _ = lbllm.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(alone))
    before, after = load_file(checkpoint / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert {name for name in before if name not in after} == {name for name in before if name.endswith(".act")}
    assert not find_model(str(tmp_path / "saved")).quantizes  # type: ignore[union-attr]


def test_the_name_of_a_model_that_runs_says_so(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{checkpoint}:a16"
    found = find_model(name)
    assert (found.name, found.activations, found.quantizes) == (name, False, True)  # type: ignore[union-attr]
    assert find_checkpoint(str(checkpoint)).activations
    expected = logits(lbllm.load(checkpoint, activations=False)[0])
    assert torch.equal(logits(open_model(name)[0]), expected)
    loaded = [load_model(one) for one in (name, str(checkpoint))]
    assert [one.precision.partition(",")[0] for one in loaded] == ["W(1+1)A16KV16", "W(1+1)A4KV4"]
    assert torch.equal(logits(loaded[0].model), expected)
    text = checkpoint.parent.parent / "text.txt"
    text.write_text(" ".join(SENTENCES * 8))
    options = ["--text", str(text), "--seq-len", "32", "--limit", "2", "--json"]
    main(["evaluate", "--model", str(checkpoint), "--model", name, *options])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures.keys() == {str(checkpoint), name}
    assert figures[name]["perplexity"] != pytest.approx(figures[str(checkpoint)]["perplexity"], rel=1e-3)


def test_only_what_runs_a_checkpoint_takes_such_a_name(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r":a16 is for running a checkpoint; give .*checkpoint, the checkpoint"):
        find_checkpoint(f"{checkpoint}:a16")
    with pytest.raises(ModelError, match=r"teacher is no packed checkpoint, so its activations have no bits"):
        find_model(f"{checkpoint.parent.parent / 'teacher'}:a16")
    with pytest.raises(ModelError, match="nothing:a16' is not known"):
        find_model("nothing:a16")
