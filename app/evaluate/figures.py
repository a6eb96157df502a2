"""The figures of an evaluation as HTML of the page's own: a card for each model, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import streamlit as st

from app.runs.overlay import colour
from lbllm.templates import environment

_TEMPLATES = environment(__file__)


@dataclass(frozen=True)
class Card:
    """A model: its largest figure with its unit, further ones by their labels, and a sentence."""

    number: int
    name: str
    figure: str
    unit: str
    rows: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def colour(self) -> str:
        """The model's colour, the same in charts."""
        return colour(self.number)


def style() -> None:
    """The styles of what this module shows; once on a page."""
    st.html(_TEMPLATES.get_template("style.html.jinja").render())


def show_cards(cards: Sequence[Card]) -> None:
    """The models beside each other."""
    st.html(_TEMPLATES.get_template("cards.html.jinja").render(cards=cards))


def show_table(label: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; the first cell of a row is its heading."""
    st.html(_TEMPLATES.get_template("parts.html.jinja").render(label=label, heads=heads, rows=rows))


def question_html(text: str, choices: Sequence[Mapping[str, object]]) -> str:
    """A question with its choices: ``text``, ``right``, and the names ``chosen_by``."""
    return _TEMPLATES.get_template("question.html.jinja").render(text=text, choices=choices)


def prompt_html(text: str) -> str:
    """A prompt as it was written."""
    return _TEMPLATES.get_template("words.html.jinja").render(text=text, kind="lbllm-prompt")


def answer_html(text: str) -> str:
    """An answer as it was written."""
    return _TEMPLATES.get_template("words.html.jinja").render(text=text, kind="lbllm-answer")
