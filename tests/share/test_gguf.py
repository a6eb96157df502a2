"""GGUF: read back by the gguf package and by transformers it is the same model; what llama.cpp lacks is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from lbllm.errors import ModelError
from lbllm.models.gguf import convert
from lbllm.share.gguf import check_exportable, write_gguf
from tests.helpers.tiny_models import CHAT_TEMPLATE, SENTENCES, tiny, tiny_config, tiny_tokenizer
from tests.helpers.tiny_runs import token_ids

TEXTS = (*SENTENCES, "Héllo  wörld — 東京,\n\n\tin 1999?", "<|start|>user\nHi<|end|>")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

OTHER_BASE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20_000},
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [1.0] * 6,
    "short_factor": [1.0] * 6,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}


def written(folder: Path, architecture: str, **changes: Any) -> tuple[Any, PreTrainedTokenizerBase, Path]:
    """A tiny model in bfloat16, its tokenizer, and the GGUF file made of them."""
    model, tokenizer = tiny(architecture, **changes)
    model = model.bfloat16()
    write_gguf(model, tokenizer, folder / "model.gguf", name="Tiny", licence="mit")
    return model, tokenizer, folder / "model.gguf"


GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 7,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
}


# transformers reads no head size of Qwen3 from the file; 128 is what it takes then.
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 128}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {}),
    ],
)
def test_transformers_reads_the_same_model_back(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    _, _, file = written(tmp_path, architecture, **changes)
    back = AutoModelForCausalLM.from_pretrained(convert(file, tmp_path / "models"), dtype=torch.float32)
    meant, _ = tiny(architecture, **changes)
    for parameter in meant.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert back.state_dict().keys() == meant.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, meant.state_dict()[name]), name
    with torch.no_grad():
        torch.testing.assert_close(back(token_ids(2)).logits, meant(token_ids(2)).logits, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_splits_every_text_as_before(tmp_path: Path) -> None:
    _, tokenizer, file = written(tmp_path, "llama")
    read = AutoTokenizer.from_pretrained(convert(file, tmp_path / "models"))
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert read.chat_template == CHAT_TEMPLATE
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 0)


def test_the_file_itself(tmp_path: Path) -> None:
    model, tokenizer, file = written(tmp_path, "llama_bias")
    reader = gguf.GGUFReader(file)
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["general.license"] == "mit"
    assert value["llama.rope.dimension_count"] == 12
    assert value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert value["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # three special tokens, then plain ones
    assert value["tokenizer.ggml.add_bos_token"] is False
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["output.weight"] == kinds["blk.1.ffn_down.weight"] == "BF16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    # llama.cpp turns values 2 i and 2 i + 1 of a head together, transformers values i and i + 6.
    queries = model.model.layers[0].self_attn.q_proj
    for ours, theirs in ((queries.bias, "blk.0.attn_q.bias"), (queries.weight, "blk.0.attn_q.weight")):
        meant = ours.detach().float().numpy()
        found = tensors[theirs].data
        if found.dtype == np.uint8:
            found = (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        for head in range(4):
            for place in range(6):
                for side in (0, 1):
                    row = found[12 * head + 2 * place + side]
                    np.testing.assert_array_equal(row, meant[12 * head + 6 * side + place])


def test_gemma_s_norms_and_layers(tmp_path: Path) -> None:
    """transformers adds one to the weights of a norm, llama.cpp does not."""
    model, _, file = written(tmp_path, "gemma3", **GEMMA3)
    reader = gguf.GGUFReader(file)
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert (value["general.architecture"], value["gemma3.attention.sliding_window"]) == ("gemma3", 8)
    assert (value["gemma3.rope.freq_base"], value["gemma3.attention.key_length"]) == (1e6, 16)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    block = model.model.layers[1]
    for norm, name in (
        (block.input_layernorm, "attn_norm"),
        (block.post_attention_layernorm, "post_attention_norm"),
        (block.pre_feedforward_layernorm, "ffn_norm"),
        (block.post_feedforward_layernorm, "post_ffw_norm"),
        (block.self_attn.q_norm, "attn_q_norm"),
    ):
        wanted = norm.weight.detach().float().numpy() + np.float32(1)
        np.testing.assert_array_equal(tensors[f"blk.1.{name}.weight"], wanted)
    assert "output.weight" not in tensors


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    """llama.cpp attends to the whole text, which is the same within the window."""
    _, _, file = written(tmp_path, "mistral", sliding_window=16)
    value = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert value["llama.context_length"] == 16


def test_the_ends_of_an_answer_are_in_the_file(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama")
    model.generation_config = GenerationConfig(eos_token_id=[2, 0, 7])
    write_gguf(model.bfloat16(), tokenizer, tmp_path / "m.gguf", name="Tiny", licence=None)
    value = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    ends = [value[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert ends == [2, 0, 7]


def test_stretched_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    _, _, file = written(tmp_path, "llama", rope_parameters=LLAMA3)
    (found,) = (tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    for place, factor in enumerate(found):
        wavelength = 2 * math.pi * 500_000.0 ** (2 * place / 12)
        if wavelength < 64 / 4:
            meant = 1.0
        elif wavelength > 64 / 1:
            meant = 8.0
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            meant = 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(meant, rel=1e-5)
    assert {1.0, 8.0} < {round(float(factor), 4) for factor in found}


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("gemma3", {}, "one full layer of 6"),
        ("gemma3", GEMMA3 | {"query_pre_attn_scalar": 12}, "query_pre_attn_scalar 12"),
        ("gemma3", GEMMA3 | {"final_logit_softcapping": 30.0}, "soft cap"),
        ("gemma3", GEMMA3 | {"tie_word_embeddings": False}, "head of its own"),
        ("gemma3", GEMMA3 | {"rope_parameters": OTHER_BASE}, "base of 20000"),
        ("phi3", {"rope_parameters": LONG}, "'longrope'"),
        ("gpt2", {}, "gpt2"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding window of 16"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "'llama3'"),
        ("qwen3", {"attention_bias": True}, "biases"),
    ],
)
def test_other_models_are_refused_with_a_way_out(architecture: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=rf"{named}.*dense.*convert_hf_to_gguf"):
        check_exportable(tiny_config(architecture, **changes), tiny_tokenizer())


def test_how_a_text_is_split_is_known_or_refused() -> None:
    config = tiny_config("llama")
    tokenizer = tiny_tokenizer()
    check_exportable(config, tokenizer)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    check_exportable(config, tokenizer)
    for unknown in (
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level]),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ):
        tokenizer.backend_tokenizer.pre_tokenizer = unknown
        with pytest.raises(ModelError, match=r"tokenizer \(BPE.*dense"):
            check_exportable(config, tokenizer)
