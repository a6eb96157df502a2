"""Drawing one exchange of the compare page: the prompt, two answers, their figures, and where they part."""

from __future__ import annotations

from html import escape

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.lens_view import answer_view
from app.view import plain, size_text
from lbllm.conversation import Exchange
from lbllm.duel import Answer
from lbllm.lens import first_difference

_STATES = {"waiting": "Waiting for its model", "reading": "Reading the prompt", "writing": "Writing"}
_FIGURE = (
    '<div style="min-width:5.2em"><div style="font-size:1.45rem;font-weight:600;line-height:1.25;'
    'font-variant-numeric:tabular-nums">{}</div><div style="font-size:.8rem;opacity:.72">{}</div></div>'
)


def show_prompt(prompt: str) -> None:
    """The prompt, once over both answers, as plain text."""
    with st.chat_message("user", avatar=":material/person:"):
        st.text(prompt)


def live_places(exchange: Exchange) -> list[tuple[DeltaGenerator, DeltaGenerator]]:
    """For each side a place for the growing text and one for the figures."""
    places = []
    for side, column in enumerate(st.columns(2, gap="medium")):
        with column, st.container(border=True, key=f"compare_answer_{side}"):
            st.markdown(_heading(exchange, side))
            places.append((st.empty(), st.empty()))
    return places


def show_live(exchange: Exchange, places: list[tuple[DeltaGenerator, DeltaGenerator]], elapsed: float) -> None:
    """Write both answers as far as they are into their places."""
    for answer, (text, figures) in zip(exchange.answers, places, strict=True):
        if answer.text:
            # The block says where the pen is; the browser shows new text about ten times a second.
            text.text(answer.text + ("" if answer.over else " ▌"))
        elif not answer.over:
            text.caption(f"{_STATES[answer.state]}, {elapsed:.0f} s")
        figures.html(figures_html(answer))


def show_finished(exchange: Exchange) -> None:
    """Both answers, the word marked at which they part, with their figures."""
    left, right = exchange.answers
    at = first_difference(left.text, right.text) if left.text and right.text else None
    for side, (answer, column) in enumerate(zip(exchange.answers, st.columns(2, gap="medium"), strict=True)):
        with column, st.container(border=True, key=f"compare_answer_{side}"):
            st.markdown(_heading(exchange, side))
            if answer.error:
                st.error(plain(answer.error))
            else:
                answer_view(
                    answer.text,
                    at=at,
                    label="Here the answers part",
                    empty="Stopped before the first word." if answer.state == "stopped" else "No text.",
                    key=f"answer_{side}_{exchange.id}",
                )
            if answer.state == "stopped" and answer.text:
                st.caption("Stopped.")
            if answer.tokens:
                st.html(figures_html(answer))


def difference_text(left: str, right: str) -> str:
    """Where two answers part, in a sentence."""
    at = first_difference(left, right)
    if at is None:
        return "Both answers are the same, word for word."
    words = len(left[:at].split())
    if words == 0:
        return "The answers differ from the first word on."
    return f"The answers agree for {words} word{'s' if words > 1 else ''}; the mark shows where they part."


def figures_html(answer: Answer) -> str:
    """An answer's measurements as HTML; all of it numbers."""
    speed = f"{answer.tokens_per_second:.1f}" if answer.tokens_per_second else "–"
    first = f"{answer.first_token_seconds:.2f} s" if answer.tokens else "–"
    memory = size_text(answer.weight_bytes) if answer.weight_bytes else "–"
    bits = f"{answer.bpw:.2f}" if answer.bpw else "–"
    figures = [
        (speed, "tokens/s, alone" if answer.timed else "tokens/s"),
        (first, "first token"),
        (memory, "weights"),
        (bits, "bits a weight"),
    ]
    cells = "".join(_FIGURE.format(escape(value), escape(label)) for value, label in figures)
    return f'<div style="display:flex;flex-wrap:wrap;gap:.4rem 1.4rem;padding-top:.4rem">{cells}</div>'


def show_earlier(exchanges: list[Exchange]) -> None:
    """Exchanges before the last one, folded away."""
    if not exchanges:
        return
    with st.expander(f"Earlier in this conversation ({len(exchanges)})"):
        for exchange in exchanges:
            show_prompt(exchange.prompt)
            for answer, column in zip(exchange.answers, st.columns(2, gap="medium"), strict=True):
                column.text(answer.text or "No text.")


def _heading(exchange: Exchange, side: int) -> str:
    completes = exchange.answers[side].completes
    return f"**{plain(exchange.names[side])}**" + (" · goes on with the text" if completes else "")
