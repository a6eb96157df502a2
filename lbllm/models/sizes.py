"""Refuse a model whose stated sizes can't be a model's, before anything is built from them."""

from __future__ import annotations

import re
from typing import Any

from lbllm.models.loading import FileFault

# By the end of a name: the largest value of a model that this program could run, with room. The first one that fits
# counts. Names are those of transformers' configs and of GGUF metadata.
_GREATEST: tuple[tuple[str, int], ...] = (
    (r"layers?|block_count|n_layer", 1_000),
    (r"heads?|n_head|head_count|head_count_kv", 1 << 13),
    (r"experts?|expert_count|expert_used_count|per_tok", 1 << 15),
    (r"vocab_size", 1 << 24),
    (r"hidden_size|d_model|n_embd|embedding_length|embed_dim|head_dim|key_length|value_length", 1 << 18),
    (r"intermediate_size|ffn_dim|n_inner|d_ff|feed_forward_length|_rank|kernel|_size|_dim", 1 << 22),
    (r"theta|freq_base|base|_id|_ids|seed", 1 << 53),
    (r"", 1 << 31),
)
# These must be there at least once each.
_POSITIVE = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|num_attention_heads|n_heads?|num_heads|hidden_size|d_model|n_embd"
    r"|vocab_size|block_count|embedding_length|head_count)"
)


def check_sizes(document: dict[str, Any], section: str = "config.json") -> None:
    """Raise FileFault, with name and value, for a number of layers, heads or features that no model has.

    ``document``: the content of a config.json, or the metadata of a GGUF file; sections are checked, too.
    """
    for key, value in document.items():
        name = str(key)
        if isinstance(value, dict):
            check_sizes(value, f"{section}, {name}")
            continue
        last = name.rpartition(".")[2]
        if _POSITIVE.fullmatch(last) and (isinstance(value, bool | str | float) or value == 0):
            raise FileFault(f"{section} says {name} {_short(value)}, which must be a whole number above 0")
        values = value if isinstance(value, list) else [value]
        greatest = next(most for ending, most in _GREATEST if re.search(rf"({ending})$", last))
        for one in values:
            if isinstance(one, int) and not isinstance(one, bool) and abs(one) > greatest:
                raise FileFault(f"{section} says {name} {_short(one)}; the most that is possible here is {greatest}")
        if isinstance(value, int) and value < 0 and _POSITIVE.fullmatch(last):
            raise FileFault(f"{section} says {name} {value}, which must be a whole number above 0")
    heads, shared = document.get("num_attention_heads"), document.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise FileFault(
            f"{section} says num_key_value_heads {shared}, which does not divide num_attention_heads {heads}"
        )


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "of thousands of digits"
    return text if len(text) <= 40 else f"{text[:36]}..."
