"""The lens on the compare page: which text is looked at, and what both models expected along it."""

from __future__ import annotations

import streamlit as st

from app.compare.models import SIDES
from app.components.lens_view import lens_view
from app.view import guard, number_text
from lbllm.chat.conversation import Conversation, Exchange
from lbllm.chat.duel import given
from lbllm.chat.lens import Lens, lens, same_vocabulary
from lbllm.chat.pool import Slot
from lbllm.errors import ModelError

OWN = "Own text"


def show_lens(conversation: Conversation, slots: tuple[Slot, Slot], names: tuple[str, str]) -> None:
    """The section under the answers; also without any answer, for a text of one's own."""
    st.subheader("Lens", help="KL(teacher ‖ student), the divergence of what the two models expect next, in nats.")
    if any(slot.state == "failed" for slot in slots):
        st.caption("The lens needs both models.")
        return
    if not all(slot.over for slot in slots):
        st.caption("The lens opens when both models are loaded.")
        return
    if slots[0] is slots[1]:
        st.caption("Both sides are the same model, so both expect the same. Choose two models to see where they part.")
        return
    _lens_section(conversation, slots, names)


@st.fragment
def _lens_section(conversation: Conversation, slots: tuple[Slot, Slot], names: tuple[str, str]) -> None:
    with guard():
        last = conversation.exchanges[-1] if conversation.exchanges else None
        # An answer to look at must be one of these two models'.
        if last is None or last.names != names:
            last = None
        teacher, student = order(slots)
        texts = [f"{SIDES[side].capitalize()} answer" for side in (teacher, student)] if last else []
        text, side = _text([*texts, OWN], last, (teacher, student))
        if not text.strip():
            st.caption("Write a text, or ask both models something, to see where they expect different words.")
            return
        found = look(conversation, slots, (teacher, student), last if side is not None else None, text)
        st.markdown(
            f"Along this text both models expect the same next token **{100 * found.agreement:.0f} %** of the time; "
            f"the mean divergence is **{number_text(found.mean_kl)}** nats a token. The stronger a colour, the further "
            f"is what the {SIDES[student]} model expects from what the {SIDES[teacher]} one does."
        )
        lens_view(found, names=(names[teacher], names[student]), key="compare_lens")
        if found.left_out:
            st.caption(f"The last {found.left_out} tokens of the text are left out.")


def order(slots: tuple[Slot, Slot]) -> tuple[int, int]:
    """Which side is the teacher and which the student: the left one teaches, unless it alone is binarized."""
    packed = [slot.loaded.packed for slot in slots]
    return (1, 0) if packed[0] and not packed[1] else (0, 1)


def look(
    conversation: Conversation,
    slots: tuple[Slot, Slot],
    sides: tuple[int, int],
    exchange: Exchange | None,
    text: str,
) -> Lens:
    """The lens over a text, as an answer in ``exchange`` or by itself. The last one is kept for this session.

    Raises ModelError where the two models can't be compared token by token.
    """
    key = (tuple(slot.name for slot in slots), sides, exchange.id if exchange else None, text)
    kept = st.session_state.get("compare_lens_kept")
    if kept is not None and kept[0] == key:
        found: Lens = kept[1]
        return found
    teacher, student = (slots[side].loaded for side in sides)
    if not same_vocabulary(teacher.tokenizer, student.tokenizer):
        raise ModelError(
            "The lens compares models that cut text into the same tokens, and these two don't; choose a student and "
            "the teacher it was made from"
        )
    messages, template = None, True
    if exchange is not None:
        settings = exchange.settings[sides[0]]
        template = settings.template
        messages = given(teacher, conversation.messages(exchange, sides[0]), settings)
    with st.spinner("Both models read the text"):
        found = lens(teacher.model, student.model, teacher.tokenizer, text, messages=messages, template=template)
    st.session_state["compare_lens_kept"] = (key, found)
    if exchange is not None:
        exchange.lens = found, (exchange.names[sides[0]], exchange.names[sides[1]])
    return found


def _text(options: list[str], last: Exchange | None, sides: tuple[int, int]) -> tuple[str, int | None]:
    """The text to look at, and whose answer it is: a side, or None for one's own."""
    chosen = OWN
    if len(options) > 1:
        chosen = st.segmented_control(
            "Text", options, default=options[0], required=True, key="compare_lens_text", label_visibility="collapsed"
        )
    if chosen != OWN and last is not None and chosen in options:
        side = sides[options.index(chosen)]
        return last.answers[side].text, side
    own = st.text_area(
        "Text to look at",
        key="compare_lens_own",
        persist_state="session",
        height=100,
        max_chars=4000,
        placeholder="Any text, read by both models from its first word on",
    )
    return own or "", None
