"""The weights of the place that is chosen: the whole, a block, a layer as tiles, a group."""

from __future__ import annotations

from functools import partial

import streamlit as st
from torch import Tensor

from app.components.microscope_view import group_view, ranks_view, tiles_view
from app.microscope import state
from app.microscope.figures import show_figures
from app.microscope.filling import click
from app.microscope.groups import group_data
from app.microscope.maps import Map, runs_alone, value_text
from app.view import count_text, guard, number_text, plain
from lbllm.microscope.address import Address
from lbllm.microscope.layer import TILES, LayerView
from lbllm.microscope.microscope import Microscope

# A window is wider than high: groups lie along the rows.
ROWS, COLUMNS = 32, 64
_WHOLE = 96  # cells of the small picture of the whole matrix, at each side
_FIRST = 6


def show_weights(scope: Microscope, at: Address, shown: Map | None) -> None:
    """The place's weights. Raises LbllmError if there is none."""
    if at.block is None:
        _show_whole(scope, shown)
    elif at.layer is None:
        _show_block(scope, at.block, shown)
    else:
        _show_layer(scope, at)


def _show_whole(scope: Microscope, shown: Map | None) -> None:
    layers = sum(fmt is not None for formats in scope.formats for fmt in formats.values())
    weights = sum(
        shape[0] * shape[1]
        for block, shapes in enumerate(scope.shapes)
        for name, shape in shapes.items()
        if scope.formats[block].get(name) is not None
    )
    show_figures(
        (f"{scope.config.bpw or 0:.2f}", "bits a weight"),
        (f"{layers}", f"binarized layers in {scope.blocks} blocks"),
        (count_text(weights), "binarized weights"),
    )
    if shown is None:
        st.markdown("Choose a layer on the map to see its weights.")
        return
    with st.container():
        runs_alone(_largest, shown, every=1.0)(shown)
    st.caption(plain(sentence_of(shown.about)) + " Choose a layer on the map to see its weights, down to a single bit.")


def _largest(shown: Map) -> None:
    """The layers with the largest values."""
    with guard():
        state.follow()
        ranked = sorted(shown.known().items(), key=lambda item: -item[1])[:_FIRST]
        if ranked:
            st.markdown(f"**{plain(shown.colour.label)}: the largest{'' if shown.filling.done else ' so far'}**")
            rows = [Address(block, layer) for (block, layer), _ in ranked]
            _ranks(shown, rows, [state.place_words(row) for row in rows], "inspect_first")


def _of_block(shown: Map, block: int) -> None:
    """The layers of a block with their values."""
    with guard():
        state.follow()
        names = list(shown.scope.shapes[block])
        _ranks(shown, [Address(block, name) for name in names], names, "inspect_block")


def _show_block(scope: Microscope, block: int, shown: Map | None) -> None:
    if shown is None:
        st.markdown("Choose a layer of this block on the map.")
        return
    st.markdown(f"**{plain(shown.colour.label)} of its layers**")
    runs_alone(_of_block, shown, every=1.0)(shown, block)
    st.caption(plain(sentence_of(shown.about)))


def sentence_of(about: str) -> str:
    """A few words as a sentence."""
    return f"{about[:1].upper()}{about[1:].rstrip('.')}."


def _ranks(shown: Map, places: list[Address], names: list[str], key: str) -> None:
    """Places as a list with bars, on the scale of the whole map."""
    known = shown.known()
    most = max(known.values(), default=0.0) or 1.0

    def row(place: Address, name: str) -> tuple[str, str, float | None]:
        assert place.block is not None
        assert place.layer is not None
        found = known.get((place.block, place.layer))
        if found is None:
            dense = shown.scope.formats[place.block].get(place.layer) is None
            return name, "dense" if dense else "–", None
        return name, value_text(shown.colour.unit, found), found / most

    rows = [row(*pair) for pair in zip(places, names, strict=True)]
    data = {"place": state.value("at"), "label": shown.colour.label, "rows": rows}

    def chosen(number: int) -> None:
        if 0 <= number < len(places):
            state.go(at=str(places[number]))

    ranks_view(data, key=key, go=chosen)


