"""A model that is computed one block at a time gives what the whole model gives, from files of any layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lbllm.errors import ModelError
from lbllm.measure.perplexity import block_perplexity, perplexity
from lbllm.models import streamed
from lbllm.models.blocks import capture_calls, decoder_blocks, first_inputs
from lbllm.models.loading import FileFault, load_model
from lbllm.models.opened import open_blocks
from lbllm.models.streamed import BlockModel, weight_hashes
from lbllm.models.teacher import load_teacher, stream_teacher
from lbllm.models.weights import StoredWeights
from tests.helpers.tiny_models import DENSE_ARCHITECTURES, save_tiny

CPU = torch.device("cpu")


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(length))


def opened(folder: Path) -> BlockModel:
    return open_blocks(str(folder), True, AutoConfig.from_pretrained(folder), CPU)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return True


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_block_by_block_is_the_whole_model(
    architecture: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "LOGITS_PART", 4_000)  # several parts of a small vocabulary
    save_tiny(tmp_path / "m", architecture)
    model: PreTrainedModel = load_model(tmp_path / "m", dtype=torch.float32).eval()
    found = BlockModel.of(model) if whole else opened(tmp_path / "m")
    survey = found.survey(ids(1, 24))
    assert same(survey.calls, capture_calls(model, ids(1, 24)))
    assert survey.uncalled == []
    assert survey.hashes == weight_hashes(model)
    assert same(found.calls(ids(1, 16)), capture_calls(model, ids(1, 16)))
    windows = ids(3, 16)
    assert torch.equal(torch.cat(list(found.first_inputs(windows, 2))), first_inputs(model, windows, 2))
    logits = torch.cat([part for _, part in found.logits(windows, found.last_hidden(windows))], -1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=windows, use_cache=False).logits)
    assert block_perplexity(found, windows) == pytest.approx(perplexity(model, windows).perplexity, rel=1e-5)
    if not whole:
        blocks = decoder_blocks(found.model)[1]
        assert {parameter.device.type for block in blocks for parameter in block.parameters()} == {"meta"}


def test_blocks_that_return_more_than_hidden_states_need_no_survey_before(tmp_path: Path) -> None:
    # MPT's blocks return their attention weights, too; a model after a stage is evaluated without a survey.
    config = AutoConfig.for_model("mpt", vocab_size=320, d_model=48, n_layers=2, n_heads=4, max_seq_len=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, found = load_model(tmp_path, dtype=torch.float32).eval(), opened(tmp_path)
    assert block_perplexity(found, ids(2, 16)) == pytest.approx(perplexity(model, ids(2, 16)).perplexity, rel=1e-5)
    assert same(found.calls(ids(1, 12)), capture_calls(model, ids(1, 12)))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_sharded_files_and_files_of_the_inner_model_are_read(architecture: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", architecture)
    model = load_model(tmp_path / "m", dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert opened(tmp_path / "sharded").survey(ids(1, 8)).hashes == weight_hashes(model)
    # As base models are stored, without the name of the inner model before each tensor.
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    if "lm_head.weight" not in tensors:
        prefix = f"{model.base_model_prefix}."
        save_file({n.removeprefix(prefix): t for n, t in tensors.items()}, tmp_path / "m" / "model.safetensors")
        assert opened(tmp_path / "m").survey(ids(1, 8)).hashes == weight_hashes(model)


@pytest.mark.parametrize("own", [False, True])
def test_a_head_of_its_own_is_used_although_the_config_ties_it(own: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.5 if own else 0)
    save_file(tensors, file, {"format": "pt"})
    model = load_model(tmp_path, dtype=torch.float32)
    found = opened(tmp_path)
    head, embeddings = (get().weight for get in (found.model.get_output_embeddings, found.model.get_input_embeddings))
    assert (head is embeddings) == (not own)
    assert block_perplexity(found, ids(1, 16)) == pytest.approx(perplexity(model, ids(1, 16)).perplexity, rel=1e-5)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama")
    load_teacher(str(tmp_path / "m")).model.save_pretrained(tmp_path / "s", max_shard_size="20kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "s" / name).write_bytes((tmp_path / "m" / name).read_bytes())
    shard = sorted((tmp_path / "s").glob("model-*"))[1]
    good = shard.read_bytes()
    teacher = stream_teacher(str(tmp_path / "s"), CPU)
    # Changed or lost after it was opened.
    shard.write_bytes(good)
    os.utime(shard, (1, 1))
    with pytest.raises(ModelError, match=rf"{shard.name} has changed"):
        teacher.model.survey(ids(1, 8))
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name} is missing"):
        teacher.model.survey(ids(1, 8))
    # At once: missing, short, with a bad header, a tensor too few or of another shape.
    with pytest.raises(ModelError, match=rf"{shard.name}, which is missing"):
        stream_teacher(str(tmp_path / "s"), CPU)
    shard.write_bytes(good[:-5])
    with pytest.raises(ModelError, match=rf"{shard.name} is too short"):
        stream_teacher(str(tmp_path / "s"), CPU)
    for bad in (good[:4], b"\xff" * 8 + good[8:], good[:8] + b"[" + good[9:]):
        shard.write_bytes(bad)
        with pytest.raises(ModelError, match=shard.name):
            stream_teacher(str(tmp_path / "s"), CPU)
    shard.write_bytes(good)
    tensors = load_file(shard)
    name, tensor = next(iter(tensors.items()))
    save_file({n: t for n, t in tensors.items() if n != name}, shard, {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        stream_teacher(str(tmp_path / "s"), CPU)
    save_file(tensors | {name: tensor[:-1].contiguous()}, shard, {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        stream_teacher(str(tmp_path / "s"), CPU)


def test_rows_are_read_in_the_dtype_of_the_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12.0).view(4, 3).bfloat16(),
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.zeros(0, 5),
        "d": torch.arange(6, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weights = StoredWeights.find(str(tmp_path))
    for name, tensor in tensors.items():
        found = weights.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    assert torch.equal(weights.read("a", slice(1, 3)), tensors["a"][1:3])
    assert torch.equal(weights.read("a", torch.tensor([0, 3])), tensors["a"][[0, 3]])
    for rows in (torch.tensor([1, 4]), torch.tensor([-1]), slice(2, 5)):  # there are bytes, but of other tensors
        with pytest.raises(IndexError, match="of a tensor of 4 rows"):
            weights.read("a", rows)


@pytest.mark.parametrize("entry", [{"dtype": "F7"}, {"shape": [-4, -3]}, {"data_offsets": [8, 4]}, {"shape": "x"}, 5])
def test_a_header_that_says_nonsense_is_refused(entry: Any, tmp_path: Path) -> None:
    good = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    header = json.dumps({"a": good | entry if isinstance(entry, dict) else entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))
    with pytest.raises(FileFault, match=r"model\.safetensors is damaged: tensor a"):
        StoredWeights([file])
