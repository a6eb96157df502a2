"""The figures of a run: where its blocks are, their losses, and the heat map. Each is a plain Plotly figure.

Blocks are numbered from 1, as in all text on screen. Colours that begin with ``--st-`` follow the theme.
"""

from __future__ import annotations

from typing import Any

from app.view import COLOURS, number_text, time_text
from lbllm.runs.curves import points, smoothed
from lbllm.runs.view import HEAT_COLUMNS, BlockView, RunView, column_width
from lbllm.sections import STAGES, Stage, stage_number

STAGE_LABELS: dict[Stage, str] = {
    "ptq": f"{stage_number('ptq')} Initialize",
    "wat": f"{stage_number('wat')} Train weights",
    "aar": f"{stage_number('aar')} Refine activations",
    "e2e": f"{stage_number('e2e')} End to end",
}
WORKING = "#F0E442"
HATCH = "#FFFFFF"  # lines over the colour of the stage
# Blocks that wait, those finished in each stage, and the current one.
_CELLS = ["--st-border-color-light", *(COLOURS[stage] for stage in STAGES), WORKING]

Chosen = tuple[Stage, int]
Figure = dict[str, Any]


def timeline(view: RunView, chosen: Chosen | None) -> Figure:
    """One row per stage, one cell per block; the current block is yellow, diverged ones are hatched, the chosen one has
    a frame."""
    started = view.started
    if started is None:
        return {"data": [], "layout": {"height": 40}}
    codes: list[list[float]] = []
    texts: list[list[str]] = []
    shapes: list[Figure] = []
    for row, stage in enumerate(started.stages):
        done = stage_number(stage)
        kinds = {"waiting": 0, "working": 5, "done": done, "diverged": done}
        cells = [view.cell(stage, block) for block in range(started.blocks)]
        codes.append([kinds[cell] + 0.5 for cell in cells])
        texts.append([_cell_text(view, stage, block) for block in range(started.blocks)])
        shapes += [_hatched(row, block) for block, cell in enumerate(cells) if cell == "diverged"]
    scale = [[(index + side) / len(_CELLS), colour] for index, colour in enumerate(_CELLS) for side in (0, 1)]
    if chosen is not None and chosen[0] in started.stages:
        row = started.stages.index(chosen[0])
        shapes.append(_frame(row, chosen[1], started.blocks if chosen[0] == "e2e" else 1))
    trace = {
        "type": "heatmap",
        "uid": "cells",
        # A code is drawn in the colour of the middle of its range.
        "z": codes,
        "x": list(range(1, started.blocks + 1)),
        "y": [f"{STAGE_LABELS[stage]} " for stage in started.stages],
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "zmin": 0,
        "zmax": len(_CELLS),
        "colorscale": scale,
        "showscale": False,
        "xgap": 2,
        "ygap": 4,
    }
    axis = {"showgrid": False, "zeroline": False, "fixedrange": True, "ticks": ""}
    layout = {
        "height": 46 + 28 * len(started.stages),
        "margin": {"l": 140, "r": 12, "t": 4, "b": 28},
        "xaxis": axis | {"dtick": _tick(started.blocks), "tick0": 0},
        "yaxis": axis | {"autorange": "reversed"},
        "shapes": shapes,
        "dragmode": False,
    }
    return {"data": [trace], "layout": layout}


def place_name(chosen: Chosen) -> str:
    """The name of a block in a stage."""
    stage, number = chosen
    return f"{'All blocks' if stage == 'e2e' else f'Block {number + 1}'}, {STAGE_LABELS[stage]}"


def curve(view: RunView, chosen: Chosen, *, smooth: str, log: bool) -> Figure:
    """The loss of one block step by step, or in stage 1 the error of each of its layers."""
    stage, number = chosen
    block = view.blocks.get(chosen)
    if stage == "ptq":
        return _layer_errors(block)
    losses = block.losses if block is not None else []
    data: list[Figure] = []
    colour = COLOURS[stage]
    if smooth != "Smoothed":
        faint = {"opacity": 0.35} if smooth == "Both" else {}
        data.append(_line("raw", "each step", points(losses), colour, width=1.5) | faint)
    if smooth != "Raw":
        data.append(_line("smooth", "smoothed", points(smoothed(losses)), colour, width=2.5))
    probes = block.probes if block is not None else {}
    if probes:
        measured = _line(
            "probe", "held-out tokens", (list(probes), list(probes.values())), "--st-text-color", width=1.5
        )
        data.append(measured | {"mode": "lines+markers", "marker": {"size": 6, "color": "--st-text-color"}})
    steps = view.steps.get(stage, 0)
    layout: Figure = {
        "height": 300,
        "showlegend": smooth == "Both" or bool(probes),
        # The range of steps is kept from block to block; that of the loss belongs to one block and one kind of axis.
        "xaxis": {"title": {"text": "step"}, "uirevision": stage},
        "yaxis": loss_axis(log) | {"uirevision": f"{stage} {number} {log}"},
        "hovermode": "x",
    }
    if steps:
        layout["xaxis"] |= {"autorange": False, "range": [0, steps + 1]}
    if not losses:
        layout |= empty(f"{place_name(chosen)}: not started yet")
    return {"data": data, "layout": layout}


