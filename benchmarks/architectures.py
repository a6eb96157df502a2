"""Every decoder of transformers, tried on tiny random models: which ones work, and why the others are refused.

    python -m benchmarks.architectures
    python -m benchmarks.architectures --types llama,bloom,falcon_h1

Each model has two blocks (three where its pattern needs them) of 64 features, 4 heads and 320 tokens. It goes through
stages 1 to 3 with 4-bit activations and a 4-bit KV cache, is packed, loaded, called, and writes six tokens with and
without its cache. "works" means that all of it is finite and both texts are the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.command_line import command_parser, one_message
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.hf import load
from lbllm.errors import ConfigError, LbllmError
from lbllm.models.loading import quiet
from lbllm.models.teacher import load_teacher
from tests.helpers.tiny_models import VOCABULARY, tiny_tokenizer
from tests.helpers.tiny_runs import run_config, run_tiny, token_ids

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 16}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_n_groups": 1}
# What a type needs beside ``_SIZES``.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 160},
    "deepseek_v2": _LATENT | _EXPERTS,
    "deepseek_v3": _LATENT | _EXPERTS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    | {"mamba_chunk_size": 16},
    "gemma2": _HEADS,
    "gemma3_text": _HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 160, "n_positions": 256},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 160, "n_positions": 256},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_oss": _EXPERTS | _HEADS,
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 160},
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 160},
    "helium": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
    | {"mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 160},
    "llama4_text": _EXPERTS | _HEADS | {"intermediate_size_mlp": 160},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minicpm3": _LATENT,
    "ministral": _HEADS,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "head_dim": 16},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "qwen3_5_text": _DELTA | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16},
    "qwen3_next": _DELTA
    | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "mlp_only_layers": [0, 1]}
    | {"head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"lru_width": 64, "num_hidden_layers": 3, "attention_window_size": 32},
    "rwkv": {"attention_hidden_size": 64},
    "xglm": {"d_model": 64, "ffn_dim": 160, "num_layers": 2, "attention_heads": 4},
    "youtu": _LATENT,
}
WITH_EXPERTS = (
    *("afmoe", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "granitemoe", "minimax", "mixtral", "olmoe"),
    *("phimoe", "qwen2_moe", "qwen3_moe"),
)
_DENSE = (
    *("apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "cwm", "diffllama", "doge", "ernie4_5", "exaone4"),
    *("falcon", "gemma", "glm", "glm4", "gpt_neox", "granite", "helium", "jais2", "llama", "ministral3", "mistral"),
    *("modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "persimmon", "phi", "phi3", "qwen2"),
    *("qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
)
TYPES: tuple[str, ...] = tuple(sorted({*_DENSE, *WITH_EXPERTS, *_OWN}))
# Sizes that a type calls by other names of its own; given twice, transformers would refuse them.
_RENAMED = {"xglm": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}


def tiny_of(kind: str) -> PreTrainedModel:
    """Return a tiny random model of a type, float32."""
    own = (_EXPERTS if kind in WITH_EXPERTS else {}) | _OWN.get(kind, {})
    sizes = {name: value for name, value in _SIZES.items() if name not in _RENAMED.get(kind, ())}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | own))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def tried(kind: str) -> str:
    """Return "works", or the message with which a type is refused. Raises AssertionError if results differ."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch)
        tiny_of(kind).save_pretrained(folder / "teacher")
        tiny_tokenizer(chat=False).save_pretrained(folder / "teacher")
        config = run_config(model=str(folder / "teacher"))
        try:
            run_tiny(config, folder / "run", load_teacher(config.model))
        except LbllmError as error:
            return str(error).replace(f"{config.model} ", "").replace(str(folder), "")
        model: Any = load(folder / "run" / "checkpoint")[0]
        ids = token_ids(1, seed=2)[:, :16]
        with torch.no_grad():
            assert model(ids).logits.isfinite().all(), f"{kind}: the packed model's output is not finite"
            told = [
                model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)
            ]
        assert torch.equal(*told), f"{kind}: with its cache the packed model writes another text than without"
        return "works"


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--types", default=",".join(TYPES), help="joined by commas")
    options = parser.parse_args()
    kinds = options.types.split(",")
    for kind in kinds:
        if kind not in TYPES:
            raise ConfigError(f"type {kind!r} is not among those that are tried: {', '.join(TYPES)}")
    rows = []
    for kind in kinds:
        rows.append({"label": kind, "outcome": tried(kind)})
        print(f"{kind:20} {rows[-1]['outcome']}", flush=True)
    works = sum(row["outcome"] == "works" for row in rows)
    print(f"{works} of {len(rows)} work")
    if options.out:
        write_report(options.out, "architectures", settings_of(options), rows)


if __name__ == "__main__":
    main()
