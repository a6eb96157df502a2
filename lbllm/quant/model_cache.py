"""The cache of a whole model: layers that keep keys and values in few bits, whoever makes the cache.

KeepBits, leave_no_cache    hooks of a decoder
kept_layers                 the layers of an empty cache; those of a hybrid model also keep states of convolutions or of
                            linear attention, which stay as transformers keeps them
passing_cache               a cache that keeps nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from lbllm.config import setting_name
from lbllm.errors import ConfigError
from lbllm.quant.kv_attention import check_read
from lbllm.quant.kv_cache import (
    KVFormat,
    KVLayer,
    PackedKV8Layer,
    PackedKVLayer,
    PassingKVLayer,
    TrainingKV8Layer,
    TrainingKVLayer,
    with_bits,
)
from lbllm.quant.kv_groups import GroupedKVLayer, TrainingGroupedKVLayer


@dataclass(frozen=True)
class GroupedLayers:
    """Makes layers of a cache whose keys have ranges over groups of tokens; ``training``: those that keep nothing."""

    kv: KVFormat
    training: bool = False

    @property
    def bits(self) -> int:
        """Bits of a key or value in a group."""
        return self.kv.bits

    def __call__(self) -> GroupedKVLayer | TrainingGroupedKVLayer:
        """Return an empty layer."""
        return TrainingGroupedKVLayer(self.kv) if self.training else GroupedKVLayer(self.kv)

    def hybrid(self, number_of_states: int) -> _Hybrid:
        """Return an empty layer that has other states, too."""
        kind = TrainingHybridGroupedKVLayer if self.training else HybridGroupedKVLayer
        return kind(self.kv, number_of_states=number_of_states)


KVMaker = KVLayer | GroupedLayers  # makes a layer with keys and values


class _Hybrid(LinearAttentionLayer):
    """A layer with both: states of linear attention, and keys and values in a layer of the class ``attention``."""

    is_compileable = False  # the keys and values grow
    attention: ClassVar[type[DynamicLayer]]

    def __init__(self, *formats: KVFormat, number_of_states: int = 1, **kwargs: Any) -> None:
        self.attention.__init__(self, *formats, **kwargs)  # type: ignore[arg-type]
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for keys and values (two tensors by position), or for a state (by name)."""
        if args:
            self.attention.lazy_initialization(self, *args)  # type: ignore[arg-type]
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Empty the cache."""
        LinearAttentionLayer.reset(self)
        self.attention.reset(self)  # type: ignore[arg-type]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Select the sequences ``beam_idx`` of a beam search."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, as in transformers."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.crop(self, tokens_to_remove)  # type: ignore[arg-type]


class HybridKVLayer(_Hybrid, PackedKVLayer):  # type: ignore[misc, override]
    """``PackedKVLayer`` beside other states."""

    attention = PackedKVLayer


class HybridKV8Layer(_Hybrid, PackedKV8Layer):  # type: ignore[misc, override]
    """``HybridKVLayer`` with 8 bits."""

    attention = PackedKV8Layer


class TrainingHybridKVLayer(_Hybrid, TrainingKVLayer):  # type: ignore[misc, override]
    """``TrainingKVLayer`` beside other states."""

    attention = TrainingKVLayer


class TrainingHybridKV8Layer(_Hybrid, TrainingKV8Layer):  # type: ignore[misc, override]
    """``TrainingHybridKVLayer`` with 8 bits."""

    attention = TrainingKV8Layer


class HybridGroupedKVLayer(_Hybrid, GroupedKVLayer):  # type: ignore[misc, override]
    """``GroupedKVLayer`` beside other states."""

    attention = GroupedKVLayer


class TrainingHybridGroupedKVLayer(_Hybrid, TrainingGroupedKVLayer):  # type: ignore[misc, override]
    """``TrainingGroupedKVLayer`` beside other states."""

    attention = TrainingGroupedKVLayer


_HYBRID: dict[KVLayer, type[_Hybrid]] = {
    PackedKVLayer: HybridKVLayer,
    PackedKV8Layer: HybridKV8Layer,
    TrainingKVLayer: TrainingHybridKVLayer,
    TrainingKV8Layer: TrainingHybridKV8Layer,
}


def kv_maker(kv: KVFormat, *, training: bool = False) -> KVMaker:
    """Return what makes a layer of a cache with less than 16 bits; ``training``: one that keeps nothing and has
    gradients. All can be pickled."""
    if not kv.in_groups:
        return with_bits(TrainingKVLayer if training else PackedKVLayer, kv.bits)
    return GroupedLayers(kv, training)


def kept_layers(
    config: PreTrainedConfig, kind: KVMaker
) -> list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer]:
    """Return the layers of an empty cache of a model: those with keys and values are of ``kind``.

    Raises ConfigError for a layer of a kind that is not known.
    """
    return [_kept(layer, kind) for layer in DynamicCache(config=config).layers]


def _kept(layer: Any, kind: KVMaker) -> Any:
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return kind()
    if type(layer) in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        if isinstance(kind, GroupedLayers):
            return kind.hybrid(layer.number_of_states)
        return _HYBRID[kind](number_of_states=layer.number_of_states)
    if type(layer) in (LinearAttentionLayer, DummyLayer):
        return layer
    raise ConfigError(
        f"a layer of the model's cache is a {type(layer).__name__}, of which it is not known what it keeps; set "
        f"{setting_name('quant.kv_bits')} to 16"
    )


def keeps_attention_alone(config: PreTrainedConfig) -> bool:
    """Return whether the cache of a model has keys and values alone: no state of convolutions or linear attention."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def passing_cache() -> DynamicCache:
    """Return an empty cache that keeps nothing, unless the model has one of its own kind (``KeepBits``); for models of
    ``keeps_attention_alone``.

    Without a cache, transformers looks at the positions whether several texts are packed into one row, and a GPU waits
    for the answer.
    """
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [], PassingKVLayer
    return cache


