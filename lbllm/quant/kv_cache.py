"""Quantize and store the KV cache: asymmetric, with one range per token and head.

KVFormat                                       how many bits, and which values share a range
PackedKVLayer, HalfKVLayer, TrainingKVLayer    the cache of one layer of a transformers cache
with_bits(kind, bits)                          the class of that kind which keeps so many bits

``lbllm.quant.kv_groups`` has the layers whose keys have ranges over groups of tokens; ``lbllm.quant.model_cache`` gives
layers to the cache of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from lbllm.errors import ConfigError
from lbllm.quant.activations import RoundThrough
from lbllm.sections import WHOLE_ROW, QuantConfig


@dataclass(frozen=True)
class KVFormat:
    """The format of a KV cache: ``bits`` of each value, and what shares a range.

    ``group_size``: -1, each token and head of keys and values has a range. Else keys have a range for each channel over
    so many tokens, and the ``first`` tokens and those after the last whole group stay in 16 bits
    (``lbllm.quant.kv_groups``).
    """

    bits: int
    group_size: int = WHOLE_ROW
    first: int = 0

    @classmethod
    def of(cls, quant: QuantConfig) -> Self:
        """The cache of a model in this format."""
        return cls(quant.kv_bits, quant.kv_group_size, quant.kv_first)

    @property
    def in_groups(self) -> bool:
        """Whether the keys have ranges over groups of tokens."""
        return self.bits < 16 and self.group_size != WHOLE_ROW

    def settled(self, position: int) -> int:
        """Of the tokens before ``position`` (0 is the first) those whose form no longer changes, as the token there
        sees them: the ``first`` ones and all whole groups."""
        return self.first + max(0, (position - self.first) // self.group_size) * self.group_size

    def bits_per_value(self, head_dim: int, tokens: int) -> float:
        """The bits that a key or value takes on average, with its ranges, when the cache holds so many tokens."""
        if not self.in_groups:
            return float(self.bits) + (32 / head_dim if self.bits < 16 else 0)
        groups = (self.settled(tokens - 1) - self.first) / tokens
        ranges = (32 / head_dim + 32 / self.group_size) / 2
        return 16 * (1 - groups) + (self.bits + ranges) * groups


def kv_grid(x: Tensor, bits: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Return minimum and step of x along ``dim``, which has length 1 then: float32, rounded to float16 values."""
    low, high = x.detach().float().aminmax(dim=dim, keepdim=True)
    low = low.half().float()
    return low, ((high - low) / (2**bits - 1)).half().float().clamp_min(2.0**-22)


