"""Activations in few bits: the piecewise 4-bit quantizer of stage 3, plain 8-bit, and the KV cache's quantizer.

Everything is dynamic, with ranges taken from each token, or from each group of so many inputs of a token: outliers then
cost no step but their neighbours'. (The paper has one range a token; ranges of groups are those of MX formats, Rouhani
et al. 2023.) The piecewise grid for one token or group x with knee rho and clips c-, c+:

    m = c- min(x, 0),  M = c+ max(x, 0)                  the clipped range, zero inside
    n = 2^bits - 1 - 2 t steps in the body, t steps for each tail
    s = rho (M - m) / n,   z = round(-rho m / s)         body: the values s (q - z), q = 0..n, zero exactly one of them
    L = -z s,  U = (n - z) s                             the body's edges
    s- = (L - m) / t,  s+ = (M - U) / t                  tails: L - s- j and U + s+ j, j = 1..t

so every token has 2^bits values (t less where all of its values have one sign), and  x_q = s b - s- j- + s+ j+  with
integers -z <= b <= n - z and 0 <= j-, j+ <= t: three integer planes, which a packed matmul can sum exactly. LBLLM gives
dense body and sparse tails step sizes of their own, split at a learned knee, trained through a temperature-scaled soft
mask; the exact grid is ours.

Gradients: straight through for x inside the clipped range; for the body's step as in LSQ (Esser et al. 2020), which
takes values as evenly spread over a step. A tail has few steps and thins out within each, and there LSQ's residual
shrinks the body far below its best size; so a value in a tail, or beyond, moves with its grid, its code held. For the
edges also through the soft mask sigmoid((U - x) / tau).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lbllm import kernels
from lbllm.binarize import float_mask, from_groups, group_length, to_groups
from lbllm.config import WHOLE_ROW

KNEE_RANGE = (0.02, 1.0)
CLIP_RANGE = (0.05, 1.0)


class Grid(NamedTuple):
    """One token's grid: steps of the body, the lower and the upper tail and the body's zero point, each (..., 1)."""

    body: Tensor
    low: Tensor
    high: Tensor
    zero: Tensor


def make_grid(x: Tensor, knee: Tensor, clip_low: Tensor, clip_high: Tensor, bits: int, tail: int) -> Grid:
    """The grid of each token of x (..., features); differentiable in the scalars knee, clip_low and clip_high."""
    steps = 2**bits - 1 - 2 * tail
    bottom = clip_low * x.detach().amin(-1, keepdim=True).clamp_max(0)
    top = clip_high * x.detach().amax(-1, keepdim=True).clamp_min(0)
    share = knee if tail else torch.ones_like(knee)
    body = (share * (top - bottom) / steps).clamp_min(1e-12)
    zero = (-share * bottom / body).detach().round()
    if not tail:
        return Grid(body, body, body, zero)
    low = (-zero * body - bottom).clamp_min(0) / tail
    high = (top - (steps - zero) * body).clamp_min(0) / tail
    return Grid(body, low, high, zero)


class Codes(NamedTuple):
    """The integers of quantized values: the body's b in [-z, n - z] and the tails' j-, j+ in [0, t]."""

    body: Tensor
    low: Tensor
    high: Tensor


def encode(x: Tensor, grid: Grid, bits: int, tail: int) -> Codes:
    """The codes of x (..., features) on its tokens' grids; a value in a tail sits on its body's edge plus j tail
    steps."""
    steps = 2**bits - 1 - 2 * tail
    bottom, top = -grid.zero, steps - grid.zero
    body = (x / grid.body).round_().clamp_(bottom, top)
    if not tail:
        empty = torch.zeros_like(body)
        return Codes(body, empty, empty)
    edge = body * grid.body
    low = (edge - x).div_(grid.low.clamp_min(1e-12)).round_().clamp_(0, tail).mul_(float_mask(torch.eq, body, bottom))
    high = (x - edge).div_(grid.high.clamp_min(1e-12)).round_().clamp_(0, tail).mul_(float_mask(torch.eq, body, top))
    return Codes(body, low, high)


def decode(codes: Codes, grid: Grid) -> Tensor:
    """The values that codes stand for: s b - s- j- + s+ j+."""
    return grid.body * codes.body - grid.low * codes.low + grid.high * codes.high


class _Compiled(torch.autograd.Function):
    """Quantize to the grids of knee and clips ``act`` (3,), each pass one operator of ``lbllm.kernels``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Tensor, bits: int, tail: int, tau: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = *act.tolist(), bits, tail
        ctx.tau = tau
        return torch.ops.lbllm.quantize_activations(x, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_x, by_act = torch.ops.lbllm.quantize_activations_backward(
            grads[0], *ctx.saved_tensors, *ctx.settings, ctx.tau
        )
        return by_x, by_act, None, None, None


class _FakeQuant(torch.autograd.Function):
    """The same on a grid that is made already, in PyTorch; gradients to x and to the grid's three steps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, body: Tensor, low: Tensor, high: Tensor, zero: Tensor, bits: int, tail: int, tau: float
    ) -> Tensor:
        grid = Grid(body, low, high, zero)
        codes = encode(x, grid, bits, tail)
        ctx.save_for_backward(x, *grid, *codes)
        ctx.settings = bits, tail, tau
        return decode(codes, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, body, low, high, zero, in_body, in_low, in_high = ctx.saved_tensors
        bits, tail, tau = ctx.settings
        steps = 2**bits - 1 - 2 * tail
        lower, upper = -zero * body, (steps - zero) * body
        if tail:
            # The largest value of an unclipped token is the range's end: inside, whichever way that end was rounded.
            bottom, top = lower - tail * low, upper + tail * high
            slack = 1e-5 * (top - bottom)
            inside, dense = _between(x, bottom - slack, top + slack), _between(x, lower, upper)
        else:
            # The rounded zero point moves the range by up to half a step; its ends are inside all the same.
            inside = dense = _between(x, lower - body / 2, upper + body / 2)
        # By the step: the code where it is held, the rounding residual inside the body.
        slope = torch.addcmul(in_body, x / body, dense, value=-1)
        if not tail:
            return grad * inside, torch.linalg.vecdot(grad, slope)[..., None], None, None, None, None, None, None
        # The soft mask: moving an edge hands values near it from the tail's grid to the body's.
        width = tau * body
        for edge, ratio, step, codes, sign in (
            (upper, steps - zero, high, in_high, 1.0),
            (lower, -zero, low, in_low, -1.0),
        ):
            away = x - edge
            mask = torch.sigmoid(away * (-sign / width))
            handed = torch.addcmul(body * in_body - edge, step, codes, value=-sign)
            near = _between(away, -(body + step), body + step)
            slope.addcmul_(handed.mul_(mask - mask * mask).mul_(near), sign * ratio / width)
        grad_body, grad_low, grad_high = (torch.linalg.vecdot(grad, d)[..., None] for d in (slope, in_low, in_high))
        return grad * inside, grad_body, -grad_low, grad_high, None, None, None, None


def _between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """1 where low <= x <= high and 0 elsewhere, in x's dtype."""
    return float_mask(torch.ge, x, low).mul_(float_mask(torch.le, x, high))


class ActQuantizer(nn.Module):
    """Dynamic fake quantization of a layer's input to ``bits`` (4: piecewise with ``tail`` steps a tail; 8: plain),
    with a range for each token or, where ``group_size`` says so, for so many of its features.

    Holds ``knee``, ``clip_low``, ``clip_high`` in one parameter ``act`` (3,), float32.
    """

    def __init__(self, bits: int, tail: int, temperature: float = 0.5, *, group_size: int = WHOLE_ROW) -> None:
        super().__init__()
        self.bits, self.temperature, self.group_size = bits, temperature, group_size
        self.tail = tail if bits == 4 else 0
        self.act = nn.Parameter(torch.tensor([0.3, 1.0, 1.0], dtype=torch.float32))
        # Layers that share an input share its quantizer: the last result is theirs, too, as long as the graph holds it.
        self._latest: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None

    @torch.no_grad()
    def bound(self) -> None:
        """Bring the parameters back into their ranges: past an end they would get no gradient and never return."""
        self.act[:1].clamp_(*KNEE_RANGE)
        self.act[1:].clamp_(*CLIP_RANGE)

    def settings(self) -> tuple[float, float, float, int, int]:
        """Knee, lower and upper clip within their ranges, bits and tail steps: what a kernel needs."""
        knee, low, high = self.act.tolist()
        low, high = (min(max(clip, CLIP_RANGE[0]), CLIP_RANGE[1]) for clip in (low, high))
        return min(max(knee, KNEE_RANGE[0]), KNEE_RANGE[1]), low, high, self.bits, self.tail

    def bounded(self) -> Tensor:
        """Knee, lower and upper clip (3,) within their ranges."""
        return torch.cat((self.act[:1].clamp(*KNEE_RANGE), self.act[1:].clamp(*CLIP_RANGE)))

    def ranges(self, x: Tensor) -> Tensor:
        """x (..., features) as (..., n, size), a row for each range; zeros fill the last one up and change no range."""
        return to_groups(x, group_length(self.group_size, x.shape[-1]))

    def deployed(self, x: Tensor, operator: Callable[..., Tensor]) -> Tensor:
        """``forward`` by a kernel's ``quantize_activations``, without gradients."""
        return from_groups(operator(self.ranges(x), *self.settings()), x.shape[-1])

    def grid(self, x: Tensor) -> Grid:
        """The grids of x (..., features), where all features share a range."""
        knee, clip_low, clip_high = self.bounded()
        return make_grid(x, knee, clip_low, clip_high, self.bits, self.tail)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features) on its grid, in x's dtype; computed in float32."""
        if torch.is_grad_enabled() and self._latest is not None and self._latest[0]() is x:
            latest = self._latest[1]()
            if latest is not None:
                return from_groups(latest, x.shape[-1])
        ranges = self.ranges(x)
        if x.device.type == "cpu" and x.dtype != torch.float64 and x.numel() > 0 and kernels.ready():
            quantized = _Compiled.apply(ranges, self.bounded(), self.bits, self.tail, self.temperature)
        else:
            value = ranges.float()
            quantized = _FakeQuant.apply(value, *self.grid(value), self.bits, self.tail, self.temperature)
            quantized = quantized.to(x.dtype)
        if quantized.requires_grad:  # not of what is returned: of a view the graph holds what it is a view of
            self._latest = weakref.ref(x), weakref.ref(quantized)
        return from_groups(quantized, x.shape[-1])


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _kv_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Minimum and step (..., 1) of each vector of x (..., head_dim): float32, of values that float16 holds exactly."""
    low, high = x.detach().float().aminmax(dim=-1, keepdim=True)
    low = low.half().float()
    return low, ((high - low) / (2**bits - 1)).half().float().clamp_min(2.0**-22)


def encode_kv(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys or values (..., head_dim) of each token and head to codes uint8 (..., head_dim) and (minimum, step)
    float16 (..., 2); in 16 bits to values float16 (..., head_dim) and nothing (..., 0)."""
    if bits == 16:
        end = torch.finfo(torch.float16).max
        return x.clamp(-end, end).half(), x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)
    low, step = _kv_grid(x, bits)
    codes = ((x.float() - low) / step).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), torch.cat((low, step), -1).half()


