"""A tiny Llama as a GGUF file, with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.helpers.tiny_models import tiny


def write_gguf(file: Path, **changes: Any) -> PreTrainedModel:
    """A tiny llama as a GGUF file with Q8_0 weights; returns the model with exactly the weights the file stands for."""
    model, tokenizer = tiny("llama", hidden_size=64, intermediate_size=96, **changes)
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_license("mit")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, parameter in model.named_parameters():
        short = name
        for long, replacement in names.items():
            short = short.replace(long, replacement)
        value = parameter.detach().numpy()
        if value.ndim == 1:
            writer.add_tensor(short, value)
            continue
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split(".")[-2][0], 0)
        rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
        # llama.cpp keeps the two halves of a rotary head interleaved.
        split = (heads, 2, -1, value.shape[1])
        stored = value.reshape(split).swapaxes(1, 2).reshape(value.shape) if rotary else value
        blocks = gguf.quants.quantize(np.ascontiguousarray(stored), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(short, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        exact = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        if rotary:
            exact = exact.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        parameter.data.copy_(torch.from_numpy(exact.copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