def encode_kv(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Encode keys or values (..., head_dim): codes uint8 (..., head_dim) and (minimum, step) float16 (..., 2).

    With 16 bits the result is the values as float16 (..., head_dim) and an empty tensor (..., 0).
    """
    if bits == 16:
        end = torch.finfo(torch.float16).max
        return x.clamp(-end, end).half(), x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)
    low, step = kv_grid(x, bits)
    codes = ((x.float() - low) / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), torch.cat((low, step), -1).half()


def joined_codes(codes: Tensor, bits: int) -> Tensor:
    """Put two codes of 4 bits into a byte: (..., head_dim) to (..., ceil(head_dim / 2)); the even column is in the
    lower half. Codes of other bits stay."""
    if bits != 4:
        return codes
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def separate_codes(codes: Tensor, bits: int, head_dim: int) -> Tensor:
    """The inverse of ``joined_codes``."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :head_dim] if bits == 4 else codes


def decode_kv(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys or values of ``encode_kv``'s result, in ``dtype``; equal to the originals up to rounding."""
    if codes.dtype == torch.float16:
        return codes.to(dtype)
    scale = scale.float()
    return (codes.float() * scale[..., 1:] + scale[..., :1]).to(dtype)


def fake_quant_kv(x: Tensor, bits: int) -> Tensor:
    """Return ``decode_kv(encode_kv(x))`` for x (..., head_dim), with straight-through gradients."""
    if bits == 16:
        end = torch.finfo(torch.float16).max
        return x.clamp(-end, end).half().to(x.dtype)
    low, step = kv_grid(x, bits)
    scaled = ((x.float() - low) / step).clamp(0, 2**bits - 1)
    return (RoundThrough.apply(scaled) * step + low).to(x.dtype)


class TrainingCache:
    """Replaces the KV cache while a block is trained: stores nothing, returns keys and values rounded as the cache
    would."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def prepare(self, block: nn.Module) -> None:
        """Make a block read what this cache returns; called before the block runs."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return fake-quantized keys and values (batch, heads, tokens, head_dim)."""
        return fake_quant_kv(keys, self.bits), fake_quant_kv(values, self.bits)

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of earlier tokens: 0."""
        return 0

    # A block with a convolution or linear attention keeps states of these, too. There are no earlier ones here.

    def get_conv_state(self, *args: Any, **kwargs: Any) -> None:
        """Return None: no earlier token has left a state."""

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> None:
        """Return None: no earlier token has left a state."""

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Return False: no earlier token has left a state."""
        return False

    def is_recording_past(self, *args: Any, **kwargs: Any) -> bool:
        """Return False: no state is kept."""
        return False

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the states of all tokens, which are those of this call."""
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the states of all tokens, which are those of this call."""
        return recurrent_states


class TrainingKVLayer(DynamicLayer):
    """``TrainingCache`` as one layer of a transformers cache, to train a whole model."""

    bits = 4

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return fake-quantized keys and values (batch, heads, tokens, head_dim)."""
        return fake_quant_kv(key_states, self.bits), fake_quant_kv(value_states, self.bits)


class TrainingKV8Layer(TrainingKVLayer):
    """``TrainingKVLayer`` with 8 bits."""

    bits = 8


class PassingKVLayer(DynamicLayer):
    """A layer of a cache that keeps nothing and returns what it is given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values (batch, heads, tokens, head_dim)."""
        return key_states, value_states


class PackedKVLayer(DynamicLayer):
    """The KV cache of one layer, stored in 4 bits (two codes per byte), 8 bits or float16.

    With 4 and 8 bits, each token and head has a minimum and a step in float16. The states of a call get the gradient
    that they have in training; those of earlier calls are stored without one, so a call that would need it is refused.
    """

    bits: int = 4
    AHEAD = 64  # when the cache is full, allocate space for at least this many more tokens

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Codes and scales of keys and of values; they have space for more tokens than ``length``, the number so far.
        self.rooms: list[tuple[Tensor, Tensor] | None] = [None, None]
        self.length = 0
        self.followed = False  # whether a stored token's states were part of a graph

    @property
    def groups(self) -> tuple[int, int]:
        """Tokens of a group, and first tokens in 16 bits, for the decode operator; 0 and 0 without groups."""
        return 0, 0

    @property
    def stores(self) -> list[tuple[Tensor, Tensor] | None]:
        """Codes and scales of the tokens so far, for keys and for values; None before the first token."""
        return [
            None if room is None else (room[0][..., : self.length, :], room[1][..., : self.length, :])
            for room in self.rooms
        ]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype, device and sizes of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.head_dims = key_states.shape[-1], value_states.shape[-1]
        self.keys = self.values = key_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states (batch, heads, new, head_dim) and return the states of all tokens, decoded, in their dtype.

        With 16 bits, the first call returns the given states unchanged. Raises ConfigError if a gradient to the states
        of an earlier call is wanted.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        follows = self._follows(key_states, value_states)
        unpacked = []
        length = self.length + key_states.shape[-2]
        # With 16 bits the first call uses the exact states: a text that is read in one pass may never use its cache.
        exact = self.bits == 16 and self.length == 0
        for which, states in enumerate((key_states, value_states)):
            codes, scale = encode_kv(states.detach(), self.bits)
            codes = joined_codes(codes, self.bits)
            room = self._room(which, (codes, scale))
            for place, new in zip(room, (codes, scale), strict=True):
                place[..., self.length : length, :] = new
            stop = self.length if follows else length
            codes, scale = (place[..., :stop, :] for place in room)
            known = decode_kv(separate_codes(codes, self.bits, self.head_dims[which]), scale, self.dtype)
            if follows:
                known = torch.cat((known, fake_quant_kv(states, self.bits).to(self.dtype)), -2)
            unpacked.append(states if exact else known)
        self.length = length
        return unpacked[0], unpacked[1]

    def _follows(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Return whether new states are part of a graph. Raises ConfigError if a gradient to earlier ones is wanted."""
        follows = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if torch.is_grad_enabled() and self.followed and self.length:
            raise ConfigError(
                f"the KV cache keeps {self.bits} bits and no gradient, and the tokens in it were part of a graph; "
                "pass all tokens in one call, or call with torch.no_grad()"
            )
        self.followed = follows or (self.followed and self.length > 0)
        return follows

    def _room(self, which: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the tensors of keys (0) or values (1), with space for the tokens of ``new`` after the present ones."""
        room = self.rooms[which]
        needed = self.length + new[0].shape[-2]
        if room is None or room[0].shape[-2] < needed:
            capacity = needed + max(self.AHEAD, needed // 4)
            made = []
            for index, part in enumerate(new):
                place = part.new_empty(*part.shape[:-2], capacity, part.shape[-1])
                if room is not None:
                    place[..., : self.length, :] = room[index][..., : self.length, :]
                made.append(place)
            self.rooms[which] = room = made[0], made[1]
        return room

    def next_token(self) -> tuple[Tensor, ...]:
        """Return codes and scales of keys, then of values, with space for one token at index ``length``.

        The caller writes the token there and adds 1 to ``length``. The cache must hold at least one token.
        """
        parts: list[Tensor] = []
        for which, room in enumerate(self.rooms):
            assert room is not None
            if room[0].shape[-2] == self.length:
                room = self._room(which, (room[0][..., :1, :], room[1][..., :1, :]))
            parts += room
        return tuple(parts)

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self.length

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.rooms, self.length, self.followed = [None, None], 0, False

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rooms = [None if store is None else (change(store[0]), change(store[1])) for store in self.stores]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences ``beam_idx`` of a beam search."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end. As in transformers, the number is negative; a positive one raises ValueError."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self.length = max(0, self.length + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._map(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._map(lambda part: part[indices])

    def nbytes(self) -> int:
        """Return the size of the stored codes and scales in bytes."""
        return sum(part.nbytes for store in self.stores if store is not None for part in store)


class PackedKV8Layer(PackedKVLayer):
    """``PackedKVLayer`` with 8 bits."""

    bits = 8


class HalfKVLayer(PackedKVLayer):
    """``PackedKVLayer`` with 16 bits, for models that use the decode operator, which reads this layout."""

    bits = 16


KVLayer = type[PackedKVLayer] | type[TrainingKVLayer]
_EIGHT: dict[KVLayer, KVLayer] = {PackedKVLayer: PackedKV8Layer, TrainingKVLayer: TrainingKV8Layer}


def with_bits(kind: KVLayer, bits: int) -> KVLayer:
    """Return the class like ``kind``, PackedKVLayer or TrainingKVLayer, that keeps 4 or 8 bits.

    Each is a class of this module, so that caches and models can be pickled.
    """
    return {4: kind, 8: _EIGHT[kind]}[bits]
