"""A KV cache that keeps the keys and values of some blocks in the student's bits, and those of the others as they
are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from lbllm.errors import ConfigError
from lbllm.microscope.pair import Pair
from lbllm.quant.kv_attention import attend_in_groups
from lbllm.quant.model_cache import KeepBits, kept_layers, leave_no_cache


def kept_bits(pair: Pair) -> tuple[str, KeepBits] | None:
    """The name of the module whose cache keeps the student's bits, and the hook that sees to it; None with 16 bits."""
    for name, module in pair.student.model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, KeepBits):
                return name, hook
    return None


def keep_bits_of(pair: Pair, made: PreTrainedModel, packed: Sequence[bool]) -> None:
    """Make a view of teacher or student keep the keys and values of the ``packed`` blocks in the student's bits, and of
    no other block."""
    known = kept_bits(pair)
    if known is None:
        return
    name, hook = known
    holder = made.get_submodule(name)
    release(holder)
    if any(packed):
        if hook.kv.in_groups:
            attend_in_groups(made)
        holder.register_forward_pre_hook(_KeepMixed(hook, packed), with_kwargs=True)
        holder.register_forward_hook(leave_no_cache, with_kwargs=True)


def release(holder: nn.Module) -> None:
    """Let a module of a view keep its cache as it comes."""
    for hooks in (holder._forward_pre_hooks, holder._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, KeepBits) or hook is leave_no_cache:
                del hooks[key]


class _KeepMixed:
    """``KeepBits`` for some of the blocks. No other layer forgets the tokens outside a sliding window: the mask leaves
    them out, and it needs all layers to hold the same tokens."""

    def __init__(self, hook: KeepBits, packed: Sequence[bool]) -> None:
        self.hook, self.packed = hook, packed
        self.kinds = list(map(type, self._layers()))

    def _layers(self) -> list[Any]:
        """The layers of an empty cache."""
        config = self.hook.config
        both = zip(kept_layers(config, self.hook.layer_class), DynamicCache(config=config).layers, strict=True)
        return [kept if one else _whole(usual) for one, (kept, usual) in zip(self.packed, both, strict=False)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments with a cache of these layers. Raises ConfigError for a cache that can't be one."""
        kwargs = dict(zip(self.hook.names, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs["past_key_values"] = DynamicCache()
        if list(map(type, cache.layers)) != self.kinds:
            if not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0:
                raise ConfigError("past_key_values keeps other bits than this hybrid; pass no cache, or an empty one")
            cache.layers, cache.layer_class_to_replicate = self._layers(), None
        return (), kwargs


def _whole(layer: Any) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return layer
