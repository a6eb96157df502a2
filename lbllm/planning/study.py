"""What was measured of a model, as data: the cost of each layer in each format, formats for the whole model, and how
the divergence of any choice of formats is predicted from both."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lbllm.errors import ConfigError
from lbllm.measure.sensitivity import Option, Sensitivity
from lbllm.planning.candidates import format_words, weight_format
from lbllm.quant.plan import layer_bits
from lbllm.sections import LayerFormat

# Of the cost of a layer's weight, this part is what layers of its kind cost in so many blocks before and after it, with
# its own: a share on little text is noisy, and layers with a share that is too low would get too few bits.
POOLED, AROUND = 0.5, 2
LEAST = 0.1  # of the mean cost of a weight: what any weight costs at least


class Layer(BaseModel):
    """A layer by its full name. ``share``: what it contributes to the divergence of a model in the reference format,
    in nats per token; ``errors``: its error in each of the study's formats, as a share of that in the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str
    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    share: float
    errors: tuple[float, ...]


class Measured(BaseModel):
    """A model that was measured: its ``formats`` layer by layer, as numbers in the study's formats, or one for all
    layers; ``kl``: mean KL to the teacher on the study's own text after stage 1, in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    formats: tuple[int, ...]
    kl: float = Field(gt=0)


class Study(BaseModel):
    """The measurements for one teacher, text and settings. ``facts``: what they depend on, for people and as a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    facts: dict[str, Any]
    formats: tuple[LayerFormat, ...]
    layers: tuple[Layer, ...]
    measured: tuple[Measured, ...] = ()

    def with_measured(self, formats: Sequence[int], kl: float) -> Study:
        """The study with one more measured model."""
        return self.model_copy(update={"measured": (*self.measured, Measured(formats=tuple(formats), kl=kl))})

    def known(self, formats: Sequence[int]) -> float | None:
        """The measured divergence of a choice of formats; None if it was not measured."""
        wanted = self.each(formats)
        return next((one.kl for one in self.measured if self.each(one.formats) == wanted), None)

    def number(self, fmt: LayerFormat) -> int:
        """The number of a format. Raises ConfigError for one that was not studied."""
        plain = weight_format(fmt)
        if plain not in self.formats:
            raise ConfigError(f"{format_words(plain)}: this format was not measured; measure again with these settings")
        return self.formats.index(plain)

    @cached_property
    def sensitivities(self) -> list[Sensitivity]:
        """The layers with bits and cost in every format."""
        found = []
        for layer, share in zip(self.layers, pooled(self.layers), strict=True):
            options = tuple(
                Option(fmt, layer_bits(fmt, layer.rows, layer.columns), share * error)
                for fmt, error in zip(self.formats, layer.errors, strict=True)
            )
            found.append(Sensitivity(layer.name, layer.rows * layer.columns, options))
        return found

    def cost(self, formats: Sequence[int]) -> float:
        """The sum of the layers' costs in a choice of formats."""
        return sum(one.options[k].rise for one, k in zip(self.sensitivities, self.each(formats), strict=True))

    def bits(self, formats: Sequence[int]) -> float:
        """Bits per weight of a choice of formats."""
        found = self.sensitivities
        used = sum(one.options[k].bits for one, k in zip(found, self.each(formats), strict=True))
        return used / sum(one.weights for one in found)

    def predict(self, cost: float) -> float:
        """The divergence of a model whose layers' costs add up to ``cost``, from the formats for the whole model that
        were measured: a power law between two neighbours, and the nearest one beyond the ends."""
        return _interpolated(self._curve(), cost)

    def _curve(self) -> list[tuple[float, float]]:
        """Cost and divergence of the formats for the whole model, both ascending."""
        uniform = [one for one in self.measured if len(one.formats) == 1]
        points = sorted((self.cost(one.formats), one.kl) for one in uniform)
        return monotone(points)

    def each(self, formats: Sequence[int]) -> tuple[int, ...]:
        """A choice of formats layer by layer, also where it is one for all."""
        return tuple(formats) * len(self.layers) if len(formats) == 1 else tuple(formats)


def pooled(layers: Sequence[Layer]) -> list[float]:
    """The layers' shares, each drawn towards those of the same kind in the blocks around it; none is near zero."""
    mean = sum(layer.share for layer in layers) / sum(layer.rows * layer.columns for layer in layers)
    kinds: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(number)
    found = [0.0] * len(layers)
    for same in kinds.values():
        for place, number in enumerate(same):
            near = [layers[k] for k in same[max(0, place - AROUND) : place + AROUND + 1]]
            around = sum(one.share for one in near) / sum(one.rows * one.columns for one in near)
            own = layers[number].rows * layers[number].columns
            drawn = (1 - POOLED) * layers[number].share + POOLED * around * own
            found[number] = max(drawn, LEAST * mean * own)
    return found


def monotone(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The nearest curve that never falls, in logarithms, by pooling adjacent violators: points (x, y), x ascending."""
    pools: list[tuple[float, int]] = []
    for _, y in points:
        pools.append((math.log(y), 1))
        while len(pools) > 1 and pools[-1][0] <= pools[-2][0]:
            (last, n), (before, m) = pools.pop(), pools.pop()
            pools.append(((last * n + before * m) / (n + m), n + m))
    values = [math.exp(value) for value, count in pools for _ in range(count)]
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _interpolated(curve: Sequence[tuple[float, float]], x: float) -> float:
    if len(curve) == 1 or x <= 0:
        return curve[0][1] * max(x, 0.0) / curve[0][0]
    place = min(max(bisect.bisect([one for one, _ in curve], x), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    slope = math.log(y1 / y0) / max(math.log(x1 / x0), 1e-12)
    return y0 * (x / x0) ** slope
