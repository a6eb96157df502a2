"""The lens on the compare page: choose a text, and see which tokens both models expected in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import streamlit as st

from app.compare.models import SIDES
from app.components.lens_view import lens_view
from app.view import guard, number_text
from lbllm.chat.conversation import Conversation, Exchange
from lbllm.chat.duel import visible_messages
from lbllm.chat.lens import Lens, lens, same_vocabulary
from lbllm.chat.pool import Slot
from lbllm.errors import ModelError

OWN = "Own text"


def show_lens(
    conversation: Conversation,
    slots: tuple[Slot, Slot],
    names: tuple[str, str],
    go: Callable[[str, str], None],
) -> None:
    """Show the section under the answers; it also works without an answer, for the user's own text.

    ``go`` gets the beginning of an answer and the token that was chosen after it.
    """
    st.subheader("Lens", help="KL(teacher ‖ student): how far the two models' predictions differ, in nats.")
    if any(slot.state == "failed" for slot in slots):
        st.caption("The lens needs both models.")
        return
    if not all(slot.over for slot in slots):
        st.caption("The lens opens when both models are loaded.")
        return
    if slots[0] is slots[1]:
        st.caption("Both sides are the same model, so both predict the same. Choose two models to compare them.")
        return
    _lens_section(conversation, slots, names, go)


@st.fragment
def _lens_section(
    conversation: Conversation,
    slots: tuple[Slot, Slot],
    names: tuple[str, str],
    go: Callable[[str, str], None],
) -> None:
    with guard():
        if st.session_state.pop("compare_went_on", False):
            st.rerun()  # the click ran this part of the page alone
        last = conversation.exchanges[-1] if conversation.exchanges else None
        # Only answers of the two chosen models can be analysed.
        if last is None or last.names != names:
            last = None
        teacher, student = order(slots)
        texts = [f"{SIDES[side].capitalize()} answer" for side in (teacher, student)] if last else []
        text, side = _text([*texts, OWN], last, (teacher, student))
        if not text.strip():
            st.caption("Write a text, or ask both models a question, to see where they expect different words.")
            return
        found = look(conversation, slots, (teacher, student), last if side is not None else None, text)
        st.markdown(
            f"In this text both models expect the same next token **{100 * found.agreement:.0f} %** of the time; "
            f"the mean divergence is **{number_text(found.mean_kl)}** nats per token. A stronger colour means a larger "
            f"difference between the predictions of the {SIDES[student]} and the {SIDES[teacher]} model."
        )
        shown = (names[teacher], names[student])
        lens_view(found, names=shown, key="compare_lens", go=go if side is not None else None)
        if found.left_out:
            st.caption(f"The last {found.left_out} tokens of the text are not included.")


def order(slots: tuple[Slot, Slot]) -> tuple[int, int]:
    """Return the sides of teacher and student: the left side is the teacher, unless only the left one is binarized."""
    packed = [slot.loaded.packed for slot in slots]
    return (1, 0) if packed[0] and not packed[1] else (0, 1)


def look(
    conversation: Conversation,
    slots: tuple[Slot, Slot],
    sides: tuple[int, int],
    exchange: Exchange | None,
    text: str,
) -> Lens:
    """Return the lens over a text, as an answer in ``exchange`` or without a context. The session keeps the last lens.

    Raises ModelError if the two models can't be compared token by token.
    """
    key = (tuple(slot.name for slot in slots), sides, exchange.id if exchange else None, text)
    kept = st.session_state.get("compare_lens_kept")
    if kept is not None and kept[0] == key:
        found: Lens = kept[1]
        return found
    with st.spinner("Both models are reading the text"):
        found = _lens_of(conversation, slots, sides, exchange, text)
    st.session_state["compare_lens_kept"] = (key, found)
    return found


def complete(conversation: Conversation, slots: tuple[Slot, Slot], names: tuple[str, str]) -> None:
    """Give every exchange of these two models a lens that has none yet, over the teacher's answer, where that is
    possible."""
    if slots[0] is slots[1] or not all(slot.state == "ready" for slot in slots):
        return
    sides = order(slots)
    for exchange in conversation.exchanges:
        text = exchange.answers[sides[0]].text
        if exchange.lens is None and exchange.names == names and text.strip():
            with suppress(ModelError):
                _lens_of(conversation, slots, sides, exchange, text)


def _lens_of(
    conversation: Conversation,
    slots: tuple[Slot, Slot],
    sides: tuple[int, int],
    exchange: Exchange | None,
    text: str,
) -> Lens:
    """Compute a lens; that over an answer stays with its exchange, for the saved page."""
    teacher, student = (slots[side].loaded for side in sides)
    if not same_vocabulary(teacher.tokenizer, student.tokenizer):
        raise ModelError(
            "The lens compares only models with the same tokens, and these two have different ones; choose a student "
            "and the teacher it was made from"
        )
    messages, template = None, True
    if exchange is not None:
        settings = exchange.settings[sides[0]]
        template = settings.template
        messages = visible_messages(teacher, conversation.messages(exchange, sides[0]), settings)
    found = lens(teacher.model, student.model, teacher.tokenizer, text, messages=messages, template=template)
    if exchange is not None:
        exchange.lens = found, (exchange.names[sides[0]], exchange.names[sides[1]])
    return found


def _text(options: list[str], last: Exchange | None, sides: tuple[int, int]) -> tuple[str, int | None]:
    """Return the text to analyse and the side whose answer it is, or None for the user's own text."""
    chosen = OWN
    if len(options) > 1:
        chosen = st.segmented_control(
            "Text", options, default=options[0], required=True, key="compare_lens_text", label_visibility="collapsed"
        )
    if chosen != OWN and last is not None and chosen in options:
        side = sides[options.index(chosen)]
        return last.answers[side].text, side
    own = st.text_area(
        "Text to analyse",
        key="compare_lens_own",
        persist_state="session",
        height=100,
        max_chars=4000,
        placeholder="Any text; both models read it from its first word",
    )
    return own or "", None
