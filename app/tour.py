"""The tour: a short introduction, shown once in a browser, on the first page."""

from __future__ import annotations

import streamlit as st

from app.components.browser import TOUR_COOKIE
from app.visits import sent_cookie

SEEN = "tour seen"
STEPS = (
    (
        "What it is",
        "A language model reduced from 16 bits per weight to about two. **W(1+1)**: a *sign* bit and a *bitmap* bit "
        "select one of four levels, which a small group of weights shares. **A4** goes further: 4-bit activations.",
    ),
    (
        "Begin here",
        "Ask a question below: the teacher in full precision and its binarized student answer side by side. A small "
        "model loses a lot at two bits; see where the answers begin to differ.",
    ),
    (
        "Make your own",
        "**Quantize** shows the cost of every choice before anything runs, **Runs** a run live. **Inspect** shows any "
        "weight and its bits. **Learn** explains it all in ten short lessons.",
    ),
)


def show() -> bool:
    """Show the tour, unless it was dismissed, or shown in an earlier visit of this browser. Return whether it is
    shown."""
    # The empty place remains after the tour is dismissed: otherwise all elements below would be drawn again.
    place = st.empty()
    if st.session_state.setdefault(SEEN, bool(sent_cookie(TOUR_COOKIE))):
        return False
    with place.container(border=True, key="tour"):
        *columns, last = st.columns([10, 10, 10, 3], gap="medium")
        for column, (title, text) in zip(columns, STEPS, strict=True):
            column.markdown(f"**{title}**  \n{text}")
        last.button("Got it", key="tour dismissed", on_click=_dismiss)
    return True


def offer() -> None:
    """Show a button to open the tour again, if it was dismissed."""
    if st.session_state.get(SEEN):
        st.button("What is this?", type="tertiary", key="tour wanted", on_click=_want)


def _dismiss() -> None:
    st.session_state[SEEN] = True


def _want() -> None:
    st.session_state[SEEN] = False