def _show_layer(scope: Microscope, at: Address) -> None:
    layer = scope.layer(at)
    opened = at.row is not None and at.group is not None
    row, group = at.row or 0, at.group or 0
    with click():
        error = layer.error
        column = _column(layer, row, group)
        tiles = tiles_data(layer, row, group, column, opened=opened)
        found = group_data(scope, layer, layer.group(row, group), column) if opened else None
    rows, columns = layer.shape
    show_figures(
        (f"{number_text(100 * error)} %", "weight error"),
        (f"{layer.bits:.2f}", "bits a weight"),
        (f"{rows} × {columns}", f"weights, in groups of {layer.length}"),
    )
    tiles_view(tiles, key="inspect_tiles", go=partial(_go, layer))
    if found is None:
        st.caption("Point at a weight, or use the arrow keys; a click or Enter opens its group.")
        return
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"**Group {group} of row {row}**", width="content")
        change = {"view": "change", "change": "levels:"}
        st.button("Change its levels by hand", key="inspect_edit", type="tertiary", on_click=state.go, kwargs=change)
    group_view(found, key="inspect_group")


def _go(layer: LayerView, sent: list[int]) -> None:
    row, column = sent
    if 0 <= row < layer.shape[0] and 0 <= column < layer.shape[1]:
        place = Address(layer.address.block, layer.address.layer, row, column // layer.length)
        st.session_state["inspect_column"] = (str(place), column)
        state.go(at=str(place))


def _column(layer: LayerView, row: int, group: int) -> int:
    """The column that was clicked to get here; else the group's first."""
    place = Address(layer.address.block, layer.address.layer, row, group)
    clicked = st.session_state.get("inspect_column")
    return int(clicked[1]) if clicked is not None and clicked[0] == str(place) else group * layer.length


def tiles_data(layer: LayerView, row: int, group: int, column: int, *, opened: bool) -> dict[str, object]:
    """What ``tiles_view`` draws: the window around a group, with one column marked in its row."""
    height, width = min(ROWS, layer.shape[0]), min(COLUMNS, layer.shape[1])
    start, stop = group * layer.length, min((group + 1) * layer.length, layer.shape[1])
    top = min(max(0, row - height // 2), layer.shape[0] - height)
    left = min(max(0, (start + min(stop, start + width)) // 2 - width // 2), layer.shape[1] - width)
    part = layer.window(top, left, height, width)
    whole = layer.thumbnail("original", _WHOLE, _WHOLE)
    here = Address(layer.address.block, layer.address.layer, row, group)
    most = float(part.original.abs().max())
    visible = max(start, left), min(stop, left + width)
    names = {
        "whole": "Whole matrix",
        "original": TILES["original"],
        "sign": "Sign bits",
        "bitmap": "Bitmap bits",
        "second": "Second bitmap bits",
        "rebuilt": "Rebuilt from the bits",
        "error": "Error",
    }
    return {
        "label": f"Rows {top} to {top + height - 1} and columns {left} to {left + width - 1} of {layer.name}; "
        "arrow keys mark a weight, Enter opens its group, Page Up and Page Down move the window",
        "place": str(here) if opened else str(here.of_layer),
        "names": names,
        "shape": list(layer.shape),
        "window": [height, width],
        "first": [top, left],
        "group": layer.length,
        "planes": {
            "original": _numbers(part.original),
            "sign": _bits(part.sign),
            "bitmap": None if part.bitmap is None else _bits(part.bitmap),
            "second": None if part.second is None else _bits(part.second),
            "rebuilt": _numbers(part.rebuilt),
            "error": _numbers(part.error),
        },
        "index": _bits(part.index),
        "most": {"original": most, "rebuilt": most, "error": most},
        "whole": {"size": list(whole.shape), "values": _numbers(whole), "most": float(whole.max())},
        "at": [row - top, min(max(column, left), left + width - 1) - left],
        "chosen": [row - top, visible[0] - left, 1, visible[1] - visible[0]] if opened else None,
    }


def _numbers(values: Tensor) -> list[float]:
    """Values for drawing, with five digits: a page of them is sent at each click."""
    return [float(f"{value:.5g}") for value in values.flatten().tolist()]


def _bits(plane: Tensor) -> str:
    return "".join(map(str, plane.flatten().int().tolist()))