def decode_kv(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``encode_kv`` up to rounding."""
    if codes.dtype == torch.float16:
        return codes.to(dtype)
    scale = scale.float()
    return (codes.float() * scale[..., 1:] + scale[..., :1]).to(dtype)


def fake_quant_kv(x: Tensor, bits: int) -> Tensor:
    """``decode_kv(encode_kv(x))`` with straight-through gradients; per token and head, asymmetric over head_dim."""
    low, step = _kv_grid(x, bits)
    scaled = ((x.float() - low) / step).clamp(0, 2**bits - 1)
    return (_RoundThrough.apply(scaled) * step + low).to(x.dtype)


class TrainingCache:
    """Stands in for the KV cache while a block is trained: keeps nothing, returns keys and values as the cache would
    give them."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fake-quantized keys and values (batch, heads, tokens, head_dim)."""
        return fake_quant_kv(keys, self.bits), fake_quant_kv(values, self.bits)

    def get_seq_length(self, *args: Any) -> int:
        """Tokens before the present ones: none."""
        return 0


class TrainingKVLayer(DynamicLayer):
    """The same for a whole model: the KV cache of one layer that keeps nothing and gives back what it would hold."""

    bits = 4

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fake-quantized keys and values (batch, heads, tokens, head_dim)."""
        return fake_quant_kv(key_states, self.bits), fake_quant_kv(value_states, self.bits)


class PackedKVLayer(DynamicLayer):
    """The KV cache of one layer, stored in 4 bits (two codes a byte) or 8, with float16 minimum and step per token
    and head, or in 16 as float16."""

    bits = 4
    AHEAD = 64  # tokens to make room for when there is none left

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Codes and scales of keys and of values, with room for more tokens than the ``length`` so far.
        self.rooms: list[tuple[Tensor, Tensor] | None] = [None, None]
        self.length = 0

    @property
    def stores(self) -> list[tuple[Tensor, Tensor] | None]:
        """Codes and scales of the tokens so far, of keys and of values; None before the first token."""
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
        """Append states (batch, heads, new, head_dim); returns all of them, unpacked, in their dtype: in 16 bits the
        first ones as they were given."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        unpacked = []
        length = self.length + key_states.shape[-2]
        # In 16 bits a text read at once, whose cache nobody may ask for, is computed from the states as they are.
        exact = self.bits == 16 and self.length == 0
        for which, states in enumerate((key_states, value_states)):
            codes, scale = encode_kv(states, self.bits)
            if self.bits == 4:
                codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
                codes = codes[..., ::2] | (codes[..., 1::2] << 4)
            room = self._room(which, (codes, scale))
            for place, new in zip(room, (codes, scale), strict=True):
                place[..., self.length : length, :] = new
            codes, scale = (place[..., :length, :] for place in room)
            if self.bits == 4:
                codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., : self.head_dims[which]]
            unpacked.append(states if exact else decode_kv(codes, scale, self.dtype))
        self.length = length
        return unpacked[0], unpacked[1]

    def _room(self, which: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tensors of keys (0) or values (1), with room for as many tokens more as ``new`` has."""
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

    def next_token(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and scales of keys, codes and scales of values, with room for a token at ``length``: whoever writes it
        there counts ``length`` up. The cache holds tokens already."""
        parts: list[Tensor] = []
        for which, room in enumerate(self.rooms):
            assert room is not None
            if room[0].shape[-2] == self.length:
                room = self._room(which, (room[0][..., :1, :], room[1][..., :1, :]))
            parts += room
        return parts[0], parts[1], parts[2], parts[3]

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.rooms, self.length = [None, None], 0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rooms = [None if store is None else (change(store[0]), change(store[1])) for store in self.stores]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of a beam search."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end; counted as transformers does, by a negative number."""
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
        """Bytes that the stored codes and scales take."""
        return sum(part.nbytes for store in self.stores if store is not None for part in store)


class HalfKVLayer(PackedKVLayer):
    """The same in 16 bits, for models that decode by the operator which reads it."""

    bits = 16


def is_packed(cache: Cache) -> bool:
    """Whether the cache's layers are of the kinds above."""
    return issubclass(cache.layer_class_to_replicate or object, PackedKVLayer)
