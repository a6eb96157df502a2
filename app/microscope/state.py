"""What the page Inspect shows, as its address says it: the address is the only state, so a link opens the same view.

model, teacher   the checkpoint, and its teacher if it is not the one that the checkpoint names
at               block/layer/row/group, see ``lbllm.microscope.address``; blocks are counted from 0 there, and from 1 in
                 all text on screen
colour           what the map shows
view             weights, activations or change
text             the sentence
side             whose inputs: student or teacher
change           what is changed: dense:layer, only:block, first:12, levels:-0.1,0,0.1,0.2, bits:4
"""

from __future__ import annotations

import streamlit as st

from app import visits
from lbllm.config import SHIPPED
from lbllm.microscope.address import Address

DEFAULTS: dict[str, str] = {
    "model": SHIPPED,
    "teacher": "",
    "at": "",
    "colour": "error",
    "view": "weights",
    "text": "The sky is blue because",
    "side": "student",
    "change": "dense:layer",
}
# The address of a page has room for a paragraph.
LONGEST_TEXT = 600
_LAST, _MOVED = "inspect_last", "inspect_moved"


def block_words(block: int) -> str:
    """Return a block's name on the screen, where blocks are counted from 1."""
    return f"Block {block + 1}"


def place_words(at: Address) -> str:
    """Return the name of a block, layer or group on the screen."""
    if at.block is None:
        return "Whole model"
    row = [] if at.row is None else [f"row {at.row}"]
    return ", ".join([block_words(at.block), *([at.layer] if at.layer else []), *row, *_group(at)])


def _group(at: Address) -> list[str]:
    return [] if at.group is None else [f"group {at.group}"]


def arrive() -> None:
    """Begin with what the address says; without an address, with what this session saw last."""
    visits.arrive()
    if not any(name in st.query_params for name in DEFAULTS):
        st.query_params.update(st.session_state.get(_LAST, {"model": SHIPPED}))
    st.session_state.pop(_MOVED, None)
    _keep()


def value(name: str) -> str:
    """What the address says; the default if it says nothing."""
    return st.query_params.get(name) or DEFAULTS[name]


def go(**changes: str) -> None:
    """Change the address, and so what the page shows. Defaults are left out, but for the model."""
    for name, wanted in changes.items():
        if wanted == DEFAULTS[name] and name != "model":
            st.query_params.pop(name, None)
        elif st.query_params.get(name) != wanted:
            st.query_params[name] = wanted
    st.session_state[_MOVED] = True
    _keep()


def follow() -> None:
    """In a part of the page that runs alone: run the whole page where a click in this part changed the address."""
    if st.session_state.pop(_MOVED, False):
        st.rerun()


def _keep() -> None:
    st.session_state[_LAST] = {name: st.query_params[name] for name in DEFAULTS if name in st.query_params}


def bound(name: str, shown: object) -> str:
    """Return the key of the widget that shows a part of the address; it shows ``shown`` from now on."""
    key = f"inspect_{name}"
    if st.session_state.get(key) != shown:
        st.session_state[key] = shown
    return key


def taken(name: str) -> None:
    """A callback: what was chosen in the widget goes into the address."""
    go(**{name: str(st.session_state[f"inspect_{name}"] or "").strip() or DEFAULTS[name]})
