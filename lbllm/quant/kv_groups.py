"""A KV cache whose keys have a range for each channel over a group of tokens, and whose values have one for each token
(KIVI, Liu et al. 2024).

Some channels of the keys are large in all tokens. With a range per token they make the steps of all channels coarse;
with a range per channel they cost nothing. A range of a channel is known when its group of tokens is whole, so tokens
stay in 16 bits, keys and values, until then. The first tokens always do: their keys are of another size (attention
sinks, Xiao et al. 2024), and would widen every range of their group.

What a token sees of the others depends on its position alone (``KVFormat.settled``), never on how many tokens a call
has. So a text that is read in one pass gives the output that it has token by token; ``lbllm.quant.kv_attention`` lets
the tokens of one call see different states.

GroupedKVLayer, TrainingGroupedKVLayer    the cache of one layer of a transformers cache
training_cache                            what replaces the cache while a block is trained
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from lbllm.quant.activations import RoundThrough
from lbllm.quant.kv_attention import Seen, attend_in_groups, check_read, mark
from lbllm.quant.kv_cache import (
    KVFormat,
    PackedKVLayer,
    TrainingCache,
    decode_kv,
    encode_kv,
    fake_quant_kv,
    joined_codes,
    kv_grid,
    separate_codes,
)


def encode_keys(x: Tensor, kv: KVFormat) -> tuple[Tensor, Tensor]:
    """Encode the keys of whole groups (..., n G, head_dim): codes uint8 of that shape, and minimum and step of each
    channel in each group, float16 (..., n, 2, head_dim)."""
    groups = x.unflatten(-2, (-1, kv.group_size))
    low, step = kv_grid(groups, kv.bits, dim=-2)
    codes = ((groups.float() - low) / step).round().clamp(0, 2**kv.bits - 1)
    return codes.to(torch.uint8).flatten(-3, -2), torch.cat((low, step), -2).half()


def decode_keys(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys of ``encode_keys``'s result, in ``dtype``."""
    scale = scale.float()
    groups = codes.unflatten(-2, (scale.shape[-3], -1)).float()
    return (groups * scale[..., 1:, :] + scale[..., :1, :]).to(dtype).flatten(-3, -2)


def fake_quant_keys(x: Tensor, kv: KVFormat) -> Tensor:
    """Return ``decode_keys(encode_keys(x))`` for x (..., n G, head_dim), with straight-through gradients."""
    groups = x.unflatten(-2, (-1, kv.group_size))
    low, step = kv_grid(groups, kv.bits, dim=-2)
    scaled = ((groups.float() - low) / step).clamp(0, 2**kv.bits - 1)
    return (RoundThrough.apply(scaled) * step + low).to(x.dtype).flatten(-3, -2)


def fake_quant_text(keys: Tensor, values: Tensor, kv: KVFormat) -> tuple[Tensor, Tensor]:
    """Return the keys and values (batch, heads, T, head_dim) of a whole text as its tokens see them, with
    straight-through gradients; only ``attention_in_groups`` can read them if T is more than a group."""
    keys, values = fake_quant_kv(keys, 16), fake_quant_kv(values, 16)
    settled = kv.settled(keys.shape[-2] - 1)
    if settled == kv.first:
        return keys, values
    first, groups = slice(kv.first), slice(kv.first, settled)
    kept_keys = torch.cat((keys[..., first, :], fake_quant_keys(keys[..., groups, :], kv)), -2)
    kept_values = torch.cat((values[..., first, :], fake_quant_kv(values[..., groups, :], kv.bits)), -2)
    return mark(keys, Seen(kept_keys, kept_values, 0, kv)), values


