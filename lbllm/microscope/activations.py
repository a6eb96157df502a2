"""The inputs of a layer, and the keys and values of a block, on a text: how they are spread, and what 4 bits make of
them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from lbllm.chat.lens import pieces_of
from lbllm.errors import ConfigError
from lbllm.microscope.layer import relative_error
from lbllm.microscope.mixed_cache import kept_bits, release
from lbllm.microscope.pair import Pair, Side, Text
from lbllm.microscope.passes import Passes, view
from lbllm.quant.activations import ActivationGrid, ActQuantizer, Codes, decode
from lbllm.quant.kv_cache import KVFormat, decode_kv, encode_kv, fake_quant_kv
from lbllm.quant.kv_groups import GroupedKVLayer, fake_quant_text
from lbllm.quant.levels import group_length, spans
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import ACT_GROUP_SIZE, WHOLE_ROW
from lbllm.stages.aar import search_grid

_BINS = 64
_PEAKS = 8


@dataclass(frozen=True)
class Spread:
    """A histogram: ``counts`` (n) of the values between ``edges`` (n + 1)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Peak:
    """One of the largest inputs: its channel, its token (number and text), its value, and ``times``: how often the
    median of all absolute inputs."""

    channel: int
    token: int
    piece: str
    value: float
    times: float


@dataclass(frozen=True)
class Range:
    """The grid of one range of one token: channels ``first`` to ``last`` (included), the smallest and largest input,
    and all values of the grid, ascending."""

    first: int
    last: int
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Quantizer:
    """A quantizer of inputs, and what it does to these. ``size``: inputs per range. ``error``:
    ||X - X_q||^2 / ||X||^2. ``output_error``: the same of X W. ``ranges``: the grids of the token ``token``.
    ``name``: in words."""

    name: str
    bits: int
    tail: int
    size: int
    knee: float
    clip_low: float
    clip_high: float
    error: float
    output_error: float
    token: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class ActivationView:
    """The inputs X (T, in) of a layer on a text.

    ``inputs``: X, float32. ``maxima`` (in): the largest absolute input of each channel. ``peaks``: the largest inputs,
    one a channel. ``quantizer``: what the student's layer has, None if its inputs are not quantized. ``trials``: what 4
    bits would do with ranges of 64 inputs and with one range a token, with searched knees (``stages.aar.search_grid``).
    ``words``: a sentence that says which of them is in use.
    """

    block: int
    layer: str
    side: Side
    pieces: tuple[str, ...]
    inputs: Tensor
    spread: Spread
    maxima: tuple[float, ...]
    peaks: tuple[Peak, ...]
    quantizer: Quantizer | None
    trials: tuple[Quantizer, ...]
    words: str


@dataclass(frozen=True)
class CachePart:
    """Keys or values (heads, T, head_dim), float32, of a block: ``states``, and ``stored``, as the cache gives them
    back. ``maxima`` (heads, head_dim): the largest absolute value of each channel. ``error``: relative, squared.
    ``low`` and ``step``: the grids, value = low + step * code; (heads, T), one for each token and head, or for keys in
    groups (heads, groups, head_dim). ``head`` and ``token``: where the largest value is; ``grid``: all values that can
    be stored there, None in a cache with groups, where that may be a token in 16 bits."""

    states: Tensor
    stored: Tensor
    spread: Spread
    maxima: tuple[tuple[float, ...], ...]
    error: float
    low: Tensor
    step: Tensor
    head: int
    token: int
    grid: Range | None


@dataclass(frozen=True)
class CacheView:
    """Keys (with their rotation) and values of a block of the student. ``bits``: those of the cache. With 16, the parts
    show what 4 bits would do. ``words`` says so."""

    block: int
    bits: int
    pieces: tuple[str, ...]
    keys: CachePart
    values: CachePart
    words: str


