"""The parts of the microscope that a browser draws: map, ranking, tiles, group, next tokens, and the copied link.

    moved = map_view(data, key="map")            (row, column) of a click or of Enter, or None
    moved = tiles_view(data, key="tiles")        (row, column) of the matrix

Each takes what it draws as plain data and computes nothing of it. All text is added as text nodes, never as HTML. What
moves by the pointer also moves by the arrow keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from app.components import TOKENS

_HERE = Path(__file__).parent
_COMMON = TOKENS + (_HERE / "common.js").read_text()
_CSS = (_HERE / "style.css").read_text()


def _part(name: str) -> Any:
    js = _COMMON + (_HERE / f"{name}.js").read_text()
    return st.components.v2.component(f"lbllm.microscope_{name}", css=_CSS, js=js)


_map, _ranks, _tiles, _group, _words, _link = map(_part, ("map", "ranks", "tiles", "group", "words", "link"))
Go = Callable[[Any], None]


def _moving(part: Any, data: dict[str, Any], key: str, go: Go) -> None:
    """Show a part; ``go`` is called with what it sends before the page runs again."""

    def moved() -> None:
        sent = st.session_state[key].get("go")
        if sent is not None:
            go(sent)

    part(key=key, data=data, on_go_change=moved)


def map_view(data: dict[str, Any], *, key: str, go: Go) -> None:
    """The map of blocks and layers. ``go`` gets [row, column]; column -1 is the row's name.

    ``data``: label; rows (names), columns (short, name); values: for each cell a number or None and its text, where
    None with a text is a dense layer and None without one is not known yet; low, high and their texts, None as long as
    nothing is known; chosen [row, column], each perhaps None; progress.
    """
    _moving(_map, data, key, go)


def ranks_view(data: dict[str, Any], *, key: str, go: Go) -> None:
    """A list of names with bars, each a button. ``go`` gets its number.

    ``data``: place (address), label; rows: (name, text, share between 0 and 1 or None).
    """
    _moving(_ranks, data, key, go)


def tiles_view(data: dict[str, Any], *, key: str, go: Go) -> None:
    """The linked tiles of a window. ``go`` gets the [row, column] of the matrix to go to.

    ``data``: place (address), label, names of the tiles; shape of the matrix; window (rows, columns), first (row,
    column); group (its weights); planes: original, rebuilt, error (lists), sign, bitmap, second (text of 0 and 1);
    index (text); most: the largest magnitude of each tile; whole: size, values, most; at: the marked weight in the
    window; chosen: row, column, rows and columns of the open group in the window, or None.
    """
    _moving(_tiles, data, key, go)


def group_view(data: dict[str, Any], *, key: str) -> None:
    """A group: weights on their levels after and before training, bits and bytes, parameters.

    ``data``: place (address), label, keys, file, legend (kind, text), weights, index, levels, before (levels, index),
    latent, lines (for each weight the parts of its line), bits_title, planes (name, bytes: offset, hex, bits (bit,
    number of the weight)), params_title, params_head, params (rows of texts), at.
    """
    _group(key=key, data=data)


def words_view(data: dict[str, Any], *, key: str) -> None:
    """Next tokens side by side. ``data``: place (what was changed), models: kind, name, note, tokens (text,
    probability); expected: the token that is set off in all of them."""
    _words(key=key, data=data)


def link_button(*, key: str) -> None:
    """A button that copies the address of what the page shows."""
    _link(key=key, data={})