class TrainingGroupedCache(TrainingCache):
    """``TrainingCache`` with ranges of the keys over groups of tokens."""

    def __init__(self, kv: KVFormat) -> None:
        super().__init__(kv.bits)
        self.kv = kv
        self.seen: Seen | None = None

    def prepare(self, block: nn.Module) -> None:
        """Let the block's attention see the last tokens in 16 bits. Raises ConfigError if it can't."""
        attend_in_groups(block)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return fake-quantized keys and values (batch, heads, tokens, head_dim). Raises ConfigError if the block's
        attention did not read those of the last call."""
        check_read(self.seen)
        keys, values = fake_quant_text(keys, values, self.kv)
        self.seen = Seen.of(keys)
        return keys, values


def training_cache(kv: KVFormat) -> TrainingCache | None:
    """Return what replaces the KV cache while a block is trained; None with 16 bits."""
    if kv.bits == 16:
        return None
    return TrainingGroupedCache(kv) if kv.in_groups else TrainingCache(kv.bits)


class TrainingGroupedKVLayer(DynamicLayer):
    """Keeps nothing, and returns keys and values of a whole text as a ``GroupedKVLayer`` would, to train a model."""

    def __init__(self, kv: KVFormat, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kv, self.bits = kv, kv.bits
        self.seen: Seen | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return fake-quantized keys and values (batch, heads, tokens, head_dim)."""
        keys, values = fake_quant_text(key_states, value_states, self.kv)
        self.seen = Seen.of(keys)
        return keys, values


