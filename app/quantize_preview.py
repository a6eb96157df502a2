"""One block tried out before a run: its error against the group size, a line a format."""

from __future__ import annotations

import json

import plotly.graph_objects as go
import streamlit as st

from app.quantize_form import size_label
from app.view import COLOURS, guard, number_text
from lbllm.config import FORMAT_NAMES, WHOLE_ROW, Format, RunConfig
from lbllm.preview import BlockSample, Point, Trained, choices, preview, take_block

Choice = tuple[Format, int]
LINES: dict[Format, str] = {"w1+1": COLOURS["student"], "w1": COLOURS["ptq"]}


@st.cache_resource(max_entries=2, show_spinner=False)
def _sample(key: str, number: int, _config: RunConfig) -> BlockSample:
    """The block and the texts around it; ``key`` says what they depend on."""
    return take_block(_config, number)


@st.cache_resource(max_entries=16, show_spinner=False)
def _results(key: str, number: int) -> tuple[dict[Choice, Point], dict[Choice, Trained]]:
    """What is known of a block under settings that differ in format and group size alone; filled bit by bit."""
    return {}, {}


def _sample_key(config: RunConfig) -> str:
    return json.dumps([config.model, config.corpus, config.seq_len])


def _results_key(config: RunConfig) -> str:
    """Everything that an error depends on but format, group size and block."""
    quant = config.quant.weights_only().model_dump(mode="json", exclude={"format", "group_size"})
    sections = [section.model_dump(mode="json", exclude={"tokens"}) for section in (config.ptq, config.wat)]
    return json.dumps([_sample_key(config), quant, *sections, config.seed])


@st.fragment
def show_preview(config: RunConfig, blocks: int) -> None:
    """The chosen block, the button, and the chart of what is known."""
    with guard():
        left, right = st.columns(2, vertical_alignment="bottom")
        left.markdown("**Try one block first**")
        with right.container(horizontal=True, horizontal_alignment="right", vertical_alignment="bottom"):
            shown = st.number_input(
                f"Block (1 to {blocks})", 1, blocks, blocks // 2, key=f"quantize block of {blocks}", width=140
            )
            pressed = st.button("Preview", key="quantize preview")
        number = shown - 1  # the engine counts blocks from 0
        points, trained = _results(_results_key(config), number)
        place = st.empty()
        if pressed:
            _compute(config, number, points, trained, place)
        own: Choice = (config.quant.format, config.quant.group_size)
        if not points:
            place.container(border=True).markdown(
                "Some seconds show what format and group size do to one block: stage 1 for both formats in several "
                "sizes, and a few steps of stage 2 for yours."
            )
            return
        figure = _chart(points, trained.get(own), own)
        place.plotly_chart(figure, config={"displayModeBar": False}, key="quantize preview chart")
        if own not in points:
            st.caption("Your choice is not on the chart yet: press Preview again.")
        _explain(points, trained.get(own), own)


def _compute(
    config: RunConfig,
    number: int,
    points: dict[Choice, Point],
    trained: dict[Choice, Trained],
    place: st.delta_generator.DeltaGenerator,
) -> None:
    bar = place.progress(0.0, "Running the teacher up to this block")
    sample = _sample(_sample_key(config), number, config)
    own: Choice = (config.quant.format, config.quant.group_size)
    total = len([choice for choice in choices(sample, config) if choice not in points or choice == own]) + 1
    done = 0.0
    bar.progress(0.02, "Stage 1")
    for result in preview(sample, config, points):
        if isinstance(result, Point):
            choice: Choice = (result.format, result.group_size)
            points[choice] = result
            done += 1
            text = (
                f"{FORMAT_NAMES[result.format]}, group size {size_label(result.group_size)}: {_percent(result.error)}"
            )
        else:
            done += 1 / result.steps if result.error is None else 0
            text = f"Stage 2, step {result.step} of {result.steps}"
            if result.error is not None:
                trained[own] = result
        bar.progress(min(1.0, done / total), text)


def _percent(error: float) -> str:
    return f"{number_text(100 * error)} %"


def _chart(points: dict[Choice, Point], after: Trained | None, own: Choice) -> go.Figure:
    sizes = sorted({size for _, size in points}, key=lambda size: (size == WHOLE_ROW, size))
    place = {size: number for number, size in enumerate(sizes)}
    figure = go.Figure()
    for fmt, name in FORMAT_NAMES.items():
        line = [points[fmt, size] for size in sizes if (fmt, size) in points]
        if not line:
            continue
        figure.add_scatter(
            x=[place[point.group_size] for point in line],
            y=[100 * point.error for point in line],
            customdata=[(size_label(point.group_size), point.bpw) for point in line],
            mode="lines+markers",
            name=name,
            line={"color": LINES[fmt], "width": 2.5},
            marker={"size": 8},
            hovertemplate=f"{name}, group size %{{customdata[0]}}<br>error %{{y:.2f}} %, %{{customdata[1]:.2f}} bits "
            "a weight<extra></extra>",
        )
        _label(figure, place[line[-1].group_size], line[-1].error, f"<b>{name}</b>", LINES[fmt], xshift=12)
    if own in points:
        here = place[own[1]]
        ring = {"size": 20, "color": "rgba(0,0,0,0)", "line": {"color": COLOURS["bad"], "width": 2.5}}
        figure.add_scatter(x=[here], y=[100 * points[own].error], mode="markers", marker=ring, hoverinfo="skip")
        _label(figure, here, points[own].error, "you are here", COLOURS["bad"], yshift=22)
        if after is not None and after.error is not None:
            figure.add_scatter(
                x=[here],
                y=[100 * after.error],
                mode="markers",
                marker={"size": 11, "color": COLOURS["aar"], "symbol": "diamond"},
                hovertemplate=f"after {after.steps} steps of stage 2<br>error %{{y:.2f}} %<extra></extra>",
            )
    ticks = {"tickvals": list(place.values()), "ticktext": [size_label(size) for size in sizes]}
    figure.update_layout(
        height=270,
        margin={"l": 8, "r": 8, "t": 14, "b": 8},
        showlegend=False,
        xaxis={"title": "group size", "fixedrange": True, "range": [-0.3, len(sizes) - 0.3]} | ticks,
        yaxis={"title": "error, %", "rangemode": "tozero", "fixedrange": True},
    )
    return figure


def _label(figure: go.Figure, x: int, error: float, text: str, colour: str, xshift: int = 0, yshift: int = 0) -> None:
    anchor = "left" if xshift else "center"
    figure.add_annotation(
        x=x,
        y=100 * error,
        text=text,
        font={"color": colour},
        showarrow=False,
        xanchor=anchor,
        xshift=xshift,
        yshift=yshift,
    )


def _explain(points: dict[Choice, Point], after: Trained | None, own: Choice) -> None:
    said = ""
    if own in points and after is not None and after.error is not None:
        said = (
            f"Yours: {_percent(points[own].error)} after stage 1, {_percent(after.error)} after {after.steps} steps of "
            "stage 2 (diamond). "
        )
    st.caption(
        said + "Error of the block's output in percent of its energy, on text that was not used to fit it. The block "
        "gets the teacher's own input; in a run it also has the error of the blocks before it to cope with, so this "
        "compares formats and foretells no run."
    )
