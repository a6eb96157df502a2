"""Figures in one line: the first is the one that matters, and the largest."""

from __future__ import annotations

import streamlit as st

from lbllm.templates import environment

_TEMPLATES = environment(__file__)


def show_figures(*figures: tuple[str, str]) -> None:
    """Values with their labels, as text."""
    st.html(_TEMPLATES.get_template("figures.html.jinja").render(figures=figures))


def words_html(text: str) -> str:
    """Text of a model as HTML, with its white space."""
    return _TEMPLATES.get_template("words.html.jinja").render(text=text)
