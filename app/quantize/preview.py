"""Preview of one block before a run: its error against the group size, one line per format and a dotted line for each
other method that was chosen."""

from __future__ import annotations

import json

import plotly.graph_objects as go
import streamlit as st

from app.components.shown import with_default, with_value
from app.quantize import form
from app.quantize.settings import size_label
from app.view import COLOURS, guard, number_text
from lbllm.baselines.methods import METHODS
from lbllm.config import RunConfig
from lbllm.labels import BINARIZED_BITS, FORMAT_NAMES
from lbllm.measure.preview import BlockSample, Choice, Point, Trained, choices, preview, take_block
from lbllm.sections import WHOLE_ROW

LINES: dict[str, str] = {
    "w1+1": COLOURS["student"],
    "w1": COLOURS["ptq"],
    "w1+1+1": COLOURS["planes"],
    "rtn": COLOURS["other"],
    "gptq": COLOURS["e2e"],
    "billm": COLOURS["bitmap"],
    "arb-rc": COLOURS["bad"],
    "arb": COLOURS["aar"],
    "bwa": COLOURS["embeddings"],
}
NAMES: dict[str, str] = FORMAT_NAMES | {name: method.name for name, method in METHODS.items()}


@st.cache_resource(max_entries=2, show_spinner=False)
def _sample(key: str, number: int, _config: RunConfig) -> BlockSample:
    """The block and the texts around it; ``key`` says what they depend on."""
    return take_block(_config, number)


@st.cache_resource(max_entries=16, show_spinner=False)
def _results(key: str, number: int) -> tuple[dict[Choice, Point], dict[Choice, Trained]]:
    """The results for a block under settings that differ only in format and group size; filled step by step."""
    return {}, {}


def _sample_key(config: RunConfig) -> str:
    return json.dumps([config.model, config.corpus, config.seq_len])


def _results_key(config: RunConfig) -> str:
    """Everything that an error depends on except format, group size and block."""
    quant = config.quant.weights_only().model_dump(mode="json", exclude={"format", "group_size"})
    sections = [section.model_dump(mode="json", exclude={"tokens"}) for section in (config.ptq, config.wat)]
    return json.dumps([_sample_key(config), quant, *sections, config.seed])


@st.fragment
def show_preview(config: RunConfig, blocks: int) -> None:
    """The chosen block, the button, and the chart of the results."""
    with guard():
        left, right = st.columns(2, vertical_alignment="bottom")
        left.markdown("**Try one block first**")
        with right.container(horizontal=True, horizontal_alignment="right", vertical_alignment="bottom"):
            block_key = f"{form.BLOCK_KEY}{blocks}"
            st.session_state.setdefault(block_key, max(1, blocks // 2))
            shown = st.number_input(f"Block (1 to {blocks})", 1, blocks, **with_value(block_key), width=140)
            pressed = st.button("Preview", key="quantize preview")
        methods = st.multiselect(
            "Beside other methods",
            list(METHODS),
            format_func=NAMES.__getitem__,
            placeholder="none",
            **with_default(form.METHODS_KEY),
            help="Weight-only methods with a calibration like stage 1's, no training, on the same block and text. "
            "They are for comparison: a run makes W(1+1), W1 or W(1+1+1). Each takes some more seconds.",
        )
        form.keep()
        number = shown - 1  # the engine counts blocks from 0
        known, trained = _results(_results_key(config), number)
        place = st.empty()
        if pressed:
            _compute(config, number, known, trained, methods, place)
        points = {choice: point for choice, point in known.items() if choice[0] in (*FORMAT_NAMES, *methods)}
        own: Choice = (config.quant.format, config.quant.group_size)
        if not points:
            place.container(border=True).markdown(
                "Some seconds show what format and group size do to one block: stage 1 for all formats in several "
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
    methods: list[str],
    place: st.delta_generator.DeltaGenerator,
) -> None:
    bar = place.progress(0.0, "Running the teacher up to this block")
    sample = _sample(_sample_key(config), number, config)
    own: Choice = (config.quant.format, config.quant.group_size)
    total = len([choice for choice in choices(sample, config, methods) if choice not in points or choice == own]) + 1
    done = 0.0
    bar.progress(0.02, "Stage 1")
    for result in preview(sample, config, points, methods):
        if isinstance(result, Point):
            choice: Choice = (result.format, result.group_size)
            points[choice] = result
            done += 1
            text = f"{NAMES[result.format]}, group size {size_label(result.group_size)}: {_percent(result.error)}"
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
    for fmt, name in NAMES.items():
        line = [points[fmt, size] for size in sizes if (fmt, size) in points]
        other = fmt in METHODS
        if not line:
            continue
        figure.add_scatter(
            x=[place[point.group_size] for point in line],
            y=[100 * point.error for point in line],
            customdata=[(size_label(point.group_size), point.bpw) for point in line],
            mode="lines+markers",
            name=name,
            showlegend=other,
            line={"color": LINES[fmt], "width": 1.5 if other else 2.5, "dash": "dot" if other else "solid"},
            marker={"size": 6 if other else 8},
            hovertemplate=f"{name}, group size %{{customdata[0]}}<br>error %{{y:.2f}} %, %{{customdata[1]:.2f}} "
            f"{BINARIZED_BITS}<extra></extra>",
        )
        if not other:
            _label(figure, place[line[-1].group_size], line[-1].error, f"<b>{name}</b>", LINES[fmt], xshift=12)
    if own in points:
        here = place[own[1]]
        ring = {"size": 20, "color": "rgba(0,0,0,0)", "line": {"color": COLOURS["bad"], "width": 2.5}}
        figure.add_scatter(
            x=[here], y=[100 * points[own].error], mode="markers", marker=ring, hoverinfo="skip", showlegend=False
        )
        _label(figure, here, points[own].error, "you are here", COLOURS["bad"], yshift=22)
        if after is not None and after.error is not None:
            figure.add_scatter(
                x=[here],
                y=[100 * after.error],
                mode="markers",
                marker={"size": 11, "color": COLOURS["aar"], "symbol": "diamond"},
                showlegend=False,
                hovertemplate=f"after {after.steps} steps of stage 2<br>error %{{y:.2f}} %<extra></extra>",
            )
    ticks = {"tickvals": list(place.values()), "ticktext": [size_label(size) for size in sizes]}
    figure.update_layout(
        height=270,
        margin={"l": 8, "r": 8, "t": 14, "b": 8},
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
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
    beside = [point for choice, point in points.items() if choice[1] == own[1] and choice[0] != own[0]]
    if own in points and any(point.format in METHODS for point in beside):
        ranked = sorted([points[own], *beside], key=lambda point: point.error)
        said = f"At your group size, with {BINARIZED_BITS}, everything counted: "
        said += ", ".join(f"{NAMES[p.format]} {_percent(p.error)} ({p.bpw:.2f} bits)" for p in ranked) + ". "
    if own in points and after is not None and after.error is not None:
        said += (
            f"Yours: {_percent(points[own].error)} after stage 1, {_percent(after.error)} after {after.steps} steps of "
            "stage 2 (diamond). "
        )
    st.caption(
        said + "Error of the block's output in percent of its energy, on text that was not used to fit it. The block "
        "gets the teacher's own input; in a run its input also has the error of the blocks before it, so this compares "
        "formats and does not predict a run."
    )
