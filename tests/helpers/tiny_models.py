"""Tiny random causal language models of many architectures, and a tokenizer, for tests: no download, built in
milliseconds.

    model, tokenizer = tiny("gemma3")
    save_tiny(tmp_path / "teacher", "llama")

The same architecture gives the same weights every time. Biases and norm weights are random too, so that a test sees
when one is lost. Some row lengths are no multiple of 8 or of usual group sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lbllm.models.loading import quiet

VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = _COMMON | {"num_key_value_heads": 2}

# name -> (transformers model type, settings). Each line names what it is here for.
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    # tied embeddings, grouped-query attention: the embedded model's own architecture
    "llama": ("llama", _GROUPED | {"tie_word_embeddings": True}),
    # untied head, biases on every linear layer
    "llama_bias": ("llama", _GROUPED | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    # norms on queries and keys, head size apart from hidden_size / heads
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    # biases on q, k, v alone
    "qwen2": ("qwen2", _GROUPED),
    # sliding and global layers with different rotary bases, norms before and after, scaled embeddings
    "gemma3": (
        "gemma3_text",
        _GROUPED
        | {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    # ReLU, learned positions, biases, no gate, wider than its embedding (projections outside the blocks)
    "opt": (
        "opt",
        {key: value for key, value in _COMMON.items() if key not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 90, "word_embed_proj_dim": 32, "init_std": 0.12},
    ),
    # Conv1D layers (transposed weights), fused q, k, v
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 90}
        | {"initializer_range": 0.12, "bos_token_id": 1, "eos_token_id": 2},
    ),
    # attention and MLP in parallel, fused q, k, v, partly rotary (Pythia)
    "gpt_neox": ("gpt_neox", _COMMON | {"num_attention_heads": 3, "use_parallel_residual": True}),
    # fused q, k, v and fused gate and up projections
    "phi3": ("phi3", _GROUPED),
    # sliding window in every layer
    "mistral": ("mistral", _GROUPED | {"sliding_window": 16}),
    # norms after attention and MLP only, and on queries and keys
    "olmo2": ("olmo2", _GROUPED),
    # mixture of experts, each with a gate
    "qwen3_moe": (
        "qwen3_moe",
        _GROUPED | {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}
ARCHITECTURES: tuple[str, ...] = tuple(_SETTINGS)
DENSE_ARCHITECTURES: tuple[str, ...] = tuple(name for name in _SETTINGS if name != "qwen3_moe")

SENTENCES: tuple[str, ...] = (
    "The river runs past the old mill and under the stone bridge.",
    "She counted the stars until the clouds came in from the sea.",
    "A small model learns quickly, but it also forgets quickly.",
    "Bread needs flour, water, salt and a little patience.",
    "What is the capital of France? The capital of France is Paris.",
    "In winter the birds fly south; in spring they return with new songs.",
    "He wrote a short program that adds two numbers and prints the sum.",
    "The train leaves at seven, and the next one leaves an hour later.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most ``VOCABULARY`` tokens; any text round-trips. Ids: pad 0, start 1, end 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The architecture's tiny transformers config, with ``changes`` to its settings."""
    model_type, settings = _SETTINGS[architecture]
    return AutoConfig.for_model(model_type, **(settings | changes))


def tiny(architecture: str, *, seed: int = 0, **changes: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float32 model in eval mode and its tokenizer (with a chat template, except OPT, GPT-2 and GPT-NeoX)."""
    # While another thread of this process loads a model, transformers' initialization does nothing.
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, tiny_tokenizer(chat=architecture not in ("opt", "gpt2", "gpt_neox"))


def save_tiny(folder: Path, architecture: str, **changes: Any) -> Path:
    """Write the model (safetensors) and its tokenizer to ``folder``, as save_pretrained does; returns the folder."""
    model, tokenizer = tiny(architecture, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
