"""The places of a chart's marks, in percent of its width and height; the template draws them.

Text of a chart is HTML beside the drawing, so it has the page's size at every width, and a drawing may be stretched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lbllm.units import number_text

LOG_FROM = 12.0  # the ratio of the largest to the smallest value from which an axis is logarithmic
_TICKS = 4


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``; logarithmic with ``log``."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value on it, 0 to 100; what lies outside is at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places with round values, three to six of them."""
        return [(self.at(value), _tick(value)) for value in (self._log_values() if self.log else self._even_values())]

    def _even_values(self) -> list[float]:
        rough = (self.high - self.low) / _TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_values(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for times in ((1, 2, 5), (1, 3), (1,)):
            found = [n * 10.0**decade for decade in decades for n in times]
            found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            if len(found) <= _TICKS + 2:
                return found
        return found[:: -(-len(found) // _TICKS)]


def axis(values: Iterable[float], *, from_zero: bool = False, tight: bool = False) -> Axis | None:
    """The axis that holds all finite values, with room at its ends unless ``tight``; None if there is none.

    ``from_zero``: it begins at zero, unless the values differ so much that it is logarithmic.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    low, high = min(known), max(known)
    if low > 0 and high / low > LOG_FROM:
        return Axis(low, high, log=True) if tight else Axis(low / 1.15, high * 1.15, log=True)
    if from_zero:
        return Axis(min(0.0, low), max(0.0, high) * 1.06 or 1.0)
    room = 0.0 if tight and high > low else 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room)


@dataclass(frozen=True)
class Mark:
    """A row of a chart. ``at``, ``low``, ``high``: places on its axis, 0 to 100; None for a value that is not finite or
    an interval that is not known. ``hue``: the number of its colour."""

    label: str
    text: str
    at: float | None
    low: float | None = None
    high: float | None = None
    hue: int = 0


@dataclass(frozen=True)
class Rows:
    """A chart of rows: a point with its interval on an axis that all share, or bars from zero."""

    title: str
    marks: list[Mark]
    ticks: list[tuple[float, str]]
    bars: bool = False
    log: bool = False


@dataclass(frozen=True)
class Value:
    """A value to draw, as people read it, with its interval, if it is known."""

    label: str
    text: str
    value: float
    low: float | None = None
    high: float | None = None
    hue: int = 0


def rows(title: str, values: Sequence[Value], *, bars: bool = False) -> Rows | None:
    """The chart of these values; None if none is finite."""
    ends = [end for one in values for end in (one.value, one.low, one.high) if end is not None]
    found = axis(ends, from_zero=bars)
    if found is None:
        return None
    if bars:
        found = Axis(0.0, found.high)  # the length of a bar says how much it is

    def place(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else round(found.at(value), 2)

    marks = [Mark(one.label, one.text, place(one.value), place(one.low), place(one.high), one.hue) for one in values]
    return Rows(title, marks, found.ticks, bars, found.log)


@dataclass(frozen=True)
class Line:
    """A line of a chart: ``points`` as SVG reads them; ``dashed``, and the number of its colour."""

    label: str
    points: str
    hue: int
    dashed: bool = False


@dataclass(frozen=True)
class Curves:
    """A chart of lines: places of round values on both axes, y from the top."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    log: bool = False


def curves(
    title: str, x_label: str, y_label: str, lines: Mapping[tuple[str, int, bool], Sequence[tuple[float, float]]]
) -> Curves | None:
    """The chart of lines, each by its label, the number of its colour and whether it is dashed: points (x, y). None if
    there is no point that is finite."""
    finite = {key: [point for point in line if math.isfinite(point[1])] for key, line in lines.items()}
    every = [point for line in finite.values() for point in line]
    across, up = axis((x for x, _ in every), tight=True), axis((y for _, y in every), from_zero=True)
    if across is None or up is None:
        return None
    across = Axis(across.low, across.high)  # blocks are counted: never logarithmic
    drawn = [
        Line(label, " ".join(f"{across.at(x):.2f},{100 - up.at(y):.2f}" for x, y in line), hue, dashed)
        for (label, hue, dashed), line in finite.items()
        if line
    ]
    whole = [(at, text) for at, text in across.ticks if "." not in text]
    return Curves(title, x_label, y_label, drawn, whole, [(100 - at, text) for at, text in up.ticks], up.log)


@dataclass(frozen=True)
class Dot:
    """A point of a plot, with its number in the legend; ``best``: no other point is better in both."""

    label: str
    number: int
    x: float
    y: float
    hue: int
    best: bool


@dataclass(frozen=True)
class Plot:
    """A plot of points, y from the top; ``frontier``: the steps between the best ones."""

    title: str
    x_label: str
    y_label: str
    dots: list[Dot]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    frontier: str = ""


@dataclass(frozen=True)
class Place:
    """A point to plot, in the units of the axes."""

    label: str
    x: float
    y: float
    hue: int
    best: bool = field(default=False)


def plot(title: str, x_label: str, y_label: str, places: Sequence[Place]) -> Plot | None:
    """The plot of points; None for fewer than two that are finite."""
    known = [one for one in places if math.isfinite(one.x) and math.isfinite(one.y)]
    across, up = axis(one.x for one in known), axis(one.y for one in known)
    if len(known) < 2 or across is None or up is None:
        return None
    dots = [
        Dot(one.label, number, round(across.at(one.x), 2), round(100 - up.at(one.y), 2), one.hue, one.best)
        for number, one in enumerate(known, 1)
    ]
    best = sorted((dot for dot in dots if dot.best), key=lambda dot: dot.x)
    corners = [f"{after.x},{before.y} {after.x},{after.y}" for before, after in pairwise(best)]
    line = " ".join([*(f"{dot.x},{dot.y}" for dot in best[:1]), *corners])
    return Plot(title, x_label, y_label, dots, across.ticks, [(100 - at, text) for at, text in up.ticks], line)


def _tick(value: float) -> str:
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e7 else number_text(value)
