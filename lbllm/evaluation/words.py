"""Intervals and differences of an evaluation as people read them."""

from __future__ import annotations

from lbllm.evaluation.results import Difference
from lbllm.measure.bootstrap import Interval
from lbllm.units import number_text


def range_text(found: Interval | None, *, percent: bool = False) -> str:
    """An interval: "18.2 to 22.0"; empty if there is none."""
    if found is None:
        return ""
    return f"{_figure(found.low, percent=percent)} to {_figure(found.high, percent=percent)}"


def with_range(figure: str, within: str) -> str:
    """A figure with its interval, as ``range_text`` gives it, behind it."""
    return f"{figure} ({within})" if within else figure


def difference_text(found: Difference | None, *, percent: bool = False) -> str:
    """A difference with its interval, and whether it is told apart from none."""
    if found is None:
        return "not comparable"
    said = f"{'+' if found.value > 0 else ''}{_figure(found.value, percent=percent)}"
    if found.interval is None:
        return f"{said} (too few for an interval)"
    doubt = "" if found.interval.excludes_zero else ", may be none"
    return f"{said} ({range_text(found.interval, percent=percent)}{doubt})"


def _figure(value: float, *, percent: bool) -> str:
    """A number with a real minus sign; a share as points with one decimal; tiny ones are 0."""
    text = f"{100 * value:.1f}" if percent else number_text(value) if abs(value) >= 0.0005 else "0"
    return text.replace("-", "−")
