"""The inputs of a layer, and the keys and values of a block, on the sentence: how they are spread, and what a quantizer
makes of them."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app.components.live_chart import encode, live_chart
from app.components.shown import with_default
from app.microscope import state
from app.microscope.figures import show_figures
from app.microscope.filling import click
from app.view import COLOURS, number_text, plain
from lbllm.microscope.activations import (
    ActivationView,
    CachePart,
    CacheView,
    Quantizer,
    Range,
    Spread,
    activations,
    cache,
)
from lbllm.microscope.address import Address
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.pair import Pair, Side

PARTS = {"activations": "Inputs of the layer", "keys": "Keys", "values": "Values"}
SIDES: dict[Side, str] = {"student": "In the student", "teacher": "In the teacher"}
_KEPT = "inspect_activations"
_MOST_STEPS = 32  # that can be told apart in a picture
_COLOURWAY = [COLOURS[name] for name in ("student", "ptq", "aar", "e2e", "bad", "bitmap", "other")]


def show_activations(pair: Pair, scope: Microscope, at: Address, text: str, view: str) -> None:
    """Inputs, keys or values at the place that is chosen. Raises LbllmError."""
    with st.container(horizontal=True, key="inspect_parts"):
        st.segmented_control(
            "What is shown",
            list(PARTS),
            required=True,
            **with_default(state.bound("part", view)),
            format_func=PARTS.__getitem__,
            on_change=_part,
            label_visibility="collapsed",
        )
        if view == "activations":
            _pick_side()
    if at.block is None or (view == "activations" and at.layer is None):
        st.markdown("Choose a layer on the map." if view == "activations" else "Choose a block on the map.")
        return
    if view == "activations":
        # The chart says in its stamp which layer it shows.
        number = at.block * len(scope.layers) + scope.layers.index(at.layer or "")
        _inputs(_layer_inputs(pair, scope, at, text), number)
        return
    found = _block_cache(pair, scope, at.block, text)
    _cache_part(found, found.keys if view == "keys" else found.values, PARTS[view])


def _side() -> Side:
    """Whose inputs the address names; anything else is the student."""
    return "teacher" if state.value("side") == "teacher" else "student"


def _pick_side() -> None:
    st.segmented_control(
        "Whose inputs",
        list(SIDES),
        required=True,
        **with_default(state.bound("side", _side())),
        format_func=SIDES.__getitem__,
        on_change=state.taken,
        args=("side",),
        label_visibility="collapsed",
    )


def _part() -> None:
    state.go(view=str(st.session_state["inspect_part"]))


def _layer_inputs(pair: Pair, scope: Microscope, at: Address, text: str) -> ActivationView:
    assert at.block is not None
    assert at.layer is not None
    side = _side()
    key = (scope.fingerprint, scope.teacher_name, at.block, at.layer, text, side)
    kept = st.session_state.get(_KEPT)
    if kept is None or kept[0] != key:
        with st.spinner(f"The {side} reads the sentence"), click():
            kept = st.session_state[_KEPT] = key, activations(pair, at.block, at.layer, text, side=side)
    found: ActivationView = kept[1]
    return found


def _block_cache(pair: Pair, scope: Microscope, block: int, text: str) -> CacheView:
    key = (scope.fingerprint, scope.teacher_name, block, text)
    kept = st.session_state.get(_KEPT)
    if kept is None or kept[0] != key:
        with st.spinner("The student reads the sentence"), click():
            kept = st.session_state[_KEPT] = key, cache(pair, block, text)
    found: CacheView = kept[1]
    return found


def _inputs(view: ActivationView, number: int) -> None:
    trials = (view.quantizer,) if view.quantizer is not None else view.trials
    figures = [(f"{number_text(100 * one.error)} %", f"error with {one.name}") for one in trials]
    if view.peaks:
        peak = view.peaks[0]
        figures.append((f"{peak.times:,.0f} ×", f"largest input against the median, channel {peak.channel}"))
    show_figures(*figures)
    st.caption(plain(view.words))
    grid = _widest(trials[0].ranges) if trials else None
    label = f"Inputs of the layer {view.layer} of block {view.block + 1}, with the steps of the quantizer"
    live_chart(encode(spread_figure(view.spread, grid), label=label, stamp=number), key="inspect_spread")
    for place, one in enumerate(trials):
        st.caption(_quantizer_words(one, view.pieces, drawn=place == 0))
    payload = encode(maxima_figure(list(view.maxima), view), label="Largest input of each channel", stamp=number)
    live_chart(payload, key="inspect_maxima")
    if view.peaks:
        said = "; ".join(
            f"channel {peak.channel} at {_token_words(peak.token, view.pieces)}: {number_text(peak.value)}"
            for peak in view.peaks[:3]
        )
        st.caption(plain(f"The largest inputs: {said}."))


def _widest(ranges: tuple[Range, ...]) -> Range | None:
    return max(ranges, key=lambda one: one.high - one.low, default=None)


def _token_words(token: int, pieces: tuple[str, ...]) -> str:
    """A token of the sentence, counted from 1 as in the lessons."""
    return f"token {token + 1} “{pieces[token].strip()}”"


def _quantizer_words(one: Quantizer, pieces: tuple[str, ...], *, drawn: bool) -> str:
    grid = _widest(one.ranges) if drawn else None
    where = ""
    if grid is not None and one.token < len(pieces):
        where = (
            f" The steps drawn are those of {_token_words(one.token, pieces)}, channels {grid.first} to "
            f"{grid.last}: {len(grid.values)} values from {number_text(grid.values[0])} to "
            f"{number_text(grid.values[-1])}."
        )
    return plain(
        f"{one.name}: knee {one.knee:.3f}, clips {one.clip_low:.3f} and {one.clip_high:.3f}; error of the inputs "
        f"{number_text(100 * one.error)} %, of the layer's output {number_text(100 * one.output_error)} %.{where}"
    )


def _cache_part(view: CacheView, part: CachePart, name: str) -> None:
    row, grid = part.maxima[part.head], part.grid
    show_figures(
        (f"{number_text(100 * part.error)} %", f"error of the {name.lower()}"),
        (number_text(max(row)), f"largest value, head {part.head}, channel {row.index(max(row))}"),
    )
    st.caption(plain(view.words))
    drawn = grid is not None and len(grid.values) <= _MOST_STEPS
    label = f"{name} of block {view.block + 1}" + (", with the steps of the cache" if drawn else "")
    live_chart(encode(spread_figure(part.spread, grid if drawn else None), label=label), key="inspect_spread")
    if drawn and grid is not None:
        st.caption(
            plain(
                f"The steps drawn are those of {_token_words(part.token, view.pieces)} in head {part.head}: "
                f"{len(grid.values)} values from {number_text(grid.values[0])} to {number_text(grid.values[-1])}."
            )
        )
    heads = [
        {
            "type": "scatter",
            "mode": "lines",
            "uid": f"head {number}",
            "name": f"head {number}",
            "x": list(range(len(row))),
            "y": list(row),
            "line": {"width": 1.5},
        }
        for number, row in enumerate(part.maxima)
    ]
    layout = {
        "xaxis": {"title": {"text": "channel"}},
        "yaxis": {"title": {"text": "largest value"}},
        "height": 260,
        "dragmode": False,
    }
    figure = {"data": heads, "layout": layout | {"showlegend": True, "colorway": _COLOURWAY}}
    live_chart(encode(figure, label=f"Largest {name.lower()} of each channel"), key="inspect_maxima")


def spread_figure(spread: Spread, grid: Range | None) -> dict[str, Any]:
    """A histogram with a logarithmic count; the values of a grid as lines."""
    middles = [(low + high) / 2 for low, high in zip(spread.edges[:-1], spread.edges[1:], strict=True)]
    widths = [high - low for low, high in zip(spread.edges[:-1], spread.edges[1:], strict=True)]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "uid": "counts",
            "x": middles,
            # A logarithm has no place for none.
            "y": [count or None for count in spread.counts],
            "width": widths,
            "marker": {"color": COLOURS["student"]},
            "hovertemplate": "%{y} values near %{x:.4g}<extra></extra>",
        }
    ]
    shapes = []
    if grid is not None:
        line = {"color": COLOURS["ptq"], "width": 1.5}
        shapes = [
            {"type": "line", "x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper", "line": line}
            for value in grid.values
        ]
    layout = {
        "height": 260,
        "showlegend": False,
        "dragmode": False,
        "bargap": 0,
        "margin": {"l": 56, "r": 12, "t": 10, "b": 44},
        "xaxis": {"title": {"text": "value"}},
        "yaxis": {"title": {"text": "count"}, "type": "log"},
        "shapes": shapes,
    }
    return {"data": traces, "layout": layout}


def maxima_figure(maxima: list[float], view: ActivationView) -> dict[str, Any]:
    """The largest absolute input of each channel, the peaks marked."""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "uid": "maxima",
            "x": list(range(len(maxima))),
            "y": maxima,
            "line": {"color": COLOURS["teacher"], "width": 1.2},
            "hovertemplate": "channel %{x}: %{y:.4g}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "uid": "peaks",
            "x": [peak.channel for peak in view.peaks],
            "y": [abs(peak.value) for peak in view.peaks],
            "marker": {"color": COLOURS["bad"], "size": 9},
            "hovertemplate": "channel %{x}: %{y:.4g}<extra></extra>",
        },
    ]
    layout = {
        "height": 240,
        "showlegend": False,
        "dragmode": False,
        "margin": {"l": 56, "r": 12, "t": 10, "b": 44},
        "xaxis": {"title": {"text": "channel"}},
        "yaxis": {"title": {"text": "largest input"}},
    }
    return {"data": traces, "layout": layout}