def activations(
    pair: Pair, block: int, layer: str, text: Text, *, side: Side = "student", token: int | None = None
) -> ActivationView:
    """Return the inputs of a layer on a text, in the student or in the teacher. ``token``: whose grids to give; the
    default is the token with the largest input.

    Raises ConfigError for an unknown block, layer or token, or a layer that the block doesn't use; ModelError for a
    text with fewer than two tokens.
    """
    pair.check(block, layer)
    ids, _ = pair.ids(text)
    pieces = tuple(pieces_of(pair.tokenizer, ids[0].tolist()))
    if token is not None and not 0 <= token < len(pieces):
        raise ConfigError(f"there is no token {token}; this text has tokens 0 to {len(pieces) - 1}")
    inputs = layer_inputs_on(pair, side, ids, block, [layer])[layer]
    size = inputs.abs()
    chosen = int(size.amax(1).argmax()) if token is None else token
    student, weight = pair.layer("student", block, layer), pair.weight(block, layer)
    own = student.quantizer if isinstance(student, PackedLinear) else None
    tail = next(module.tail for module in pair.student.model.modules() if isinstance(module, PackedLinear))
    trials = []
    for ranges in (ACT_GROUP_SIZE, WHOLE_ROW):
        trial = ActQuantizer(4, tail, group_size=ranges).requires_grad_(False).to(inputs.device)
        search_grid(trial, inputs, weight)
        trials.append(_measure(trial, inputs, weight, chosen))
    quantizer = None if own is None else _measure(own, inputs, weight, chosen)
    return ActivationView(
        block,
        layer,
        side,
        pieces,
        inputs,
        _spread(inputs),
        tuple(size.amax(0).tolist()),
        _peaks(inputs, pieces),
        quantizer,
        tuple(trials),
        _words(layer, side, student, quantizer),
    )


def cache(pair: Pair, block: int, text: Text) -> CacheView:
    """Return keys and values of a block of the student on a text. Raises as ``activations``."""
    pair.check(block)
    ids, _ = pair.ids(text)
    known, made = pair.states("student", ids), view(pair.student.model)
    hooked = kept_bits(pair)
    kv = KVFormat(16)
    if hooked is not None:
        release(made.get_submodule(hooked[0]))
        kv = hooked[1].kv
    recorder = _Recorder(made.config, kv)
    if "past_key_values" in inspect.signature(made.forward).parameters:
        Passes(made, pair.path).until(ids, known, block, known.inputs[block], block + 1, past_key_values=recorder)
    if recorder.states is None:
        raise ConfigError(f"block {block} keeps no keys and values of its own; choose another block")
    words = f"The cache keeps keys and values in {kv.bits} bits, with a range for each token and head."
    if kv.bits == 16:
        words = "The cache keeps keys and values as they are (KV16). Shown is what 4 bits would make of them."
    if kv.in_groups:
        words = (
            f"The cache keeps keys and values in {kv.bits} bits: keys with a range for each channel over "
            f"{kv.group_size} tokens, values with one for each token. The first {kv.first} and those after the last "
            "whole group keep 16 bits. Shown is what the last token sees."
        )
        keys, values = _grouped_parts(recorder.states, kv)
    else:
        keys, values = (_cache_part(states[0].float(), 4 if kv.bits == 16 else kv.bits) for states in recorder.states)
    return CacheView(block, kv.bits, tuple(pieces_of(pair.tokenizer, ids[0].tolist())), keys, values, words)


