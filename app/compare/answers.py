"""Show one exchange on the Compare page: the prompt, two answers, their figures, and where they differ."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.components.lens_view import answer_view, tabs_view
from app.view import plain, size_text
from lbllm.chat.conversation import Exchange
from lbllm.chat.duel import Answer
from lbllm.chat.lens import first_difference
from lbllm.chat.page import folded
from lbllm.labels import bits_name
from lbllm.templates import environment

_STATES = {"waiting": "Waiting for the model", "reading": "Reading the prompt", "writing": "Writing"}
Place = tuple[DeltaGenerator, DeltaGenerator]
_TEMPLATES = environment(__file__)


def prompt_bubble() -> DeltaGenerator:
    """Return the place of a prompt, above both answers."""
    return st.chat_message("user", avatar=":material/person:")


def show_prompt(prompt: str) -> None:
    """Show a prompt as plain text; a long one is folded."""
    st.html(_TEMPLATES.get_template("prompt.html.jinja").render(text=prompt, beginning=folded(prompt)))


def show_exchange(exchange: Exchange) -> list[Place]:
    """Show the two answers to the prompt. Return the places into which ``show_live`` writes them while they grow.

    Growing and finished answers have the same elements, so that the browser keeps them when an answer is finished.
    """
    left, right = exchange.answers
    over = exchange.duel.over
    at = first_difference(left.text, right.text) if over and left.text and right.text else None
    places = []
    with st.container(key="compare_tabs"):
        tabs_view(("Left answer", "Right answer"), key="compare_tabs_view")
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
    for side, (answer, (text, figures)) in enumerate(zip(exchange.answers, places, strict=True)):
        if answer.error:
            text.error(plain(answer.error))
        elif answer.text:
            # The block marks the place of the next word.
            written = answer.text + ("" if answer.over else " ▌")
            text.html(_TEMPLATES.get_template("prompt.html.jinja").render(text=written, beginning=""))
        elif not answer.over:
            text.caption(f"{turn_text(exchange, side)}, {elapsed:.0f} s")
        figures.html(figures_html(answer))


def turn_text(exchange: Exchange, side: int) -> str:
    """Return what the model of a side, which has written nothing yet, is doing, or whom it waits for."""
    answer, other = exchange.answers[side], exchange.answers[1 - side]
    if answer.timed and answer.state == "waiting" and side == 1 and not other.over:
        return f"One after the other: it is the turn of the left model, {plain(exchange.names[0])}"
    return _STATES[answer.state]


def _write_end(answer: Answer, text: DeltaGenerator, figures: DeltaGenerator) -> None:
    if answer.error:
        text.error(plain(answer.error))
    elif not answer.text:
        text.caption("Stopped before the first word." if answer.state == "stopped" else "No text.")
    if answer.tokens:
        figures.html(figures_html(answer) + cut_html(answer))


def cut_html(answer: Answer) -> str:
    """Return a note as HTML if the limit of tokens cut a finished answer off."""
    if not answer.cut or answer.state != "done":
        return ""
    return _TEMPLATES.get_template("cut.html.jinja").render(tokens=answer.cut)


def _final_text(answer: Answer) -> str:
    return answer.text + (" …" if answer.state == "stopped" and answer.text else "")


def difference_text(left: str, right: str, begun: str = "") -> str:
    """Return a sentence on where two answers begin to differ; both were given the beginning ``begun``."""
    at = first_difference(left, right)
    if begun:
        given = len(begun.split())
        same = "Both answers are the same" if at is None else "The mark shows where the answers begin to differ"
        return f"{same}. Both were given the first {given} word{'s' if given > 1 else ''}, as chosen in the lens."
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
            with prompt_bubble():
                show_prompt(exchange.prompt)
            for name, answer, column in zip(exchange.names, exchange.answers, st.columns(2, gap="medium"), strict=True):
                column.markdown(f"**{plain(name)}**")
                text = answer.text or "No text."
                column.html(
                    _TEMPLATES.get_template("prompt.html.jinja").render(text=text, beginning="") + cut_html(answer)
                )
