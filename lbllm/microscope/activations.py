"""The inputs of a layer, and the keys and values of a block, on a text: how they are spread, and what 4 bits make of
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lbllm.microscope.pair import Pair

Side = Literal["teacher", "student"]


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
    ``low`` and ``step`` (heads, T): the grid of each token and head, value = low + step * code."""

    states: Tensor
    stored: Tensor
    spread: Spread
    maxima: tuple[tuple[float, ...], ...]
    error: float
    low: Tensor
    step: Tensor


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
    pair: Pair,
    block: int,
    layer: str,
    text: str | Sequence[int] | Tensor,
    *,
    side: Side = "student",
    token: int | None = None,
) -> ActivationView:
    """Return the inputs of a layer on a text, in the student or in the teacher. ``token``: whose grids to give; the
    default is the token with the largest input.

    Raises ConfigError for an unknown block, layer or token, or a layer that this text never reaches; ModelError for a
    text with fewer than two tokens.
    """
    raise NotImplementedError


def cache(pair: Pair, block: int, text: str | Sequence[int] | Tensor) -> CacheView:
    """Return keys and values of a block of the student on a text. Raises as ``activations``."""
    raise NotImplementedError