def layer_inputs_on(pair: Pair, side: Side, ids: Tensor, block: int, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs (T, in), float32, of some linear layers of one block for token ids (1, T).

    Raises ConfigError for a layer that the block never calls.
    """
    known, made = pair.states(side, ids), view(pair.model(side))
    seen: dict[str, Tensor] = {}
    for name in layers:
        made.set_submodule(f"{pair.path}.{block}.{name}", _Watched(pair.layer(side, block, name), name, seen))
    Passes(made, pair.path).until(ids, known, block, known.inputs[block], block + 1)
    for name in layers:
        if name not in seen:
            raise ConfigError(f"block {block} never uses its layer {name} for this text; choose another layer")
    return seen


class _Watched(nn.Module):
    """A layer that notes the input of its first call under its name in ``seen``."""

    def __init__(self, layer: nn.Module, name: str, seen: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.name, self.seen = layer, name, seen

    def forward(self, x: Tensor) -> Any:
        """Return the layer's output."""
        self.seen.setdefault(self.name, x.detach().reshape(-1, x.shape[-1]).float())
        return self.layer(x)


class _Recorder(DynamicCache):
    """A cache that notes the keys and values of its first call, and gives them back as this format keeps them."""

    def __init__(self, config: PreTrainedConfig, kv: KVFormat) -> None:
        super().__init__(config=config)
        self.kv = kv
        self.states: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values (1, heads, T, head_dim)."""
        if self.states is None:
            self.states = key_states.detach(), value_states.detach()
        if self.kv.bits == 16:
            return key_states, value_states
        if self.kv.in_groups:
            return fake_quant_text(key_states, value_states, self.kv)
        return fake_quant_kv(key_states, self.kv.bits), fake_quant_kv(value_states, self.kv.bits)


@torch.no_grad()
def _measure(quantizer: ActQuantizer, inputs: Tensor, weight: Tensor, token: int) -> Quantizer:
    """What a quantizer makes of inputs (T, in) of a weight (out, in), with the grids of one token."""
    knee, low, high, bits, tail = quantizer.settings()
    rounded = quantizer(inputs)
    size = group_length(quantizer.group_size, inputs.shape[1])
    rows = inputs[token, None]
    grid = quantizer.grid(quantizer.ranges(rows)[0])
    ranges = []
    for number, columns in enumerate(spans(inputs.shape[1], quantizer.group_size)):
        own = ActivationGrid(*(part[number] for part in grid))
        bottom, top = rows[0, columns].aminmax()
        ranges.append(
            Range(columns.start, columns.stop - 1, float(bottom), float(top), grid_values(own, bits, quantizer.tail))
        )
    name = f"A{bits}, one range a token" if size == inputs.shape[1] else f"A{bits}, ranges of {size} inputs"
    output_error = relative_error(inputs @ weight.t(), rounded @ weight.t())
    error = relative_error(inputs, rounded)
    return Quantizer(name, bits, tail, size, knee, low, high, error, output_error, token, tuple(ranges))


def grid_values(grid: ActivationGrid, bits: int, tail: int) -> tuple[float, ...]:
    """Return all values of the grid of one range, ascending, each once."""
    steps = 2**bits - 1 - 2 * tail
    body = torch.arange(steps + 1, device=grid.body.device) - grid.zero
    beyond = torch.arange(1, tail + 1, device=grid.body.device)
    nothing = torch.zeros_like(body)
    codes = [Codes(body, nothing, nothing)]
    if tail:
        zero = torch.zeros_like(beyond)
        codes += [Codes(body[:1], beyond, zero), Codes(body[-1:], zero, beyond)]
    return tuple(sorted({value for one in codes for value in decode(one, grid).tolist()}))


def _spread(values: Tensor) -> Spread:
    low, high = (float(end) for end in values.aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, _BINS, low, high).long().tolist()
    return Spread(tuple(torch.linspace(low, high, _BINS + 1).tolist()), tuple(counts))


def _peaks(inputs: Tensor, pieces: tuple[str, ...]) -> tuple[Peak, ...]:
    size = inputs.abs()
    middle = float(size.median())
    largest, tokens = size.max(0)
    peaks = []
    for channel in largest.topk(min(_PEAKS, len(largest))).indices.tolist():
        token = int(tokens[channel])
        value = float(inputs[token, channel])
        times = abs(value) / middle if middle else math.inf
        peaks.append(Peak(channel, token, pieces[token], value, times))
    return tuple(peaks)


def _cache_part(states: Tensor, bits: int) -> CachePart:
    codes, scale = encode_kv(states, bits)
    low, step = scale.float().unbind(-1)
    part = _compared(states, decode_kv(codes, scale, torch.float32), low, step)
    bottom, top = states[part.head, part.token].aminmax()
    every = torch.arange(2**bits, dtype=torch.uint8, device=low.device)
    values = decode_kv(every, scale[part.head, part.token], torch.float32)
    return replace(part, grid=Range(0, states.shape[-1] - 1, float(bottom), float(top), tuple(values.tolist())))


def _grouped_parts(states: tuple[Tensor, Tensor], kv: KVFormat) -> tuple[CachePart, CachePart]:
    layer = GroupedKVLayer(kv)
    layer.update(states[0].float(), states[1].float())
    keys, values = layer.stores
    assert keys is not None
    assert values is not None
    low, step = keys[1][0].float().unbind(-2)
    token_low, token_step = values[1][0].float().unbind(-1)
    stored = [part[0] for part in layer.decoded()]
    return (
        _compared(states[0][0].float(), stored[0], low, step),
        _compared(states[1][0].float(), stored[1], token_low, token_step),
    )


def _compared(states: Tensor, stored: Tensor, low: Tensor, step: Tensor) -> CachePart:
    maxima = tuple(tuple(row) for row in states.abs().amax(1).tolist())
    _, tokens, width = states.shape
    head, token = divmod(int(states.abs().argmax()) // width, tokens)
    error = relative_error(states, stored)
    return CachePart(states, stored, _spread(states), maxima, error, low, step, head, token, None)


def _words(name: str, side: Side, student: nn.Module, quantizer: Quantizer | None) -> str:
    if side == "teacher":
        whose = "4 bits would" if quantizer is None else f"the student's quantizer ({quantizer.name}) would"
        return f"The teacher does not quantize the inputs of {name}. Shown is what {whose} make of them."
    if quantizer is not None:
        return f"The inputs of {name} are quantized: {quantizer.name}."
    why = "are not quantized (A16)" if isinstance(student, PackedLinear) else "are not quantized: the layer is dense"
    return f"The inputs of {name} {why}. Shown is what 4 bits would make of them."
