"""Show one exchange on the Compare page: the prompt, two answers, their figures, and where they differ."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.components.lens_view import answer_view
from app.view import plain, size_text
from lbllm.chat.conversation import Exchange
from lbllm.chat.duel import Answer
from lbllm.chat.lens import first_difference
from lbllm.labels import bits_name
from lbllm.templates import environment

_STATES = {"waiting": "Waiting for the model", "reading": "Reading the prompt", "writing": "Writing"}
Place = tuple[DeltaGenerator, DeltaGenerator]
_TEMPLATES = environment(__file__)


def show_prompt(prompt: str) -> None:
    """Show the prompt above both answers, as plain text."""
    with st.chat_message("user", avatar=":material/person:"):
        st.text(prompt)


def show_exchange(exchange: Exchange) -> list[Place]:
    """Show the two answers to the prompt. Return the places into which ``show_live`` writes them while they grow.

    Growing and finished answers have the same elements, so that the browser keeps them when an answer is finished.
    """
    left, right = exchange.answers
    over = exchange.duel.over
    at = first_difference(left.text, right.text) if over and left.text and right.text else None
    places = []
    for side, (answer, column) in enumerate(zip(exchange.answers, st.columns(2, gap="medium"), strict=True)):
        with column, st.container(border=True, key=f"compare_answer_{side}"):
            completes = " · continues the text" if answer.completes else ""
            st.markdown(f"**{plain(exchange.names[side])}**{completes}")
            text = st.empty()
            answer_view(_final_text(answer) if over else None, at=at, key=f"compare_text_{side}")
            places.append((text, st.empty()))
            if over:
                _write_end(answer, *places[-1])
    return places


def show_live(exchange: Exchange, places: list[Place], elapsed: float) -> None:
    """Write the present state of both answers into their places."""
    for answer, (text, figures) in zip(exchange.answers, places, strict=True):
        if answer.error:
            text.error(plain(answer.error))
        elif answer.text:
            # The block marks the place of the next word.
            text.text(answer.text + ("" if answer.over else " ▌"))
        elif not answer.over:
            text.caption(f"{_STATES[answer.state]}, {elapsed:.0f} s")
        figures.html(figures_html(answer))


def _write_end(answer: Answer, text: DeltaGenerator, figures: DeltaGenerator) -> None:
    if answer.error:
        text.error(plain(answer.error))
    elif not answer.text:
        text.caption("Stopped before the first word." if answer.state == "stopped" else "No text.")
    if answer.tokens:
        figures.html(figures_html(answer))


def _final_text(answer: Answer) -> str:
    return answer.text + (" …" if answer.state == "stopped" and answer.text else "")


def difference_text(left: str, right: str) -> str:
    """Return a sentence on where two answers begin to differ."""
    at = first_difference(left, right)
    if at is None:
        return "Both answers are the same, word for word."
    words = len(left[:at].split())
    if words == 0:
        return "The answers differ from the first word."
    return f"The answers agree for {words} word{'s' if words > 1 else ''}; the mark shows where they begin to differ."


def figures_html(answer: Answer) -> str:
    """Return the measurements of an answer as HTML."""
    speed = f"{answer.tokens_per_second:.1f}" if answer.tokens_per_second else "–"
    first = f"{answer.first_token_seconds:.2f} s" if answer.tokens else "–"
    memory = size_text(answer.weight_bytes) if answer.weight_bytes else "–"
    bits = f"{answer.bpw:.2f}" if answer.bpw else "–"
    figures = [
        (speed, "tokens/s, alone" if answer.timed else "tokens/s"),
        (first, "first token"),
        (memory, "weights"),
        (bits, bits_name(packed=answer.packed)),
    ]
    return _TEMPLATES.get_template("figures.html.jinja").render(figures=figures)


def show_earlier(exchanges: list[Exchange]) -> None:
    """Show the exchanges before the last one, collapsed."""
    if not exchanges:
        return
    with st.expander(f"Earlier in this conversation ({len(exchanges)})"):
        for exchange in exchanges:
            show_prompt(exchange.prompt)
            for answer, column in zip(exchange.answers, st.columns(2, gap="medium"), strict=True):
                column.text(answer.text or "No text.")
