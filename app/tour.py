"""The tour: what this is and where to begin, shown once a visit on the first page."""

from __future__ import annotations

import streamlit as st

SEEN = "tour seen"
STEPS = (
    (
        "What it is",
        "A language model cut from 16 bits a weight to about two. **W(1+1)**: a *sign* and a bit of *bitmap* pick "
        "one of four levels that a small group of weights shares. **A4** is one step on: activations in 4 bits.",
    ),
    (
        "Begin here",
        "Ask something below: the teacher in full precision and its binarized student answer side by side. A small "
        "model loses a lot at two bits; see where the answers part.",
    ),
    (
        "Make your own",
        "**Quantize** says what every choice costs before anything runs. **Runs** shows a run live, block by block. "
        "Its result can be asked here.",
    ),
)


def show() -> None:
    """The tour, unless it was dismissed in this visit."""
    # The place stays when the tour goes: else everything below would move up one, and be drawn anew.
    place = st.empty()
    if st.session_state.get(SEEN):
        return
    with place.container(border=True, key="tour"):
        *columns, last = st.columns([10, 10, 10, 3], gap="medium")
        for column, (title, text) in zip(columns, STEPS, strict=True):
            column.markdown(f"**{title}**  \n{text}")
        last.button("Got it", key="tour dismissed", on_click=_dismiss)


def offer() -> None:
    """A way back to the tour."""
    if st.session_state.get(SEEN):
        st.button("What is this?", type="tertiary", key="tour wanted", on_click=_want)


def _dismiss() -> None:
    st.session_state[SEEN] = True


def _want() -> None:
    st.session_state[SEEN] = False