def before_after(view: RunView, *, log: bool) -> Figure:
    """The loss of every finished block after each stage, and dotted before it."""
    data: list[Figure] = []
    for stage in view.started.stages if view.started is not None else ():
        if stage == "e2e":
            continue  # its loss is the whole model's
        blocks = [block.done for block in view.finished if block.stage == stage and block.done is not None]
        numbers = [done.block + 1 for done in blocks]
        colour = COLOURS[stage]
        # Before stage 1 the block is not binarized; its error is that of the blocks before it.
        before = _line(f"{stage} before", "", (numbers, [done.loss_before for done in blocks]), colour, width=1.5)
        before |= {"showlegend": False, "legendgroup": stage, "hovertemplate": "before %{y:.4g}<extra></extra>"}
        before["line"] |= {"dash": "dot"}
        after = _line(stage, STAGE_LABELS[stage], (numbers, [done.loss_after for done in blocks]), colour, width=2.5)
        after |= {"legendgroup": stage, "mode": "lines+markers", "marker": {"size": 5, "color": colour}}
        data += [before, after | {"hovertemplate": "after %{y:.4g}<extra></extra>"}]
    axis: Figure = {"title": {"text": "block"}, "uirevision": "x"}
    if view.started is not None:
        axis |= {"autorange": False, "range": [0, view.started.blocks + 1]}
    layout: Figure = {"height": 300, "xaxis": axis, "yaxis": loss_axis(log) | {"uirevision": f"{log}"}}
    if not view.finished:
        layout |= empty("No block is finished yet")
    return {"data": data, "layout": layout}


