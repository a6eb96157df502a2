"""Attention whose tokens see the KV cache in different states, though they are in one call.

With ranges over groups of tokens (``lbllm.quant.kv_groups``) a token sees the last tokens before it in 16 bits and the
whole groups before those in few bits. In a prompt, or in training, each group of tokens sees other groups, and so the
cache gives both forms of the keys and values. The attention function that is registered here reads them. Keys that no
such cache gives go to transformers' own function unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lbllm.config import setting_name
from lbllm.errors import ConfigError

if TYPE_CHECKING:
    from lbllm.quant.kv_cache import KVFormat

NAME = "lbllm_groups"
_MARK = "lbllm_seen"


class Seen:
    """The other form of a call's keys and values (batch, heads, n, head_dim): the first n tokens as they are when their
    groups are whole. ``start``: the number of tokens before this call."""

    def __init__(self, keys: Tensor, values: Tensor, start: int, kv: KVFormat) -> None:
        self.start, self.kv = start, kv
        self._states: tuple[Tensor, Tensor] | None = (keys, values)

    @staticmethod
    def of(keys: Tensor) -> Seen | None:
        """What ``mark`` has added to these keys."""
        return getattr(keys, _MARK, None)

    @property
    def read(self) -> bool:
        """Whether attention has read the states."""
        return self._states is None

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the states, and keep them no longer: a cache has one such object for each block."""
        assert self._states is not None
        states, self._states = self._states, None
        return states


def mark(keys: Tensor, seen: Seen) -> Tensor:
    """Return the keys with their other form, which ``attention_in_groups`` finds."""
    setattr(keys, _MARK, seen)
    return keys


def check_read(seen: Seen | None) -> None:
    """Raise ConfigError if attention did not read the other form: it then saw more bits than the cache keeps."""
    if seen is not None and not seen.read:
        raise _not_read()


def _not_read() -> ConfigError:
    return ConfigError(
        "the model's attention does not read a KV cache with ranges over groups of tokens. Load the model with "
        f'attn_implementation="sdpa", or call model.set_attn_implementation("{NAME}"); a run can set '
        f"{setting_name('quant.kv_group_size')} to -1"
    )


def attention_in_groups(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute causal attention as an attention function of transformers: returns (batch, T, heads, head_dim) and None.

    Each group of queries is a call of PyTorch's operator over the keys and values as it sees them.
    """
    seen = Seen.of(key)
    if seen is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise ConfigError(
            "attention has a bias for positions, which a KV cache with ranges over groups of tokens does not know; set "
            f"{setting_name('quant.kv_group_size')} to -1"
        )
    kept = seen.take()
    total, begin, outputs = key.shape[-2], seen.start, []
    while begin < total:
        settled = seen.kv.settled(begin)
        end = min(total, settled + seen.kv.group_size)
        keys, values = (
            torch.cat((whole[..., :settled, :], states[..., settled:end, :]), -2)
            for whole, states in zip(kept, (key, value), strict=True)
        )
        rows = slice(begin - seen.start, end - seen.start)
        if attention_mask is None:
            places = torch.arange(end, device=key.device)
            mask = (places[None, :] <= places[begin:, None])[None, None]
        else:
            mask = attention_mask[..., rows, :end]
        outputs.append(sdpa_attention_forward(module, query[..., rows, :], keys, values, mask, **options)[0])
        begin = end
    return torch.cat(outputs, 1), None


def attend_in_groups(model: nn.Module) -> None:
    """Let a model use ``attention_in_groups`` in place of PyTorch's operator. Raises ConfigError for a model that uses
    neither."""
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    for config in configs:
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME
    if not any(getattr(config, "_attn_implementation", None) == NAME for config in configs):
        raise _not_read()


AttentionInterface.register(NAME, attention_in_groups)
AttentionMaskInterface.register(NAME, sdpa_mask)