class GroupedKVLayer(PackedKVLayer):
    """The KV cache of one layer: codes of 4 bits (two in a byte) or 8 bits of the whole groups, float16 of the others.

    ``rooms`` have the tokens of groups: codes of the keys, and (batch, heads, groups, 2, head_dim) with minimum and
    step of each channel in each group; codes of the values with minimum and step of each token. ``halves``: keys and
    values (batch, heads, first + G, head_dim) of the first tokens and, after them, of the unfinished group, which also
    is the last one when it is whole: it is encoded when the next token comes.
    """

    def __init__(self, kv: KVFormat, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kv, self.bits = kv, kv.bits
        self.halves: list[Tensor] = []
        self.seen: Seen | None = None

    @property
    def encoded(self) -> int:
        """The number of tokens in groups that are encoded."""
        return self.kv.settled(self.length - 1) - self.kv.first

    @property
    def groups(self) -> tuple[int, int]:
        """Tokens of a group, and first tokens in 16 bits, for the decode operator."""
        return self.kv.group_size, self.kv.first

    @property
    def stores(self) -> list[tuple[Tensor, Tensor] | None]:
        """Codes and scales of the encoded tokens, for keys and for values; None before the first token."""
        if not self.halves:
            return [None, None]
        parts = zip(self.rooms, (self.kv.group_size, 1), strict=True)
        return [
            (room[0][..., : self.encoded, :], room[1].narrow(2, 0, self.encoded // tokens))
            for room, tokens in parts
            if room is not None
        ]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype, device and sizes of the first states, and make room for those in 16 bits."""
        super().lazy_initialization(key_states, value_states)
        space = self.kv.first + self.kv.group_size
        self.halves = [
            states.new_zeros(*states.shape[:2], space, states.shape[-1], dtype=torch.float16)
            for states in (key_states, value_states)
        ]
        self.rooms = [self._made(0, 0), self._made(1, 0)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states (batch, heads, new, head_dim) and return the states of all tokens, in their dtype. If the new
        tokens see them in different states, ``attention_in_groups`` alone can read the keys.

        Raises ConfigError if a gradient to the states of an earlier call is wanted.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._follows(key_states, value_states)
        start, total = self.length, self.length + key_states.shape[-2]
        before, after = self.kv.settled(start - 1), self.kv.settled(total - 1)
        known = [
            torch.cat((old, fake_quant_kv(states, 16).to(self.dtype)), -2)
            for old, states in zip(self.decoded(), (key_states, value_states), strict=True)
        ]
        kept = known
        if after > before:
            whole = [states[..., before:after, :] for states in known]
            self._encode(before - self.kv.first, [states.detach() for states in whole])
            groups = fake_quant_keys(whole[0], self.kv), fake_quant_kv(whole[1], self.bits)
            kept = [
                torch.cat((states[..., :before, :], group), -2) for states, group in zip(known, groups, strict=True)
            ]
        for half, states in zip(self.halves, known, strict=True):
            half[..., start : min(total, self.kv.first), :] = states[..., start : self.kv.first, :].detach()
            half[..., self.kv.first : self.kv.first + max(0, total - after), :] = states[..., after:, :].detach()
        self.length = total
        self.seen = None
        if self.kv.settled(start) < after:
            self.seen = Seen(kept[0], kept[1], start, self.kv)
            return mark(known[0], self.seen), known[1]
        if after > before:
            known = [torch.cat((old, states[..., after:, :]), -2) for old, states in zip(kept, known, strict=True)]
        return known[0], known[1]

    def decoded(self) -> list[Tensor]:
        """Return the keys and values of all tokens so far, as the last of them sees them."""
        first, count = self.kv.first, self.encoded
        recent = slice(first, first + max(0, self.length - first - count))
        found = []
        for which, half in enumerate(self.halves):
            parts = [half[..., : min(first, self.length), :].to(self.dtype)]
            if count:
                parts.append(self._groups(which, 0, count))
            found.append(torch.cat((*parts, half[..., recent, :].to(self.dtype)), -2))
        return found

    def _groups(self, which: int, start: int, stop: int) -> Tensor:
        """The keys (0) or values (1) of encoded tokens; ``start`` and ``stop`` are counted from the first group, and
        are at the edges of groups."""
        room = self.rooms[which]
        assert room is not None
        codes = separate_codes(room[0][..., start:stop, :], self.bits, self.head_dims[which])
        if which == 0:
            size = self.kv.group_size
            return decode_keys(codes, room[1][..., start // size : stop // size, :, :], self.dtype)
        return decode_kv(codes, room[1][..., start:stop, :], self.dtype)

    def _encode(self, start: int, states: list[Tensor]) -> None:
        """Keep keys and values of whole groups, from token ``start`` of the groups on."""
        stop, size = start + states[0].shape[-2], self.kv.group_size
        for which, (codes, scale) in enumerate((encode_keys(states[0], self.kv), encode_kv(states[1], self.bits))):
            room = self._room_for(which, stop)
            room[0][..., start:stop, :] = joined_codes(codes, self.bits)
            span = slice(start, stop) if which else slice(start // size, stop // size)
            room[1][:, :, span] = scale

    def _made(self, which: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Space for the keys (0) or values (1) of groups of so many ``tokens``."""
        half, size = self.halves[which], self.kv.group_size
        ahead = max(self.AHEAD, tokens // 4)
        tokens += -(-ahead // size) * size
        dim = half.shape[-1]
        ranges = (tokens, 2) if which else (tokens // size, 2, dim)
        codes = half.new_empty(*half.shape[:2], tokens, -(-dim * self.bits // 8), dtype=torch.uint8)
        return codes, half.new_empty(*half.shape[:2], *ranges)

    def _room_for(self, which: int, tokens: int) -> tuple[Tensor, Tensor]:
        room = self.rooms[which]
        assert room is not None
        if room[0].shape[-2] < tokens:
            made = self._made(which, tokens)
            for new, old in zip(made, room, strict=True):
                new[:, :, : old.shape[2]] = old
            self.rooms[which] = room = made
        return room

    def next_token(self) -> tuple[Tensor, ...]:
        """Return codes and scales of keys, then of values, with space for the group that the next token may end, then
        the keys and the values in float16.

        The caller writes the token and adds 1 to ``length``. The cache must hold at least one token.
        """
        stop = self.kv.settled(self.length) - self.kv.first
        return (*self._room_for(0, stop), *self._room_for(1, stop), *self.halves)

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.halves, self.seen = [], None
        self.is_initialized = False

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.halves:
            self.halves = [change(half) for half in self.halves]
            self.rooms = [None if room is None else (change(room[0]), change(room[1])) for room in self.rooms]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, as in transformers: the number is negative. Where this ends inside an encoded
        group, what is left of the group goes back to 16 bits, as rounded as it was, until the group is whole again."""
        before = self.encoded
        super().crop(tokens_to_remove)
        start = self.encoded
        left = self.length - self.kv.first - start
        if start < before and left > 0:
            for which, half in enumerate(self.halves):
                group = self._groups(which, start, start + self.kv.group_size)
                half[..., self.kv.first : self.kv.first + left, :] = group[..., :left, :].half()

    def nbytes(self) -> int:
        """Return the size of the codes, scales and float16 values in bytes."""
        return super().nbytes() + sum(half.nbytes for half in self.halves)