def heat_map(view: RunView) -> Figure:
    """Block by step in stages 2 and 3: the loss over that of the block's first step, as a change in percent."""
    started = view.started
    stages: list[Stage] = [stage for stage in started.stages if stage in ("wat", "aar")] if started is not None else []
    layout: Figure = {"height": 300, "coloraxis": {}}
    data: list[Figure] = []
    if started is None or not stages:
        return {"data": [], "layout": layout | empty("Stage 1 has no steps" if started is not None else "No step yet")}
    if not any(block.losses for block in view.blocks.values()):
        return {"data": [], "layout": layout | empty("No step yet: training begins after stage 1")}
    widths = [float(min(view.steps.get(stage, 0), HEAT_COLUMNS) or 40) for stage in stages]
    left, gap = 0.0, 0.03
    changes: list[float] = []
    for index, stage in enumerate(stages):
        steps = view.steps.get(stage, 0)
        rows: list[list[float | None]] = []
        for number in range(started.blocks):
            block = view.blocks.get((stage, number))
            ratios = block.relative(steps) if block is not None and block.losses else []
            rows.append([None if ratio is None else round(100 * ratio - 100, 1) for ratio in ratios])
        changes += [abs(change) for row in rows for change in row if change is not None]
        suffix = str(index + 1) if index else ""
        per = column_width(steps)
        columns = -(-steps // per) if steps else 1
        data.append(
            {
                "type": "heatmap",
                "uid": f"heat {stage}",
                "z": [row + [None] * (columns - len(row)) for row in rows],
                "x0": (1 + per) / 2,
                "dx": per,
                "y0": 1,
                "dy": 1,
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "coloraxis": "coloraxis",
                "hoverongaps": False,
                "hovertemplate": "block %{y}, step %{x:.0f}: %{z:+.1f}%<extra></extra>",
            }
        )
        begun = any(change is not None for row in rows for change in row)
        width = widths[index] / sum(widths) * (1 - gap * (len(stages) - 1))
        axis = {"domain": [left, left + width], "showgrid": False, "zeroline": False, "uirevision": stage}
        axis |= {"title": {"text": f"step of stage {stage_number(stage)}"}, "range": [0.5, max(steps, 1) + 0.5]}
        layout[f"xaxis{suffix}"] = axis | {"anchor": f"y{suffix}", "visible": begun}
        layout[f"yaxis{suffix}"] = {
            "range": [started.blocks + 0.5, 0.5],
            "anchor": f"x{suffix}",
            "showgrid": False,
            "zeroline": False,
            "visible": begun or index == 0,
            "showticklabels": index == 0,
            "title": {"text": "block" if index == 0 else ""},
            "matches": None if index == 0 else "y",
        }
        if not begun:
            note = _note(f"no step of stage {stage_number(stage)} yet")
            layout.setdefault("annotations", []).append(note | {"x": left + width / 2})
        left += width + gap
    # A few extreme cells should not make all others pale.
    usual = sorted(changes)[int(0.95 * len(changes))] if changes else 0.0
    limit = next(step for step in (10, 20, 30, 50, 75, 100) if usual <= step or step == 100)
    middle = "--st-secondary-background-color"
    layout["coloraxis"] = {
        "cmin": -limit,
        "cmax": limit,
        "colorscale": [[0, COLOURS["wat"]], [0.5, middle], [1, COLOURS["bad"]]],
        "colorbar": {"title": {"text": "change"}, "ticksuffix": "%", "thickness": 12, "outlinewidth": 0},
    }
    return {"data": data, "layout": layout}


def _layer_errors(block: BlockView | None) -> Figure:
    errors = dict(reversed(block.layers.items())) if block is not None else {}
    trace = {
        "type": "bar",
        "uid": "layers",
        "orientation": "h",
        "x": [round(error, 3) for error in errors.values()],
        "y": [name.rpartition(".")[2] for name in errors],
        "marker": {"color": COLOURS["ptq"]},
        "hovertemplate": "%{y}: %{x:.2f}%<extra></extra>",
    }
    layout: Figure = {
        "height": 300,
        "xaxis": {"title": {"text": "output error, % of the layer's output energy"}, "rangemode": "tozero"},
        "yaxis": {"showgrid": False, "automargin": True, "uirevision": "layers"},
        "margin": {"l": 80, "r": 12, "t": 50, "b": 44},
        "bargap": 0.35,
    }
    layout["xaxis"]["uirevision"] = "layers"
    if not errors:
        layout |= empty("No layer of this block is binarized yet")
    return {"data": [trace], "layout": layout}


def _line(uid: str, name: str, xy: tuple[list[int], list[Any]], colour: str, *, width: float) -> Figure:
    values = [None if value is None or value - value != 0 else float(f"{value:.5g}") for value in xy[1]]
    return {
        "type": "scatter",
        "mode": "lines",
        "uid": uid,
        "name": name,
        "x": xy[0],
        "y": values,
        "line": {"color": colour, "width": width},
        "hovertemplate": f"{name} %{{y:.4g}}<extra></extra>",
    }


def loss_axis(log: bool) -> Figure:
    axis: Figure = {"title": {"text": "loss"}, "tickformat": ".3~g", "exponentformat": "power"}
    return axis | ({"type": "log", "dtick": "D2"} if log else {"type": "linear", "rangemode": "normal"})


def _cell_text(view: RunView, stage: Stage, block: int) -> str:
    cell, place = view.cell(stage, block), place_name((stage, block))
    found = view.blocks.get((stage, 0 if stage == "e2e" else block))
    if found is None or found.done is None:
        return f"{place}: {'in progress' if cell == 'working' else 'not started yet'}"
    done = found.done
    losses = f"loss {number_text(done.loss_before)} to {number_text(done.loss_after)} in {time_text(done.seconds)}"
    return f"{place}: {losses}" + (", diverged: kept as before" if done.diverged else "")


def _frame(row: int, block: int, blocks: int) -> Figure:
    box = {"type": "rect", "x0": block + 0.56, "x1": block + blocks + 0.44, "y0": row - 0.42, "y1": row + 0.42}
    return box | {"line": {"color": "--st-text-color", "width": 2}}


def _hatched(row: int, block: int) -> Figure:
    """Diagonal lines over a cell, each as (x, y) from edge to edge of a cell of unit size."""
    lines = (((0.0, 0.5), (0.5, 0.0)), ((0.0, 1.0), (1.0, 0.0)), ((0.5, 1.0), (1.0, 0.5)))
    corners = [[(block + 0.56 + 0.88 * x, row - 0.42 + 0.84 * y) for x, y in line] for line in lines]
    path = " ".join(f"M{x0:.2f},{y0:.2f} L{x1:.2f},{y1:.2f}" for (x0, y0), (x1, y1) in corners)
    return {"type": "path", "path": path, "line": {"color": HATCH, "width": 2}}


def _tick(blocks: int) -> int:
    return 1 if blocks <= 12 else 5 if blocks <= 60 else 10


def _note(text: str) -> Figure:
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
    return place | {"text": text, "font": {"color": "--st-gray-text-color"}}


def empty(note: str) -> Figure:
    """The part of a layout that shows a note in place of axes without data."""
    axis = {"visible": False, "fixedrange": True}
    return {"annotations": [_note(note)], "xaxis": axis, "yaxis": axis, "dragmode": False, "showlegend": False}
