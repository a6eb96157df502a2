"""The kinds of pictures in a scene, and the data that each of them has.

    "line"       points [{x, level: index of its level or null, note}], levels [{x, label}], low, high: ends of the axis
    "histogram"  edges [n + 1 numbers], series [{name, counts [n]}], marks [{x, label}]
    "bars"       labels [n], series [{name, values [n], null where there is none}], unit, percent: whether 0.1 is "10%"
    "curve"      x [n], series [{name, y [n], null where there is none}], x_label, y_label, log, mark: index or null
    "grid"       rows [[number or null]], row_labels, column_labels, scale "diverging", "sequential" or "binary", unit
    "bits"       parts [{label, bits: "0110", kind "sign", "bitmap", "params" or "other"}], total: text
    "text"       tokens [{text, value, note}], unit
    "table"      head [texts], rows [[texts]]

Texts are plain. Numbers are rounded to ``DIGITS`` digits, which no screen can show, so that all scenes of a course are
a small file; figures keep their own value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lbllm.course.lesson import Picture

DIGITS = 5

Plane = Literal["sign", "bitmap", "params", "other"]
Numbers = Tensor | Sequence[float] | Sequence[float | None]


def short(value: float) -> float:
    """A number with ``DIGITS`` significant digits."""
    return float(f"{value:.{DIGITS}g}") + 0.0  # no -0


def numbers(values: Numbers) -> list[float | None]:
    """Numbers of one dimension as JSON holds them; None stays."""
    return [None if value is None else short(value) for value in _listed(values)]


def line(
    label: str,
    points: Numbers,
    levels: Numbers,
    index: Sequence[int | None] | Tensor | None = None,
    *,
    notes: Sequence[str] = (),
    level_labels: Sequence[str] = (),
    ends: tuple[float, float] | None = None,
) -> Picture:
    """Weights on a line of numbers, each with its level, and the levels. ``ends``: of the axis, otherwise the smallest
    and the largest of all of them with some room."""
    xs, ys = _listed(points), _listed(levels)
    chosen = [None] * len(xs) if index is None else [None if at is None else int(at) for at in index]
    if ends is None:
        known = [value for value in (*xs, *ys) if value is not None]
        room = 0.08 * ((max(known) - min(known)) or 1.0)
        ends = (min(known) - room, max(known) + room)
    data = {
        "points": [
            {"x": x, "level": level, "note": note}
            for x, level, note in zip(numbers(points), chosen, notes or [""] * len(xs), strict=True)
        ],
        "levels": [
            {"x": x, "label": name} for x, name in zip(numbers(levels), level_labels or [""] * len(ys), strict=True)
        ],
        "low": short(ends[0]),
        "high": short(ends[1]),
    }
    return Picture("line", label, data)


def histogram(
    label: str, edges: Numbers, series: Mapping[str, Numbers], marks: Iterable[tuple[float, str]] = ()
) -> Picture:
    """Counts between neighbouring edges, for one or more series, and marked places."""
    data = {
        "edges": numbers(edges),
        "series": [{"name": name, "counts": numbers(counts)} for name, counts in series.items()],
        "marks": [{"x": short(x), "label": text} for x, text in marks],
    }
    return Picture("histogram", label, data)


def bars(
    label: str, labels: Sequence[str], series: Mapping[str, Numbers], *, unit: str = "", percent: bool = False
) -> Picture:
    """One bar for each label and series."""
    data = {
        "labels": list(labels),
        "series": [{"name": name, "values": numbers(values)} for name, values in series.items()],
        "unit": unit,
        "percent": percent,
    }
    return Picture("bars", label, data)


def curve(
    label: str,
    x: Numbers,
    series: Mapping[str, Numbers],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    mark: int | None = None,
) -> Picture:
    """Lines over x; ``log``: the scale of y; ``mark``: the place in x that the dial stands at."""
    data = {
        "x": numbers(x),
        "series": [{"name": name, "y": numbers(values)} for name, values in series.items()],
        "x_label": x_label,
        "y_label": y_label,
        "log": log,
        "mark": mark,
    }
    return Picture("curve", label, data)


def grid(
    label: str,
    rows: Tensor | Sequence[Sequence[float | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: Literal["diverging", "sequential", "binary"] = "diverging",
    unit: str = "",
) -> Picture:
    """A matrix of coloured cells."""
    data = {
        "rows": [numbers(row) for row in rows],
        "row_labels": list(row_labels),
        "column_labels": list(column_labels),
        "scale": scale,
        "unit": unit,
    }
    return Picture("grid", label, data)


def bits(
    label: str,
    parts: Iterable[tuple[str, str, Plane]],
    total: str,
) -> Picture:
    """Stored bits: (label, bits as "0110", kind) of each part, and a text about all of them."""
    return Picture(
        "bits",
        label,
        {"parts": [{"label": name, "bits": text, "kind": kind} for name, text, kind in parts], "total": total},
    )


def text(label: str, tokens: Iterable[tuple[str, float, str]], *, unit: str = "") -> Picture:
    """Tokens (text, value, note) coloured by their value."""
    data = {
        "tokens": [{"text": word, "value": short(value), "note": note} for word, value, note in tokens],
        "unit": unit,
    }
    return Picture("text", label, data)


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Picture:
    """Rows of texts."""
    return Picture("table", label, {"head": list(head), "rows": [list(row) for row in rows]})


def plane_text(plane: Tensor) -> str:
    """Booleans (n,) as bits, in their order: "0110"."""
    return "".join("1" if bit else "0" for bit in plane.tolist())


def _listed(values: Numbers) -> list[float | None]:
    if isinstance(values, Tensor):
        listed: list[float | None] = values.detach().to(torch.float64).tolist()
        return listed
    return list(values)