class KeepBits:
    """A forward pre-hook of a decoder: its KV cache keeps its entries in layers that ``layer_class`` makes.

    ``names`` are the parameters of the decoder's forward, in order; ``config`` is that of the model. Raises ConfigError
    for a cache with layers of a kind that is not known.
    """

    def __init__(self, layer_class: KVMaker, names: Sequence[str], config: PreTrainedConfig) -> None:
        self.layer_class, self.names, self.config = layer_class, list(names), config
        self.alone = keeps_attention_alone(config)
        kept_layers(config, layer_class)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with a cache that keeps the bits. Raises ConfigError for a cache that can't."""
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        if cache is None:
            # Attention reads what the cache returns, so a pass without a cache needs one, too.
            kwargs["past_key_values"] = self._fill(DynamicCache())
        elif not is_packed(cache):
            if not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0:
                bits = self.layer_class.bits
                raise ConfigError(
                    f"past_key_values is a {type(cache).__name__} that does not keep {bits} bits, and this model does; "
                    "pass no cache, or an empty DynamicCache"
                )
            # In place, since the caller keeps its own reference to the cache it made.
            self._fill(cache)
        return (), kwargs

    @property
    def kv(self) -> KVFormat:
        """The format of the cache."""
        made = self.layer_class
        return made.kv if isinstance(made, GroupedLayers) else KVFormat(made.bits)

    def _fill(self, cache: DynamicCache) -> DynamicCache:
        """Give an empty cache its layers; where there are keys and values alone, it makes them itself."""
        if self.alone and not isinstance(self.layer_class, GroupedLayers):
            cache.layers, cache.layer_class_to_replicate = [], self.layer_class
        else:
            cache.layers, cache.layer_class_to_replicate = kept_layers(self.config, self.layer_class), None
        return cache


def leave_no_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A forward hook of a decoder: without ``use_cache`` the output holds no cache.

    A caller without a cache feeds all tokens again, so the next pass must not get the cache of this one. Raises
    ConfigError if attention did not read the cache as it keeps it.
    """
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        check_read(getattr(layer, "seen", None))
    if kwargs.get("use_cache") is False and getattr(output, "past_key_values", None) is not None:
        output.past_key_values = None


def is_packed(cache: Cache) -> bool:
    """Return whether the cache keeps keys and values in layers of ``PackedKVLayer`` or a subclass."""
    kinds = [cache.layer_class_to_replicate, *map(type, cache.layers)]
    return any(issubclass(kind or object, PackedKVLayer) for kind in kinds)
