"""The tour: what this is and where to begin, shown once a visit on the first page."""

from __future__ import annotations

import streamlit as st

SEEN = "tour seen"
STEPS = (
    (
        "What it is",
        "A language model's weights, cut from 16 bits to about two. **W(1+1)A4**: each weight keeps a *sign* and one "
        "bit of *bitmap*, which together pick one of four levels that a small group of weights shares; activations "
        "have 4 bits.",
    ),
    (
        "Begin here",
        "Ask something below: the full-precision teacher and its binarized student answer side by side. Small models "
        "lose a lot at two bits; see where the answers part.",
    ),
    (
        "Make your own",
        "**Quantize** shows size, memory and time of every choice before anything runs; **Runs** shows a run live, "
        "block by block. What comes out can be asked here.",
    ),
)


def show() -> None:
    """The tour, unless it was dismissed in this visit."""
    if st.session_state.get(SEEN):
        return
    with st.container(border=True, key="tour"):
        for column, (title, text) in zip(st.columns(3, gap="medium"), STEPS, strict=True):
            column.markdown(f"**{title}**\n\n{text}")
        st.button("Got it", key="tour dismissed", on_click=_dismiss)


def offer() -> None:
    """A way back to the tour."""
    if st.session_state.get(SEEN):
        st.button("What is this?", type="tertiary", key="tour wanted", on_click=_want)


def _dismiss() -> None:
    st.session_state[SEEN] = True


def _want() -> None:
    st.session_state[SEEN] = False
