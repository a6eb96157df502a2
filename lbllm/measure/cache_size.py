"""How much memory the KV cache of a model takes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from lbllm.quant.kv_cache import KVFormat

TOKENS = 2_048  # of a conversation, or the model's longest text if that is shorter


@dataclass(frozen=True)
class CacheSize:
    """The KV cache of ``tokens`` tokens: ``nbytes`` in all, and ``bits`` of a key or value on average, with its ranges
    and with what stays in 16 bits."""

    tokens: int
    nbytes: int
    bits: float


def cache_size(config: PreTrainedConfig, kv: KVFormat, tokens: int = TOKENS) -> CacheSize | None:
    """Return the size of the cache of a model; None for a model without one, or whose heads its config does not give.

    A cache of 16 bits is counted as such, also where it keeps float32.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    dim = getattr(text, "head_dim", None)
    if dim is None and heads is not None and getattr(text, "hidden_size", None) is not None:
        dim = text.hidden_size // text.num_attention_heads
    longest = getattr(text, "max_position_embeddings", None) or tokens
    layers = sum(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=config).layers)
    # Latent attention keeps other things than keys and values of heads.
    if not isinstance(heads, int) or not isinstance(dim, int) or not layers or hasattr(text, "kv_lora_rank"):
        return None
    count = min(tokens, longest)
    bits = kv.bits_per_value(dim, count)
    return CacheSize(count, round(2 * layers * heads * dim * count * bits / 8), bits)
