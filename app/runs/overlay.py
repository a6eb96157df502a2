"""The figures of several runs in one: their curves over each other, and cost against quality with the frontier.

A run has the same colour and number everywhere on the page. Each figure is a plain Plotly figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from app.runs.charts import STAGE_LABELS, Figure, empty, loss_axis
from lbllm.runs.compared import COSTS, QUALITIES, Cost, Point, Quality, frontier
from lbllm.runs.curves import points, smoothed
from lbllm.runs.listed import Listed
from lbllm.runs.view import RunView
from lbllm.sections import STAGES, Stage

# Of Okabe and Ito, those that are legible on light and dark; then the same with other lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8796A5")
DASHES = ("solid", "dash", "dot", "dashdot")
HEIGHT = 340


def colour(number: int) -> str:
    """The colour of a run by its number, counted from 0."""
    return PALETTE[number % len(PALETTE)]


def literal(text: str) -> str:
    """A name as Plotly shows it literally: no markup and no placeholders."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def run_name(number: int, one: Listed) -> str:
    """A run's number and name, shortened for what a chart says under the pointer."""
    name = one.run.name
    return f"{number + 1} {literal(name if len(name) <= 40 else name[:39] + '…')}"


def blocks_after(listed: Sequence[Listed], views: Sequence[RunView], stage: Stage, *, log: bool) -> Figure:
    """The loss of every finished block after a stage, a line for each run."""
    data = []
    for number, (one, view) in enumerate(zip(listed, views, strict=True)):
        done = [block.done for block in view.finished if block.stage == stage and block.done is not None]
        data.append(_line(number, one, [event.block + 1 for event in done], [event.loss_after for event in done]))
    layout: Figure = {
        "height": HEIGHT,
        "xaxis": {"title": {"text": "block"}, "uirevision": "x", "rangemode": "tozero"},
        "yaxis": loss_axis(log) | {"uirevision": f"{stage} {log}"},
    }
    if not any(trace["x"] for trace in data):
        layout |= empty(f"No block of these runs has finished {STAGE_LABELS[stage]}")
    return {"data": data, "layout": layout}


def one_block(listed: Sequence[Listed], views: Sequence[RunView], stage: Stage, block: int, *, log: bool) -> Figure:
    """The smoothed loss of one block step by step, a line for each run."""
    data = []
    for number, (one, view) in enumerate(zip(listed, views, strict=True)):
        found = view.blocks.get((stage, block))
        steps, values = points(smoothed(found.losses)) if found is not None else ([], [])
        data.append(_line(number, one, steps, values, mode="lines"))
    layout: Figure = {
        "height": HEIGHT,
        "xaxis": {"title": {"text": "step"}, "uirevision": stage, "rangemode": "tozero"},
        "yaxis": loss_axis(log) | {"uirevision": f"{stage} {block} {log}"},
    }
    if not any(trace["x"] for trace in data):
        layout |= empty("No step of this block yet: choose another block or stage")
    return {"data": data, "layout": layout}


def by_stage(listed: Sequence[Listed], views: Sequence[RunView], text: str | None, *, log: bool) -> Figure:
    """The perplexity after each stage on one text, a line for each run that was measured on it."""
    data = []
    for number, (one, view) in enumerate(zip(listed, views, strict=True)):
        newest = {event.what: event.perplexity for event in view.evaluations if event.text == text}
        stages = [stage for stage in STAGES if stage in newest]
        data.append(_line(number, one, [STAGE_LABELS[s] for s in stages], [newest[stage] for stage in stages]))
    layout: Figure = {
        "height": HEIGHT,
        "xaxis": {"uirevision": "x", "categoryorder": "array", "categoryarray": list(STAGE_LABELS.values())},
        "yaxis": loss_axis(log) | {"title": {"text": "perplexity"}, "uirevision": f"{text} {log}"},
    }
    if not any(trace["x"] for trace in data):
        layout |= empty("None of these runs has been evaluated yet")
    return {"data": data, "layout": layout}


def pareto(
    listed: Sequence[Listed], made: Sequence[Point], cost: Cost, quality: Quality, teacher: float | None
) -> Figure:
    """Cost against quality: each run a numbered point, the frontier as a line, the teacher's perplexity dashed."""
    best = frontier(made, more_is_better=cost == "speed")
    data: list[Figure] = []
    if len(best) > 1:
        data.append(
            {
                "type": "scatter",
                "uid": "frontier",
                "name": "frontier: no other run is better in both",
                "mode": "lines",
                "x": [point.x for point in best],
                "y": [point.y for point in best],
                # Up to the next point, what a run at this cost can have is the quality of this one.
                "line": {"color": "--st-gray-text-color", "width": 1.5, "shape": "vh" if cost == "speed" else "hv"},
                "hoverinfo": "skip",
            }
        )
    on_frontier = {point.run for point in best}
    drawn = {point.run: point for point in made}
    for number, one in enumerate(listed):
        point = drawn.get(one.run.id)
        if point is None:
            continue
        ring = {"color": "--st-text-color", "width": 2 if one.run.id in on_frontier else 0}
        data.append(
            {
                "type": "scatter",
                "uid": f"point {one.run.id}",
                "name": str(number + 1),
                "mode": "markers+text",
                "x": [point.x],
                "y": [point.y],
                "text": [str(number + 1)],
                "textposition": "top right",
                "cliponaxis": False,
                "marker": {"size": 13, "color": colour(number), "line": ring},
                "showlegend": False,
                "hovertemplate": f"{run_name(number, one)}<br>{COSTS[cost]} %{{x:.4~g}}<br>{QUALITIES[quality]} "
                "%{y:.4~g}<extra></extra>",
            }
        )
    layout: Figure = {
        "height": HEIGHT,
        "xaxis": {"title": {"text": COSTS[cost]}, "uirevision": cost, "automargin": True},
        "yaxis": {"title": {"text": QUALITIES[quality]}, "uirevision": quality, "automargin": True},
        "hovermode": "closest",
    }
    if teacher is not None and made and math.isfinite(teacher):
        line = {"color": "--st-gray-text-color", "width": 1.5, "dash": "dash"}
        span = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": teacher, "y1": teacher, "line": line}
        note = {"xref": "paper", "x": 1, "y": teacher, "text": "teacher", "showarrow": False, "xanchor": "right"}
        layout |= {"shapes": [span], "annotations": [note | {"yanchor": "bottom"}]}
        layout["yaxis"] |= _range([point.y for point in made] + [teacher])
    if not made:
        layout |= empty("No run here has both figures")
    return {"data": data, "layout": layout}


def _range(values: Sequence[float]) -> Figure:
    """A range that has all values, with a margin."""
    least, greatest = min(values), max(values)
    margin = 0.12 * (greatest - least) or abs(greatest) or 1.0
    return {"range": [least - margin, greatest + margin], "autorange": False}


def _line(number: int, one: Listed, x: Sequence[Any], y: Sequence[Any], *, mode: str = "lines+markers") -> Figure:
    name = run_name(number, one)
    values = [None if value is None or value - value != 0 else float(f"{value:.5g}") for value in y]
    dash = DASHES[number // len(PALETTE) % len(DASHES)]
    return {
        "type": "scatter",
        "mode": mode,
        "uid": f"run {one.run.id}",
        "name": str(number + 1),
        "x": list(x),
        "y": values,
        "line": {"color": colour(number), "width": 2, "dash": dash},
        "marker": {"size": 5, "color": colour(number)},
        "hovertemplate": f"{name}: %{{y:.4g}}<extra></extra>",
    }
