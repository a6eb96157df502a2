"""Compare: one prompt, two models, both answers at the same time."""

from __future__ import annotations

import time

import streamlit as st
from streamlit.runtime.scriptrunner import StopException

from app.compare_answers import difference_text, live_places, show_earlier, show_finished, show_live, show_prompt
from app.compare_lens import kept_lens, show_lens
from app.compare_models import SIDES, choices, hold, pick, resolve, show_state
from app.compare_settings import settings
from app.compare_votes import show_votes, votes_of
from app.view import guard, plain
from lbllm.chat_settings import ChatSettings
from lbllm.comparison_page import comparison_page
from lbllm.conversation import Conversation
from lbllm.errors import LbllmError
from lbllm.pool import Slot
from lbllm.prompts import example_prompts

# Ten times a second reads as flowing, and costs the generating threads next to nothing.
TICK = 0.1


def conversation() -> Conversation:
    """This session's conversation."""
    found: Conversation = st.session_state.setdefault("compare_conversation", Conversation())
    return found


def contenders(names: tuple[str, str], both: tuple[ChatSettings, ChatSettings]) -> tuple[str, str]:
    """Names of the sides for headings and votes: where the models are the same, with the settings that differ."""
    if names[0] != names[1]:
        return names
    apart = both[0].differences(both[1])
    sides = [", ".join(f"{name} {values[side]}" for name, values in apart.items()) for side in (0, 1)]
    return f"{names[0]} ({sides[0] or 'left'})", f"{names[1]} ({sides[1] or 'right'})"


def ask(prompt: str) -> None:
    """Let both models answer with what the page now shows."""
    prompt = prompt.strip()
    ready = st.session_state.get("compare_ready")
    if not prompt or ready is None or conversation().running:
        return
    slots, names, both, timed = ready
    conversation().ask(prompt, slots, names, both, timed=timed)
    st.session_state.pop("compare_editing", None)


def asked() -> None:
    """The prompt box was sent."""
    ask(st.session_state["compare_prompt"] or "")


def regenerate(seed: int) -> None:
    """Answer the last prompt once more, with another seed."""
    slots, names, both, timed = st.session_state["compare_ready"]
    prompt = conversation().drop_last()
    fresh = tuple(own.model_copy(update={"seed": own.seed + seed}) for own in both)
    conversation().ask(prompt, slots, names, (fresh[0], fresh[1]), timed=timed)


def edit() -> None:
    """Open the last prompt for editing."""
    st.session_state["compare_editing"] = True


def ask_edited() -> None:
    """Put the edited prompt in the last one's place."""
    text = st.session_state["compare_edited"].strip()
    if text:
        conversation().drop_last()
        ask(text)


def clear() -> None:
    """Begin anew."""
    conversation().clear()
    st.session_state.pop("compare_editing", None)


def top() -> tuple[tuple[Slot, Slot], tuple[str, str]] | None:
    """Model pickers and settings; the slots and names of both sides, None where a pick can't be used."""
    offered = choices()
    columns = st.columns(2, gap="medium")
    values = []
    for side, column in zip(SIDES, columns, strict=True):
        with column:
            values.append(pick(side, offered))
    picked: list[tuple[str, str]] = []
    for value, column in zip(values, columns, strict=True):
        try:
            picked.append(resolve(value, offered))
        except LbllmError as error:
            with column:
                st.error(plain(str(error)))
    states = [column.container() for column in columns]
    bar = st.columns([1.2, 1.2, 2.4, 3], vertical_alignment="center")
    with bar[0]:
        both = settings()
    with bar[1]:
        examples_menu()
    timed = bar[2].toggle(
        "One after the other",
        key="compare_timed",
        persist_state="session",
        help="For clean figures: the right model begins when the left one has ended, so neither takes the other's "
        "processor time.",
    )
    if len(picked) < 2:
        st.session_state.pop("compare_ready", None)
        return None
    (left, left_name), (right, right_name) = picked
    slots = hold(((left_name, both[0].expand), (right_name, both[1].expand)))
    for slot, place, side in zip(slots, states, SIDES, strict=True):
        with place:
            show_state(slot, side)
    names = contenders((left, right), both)
    st.session_state["compare_ready"] = (slots, names, both, timed)
    return slots, names


def examples_menu() -> None:
    """Example prompts by kind; a click asks."""
    with st.popover("Examples", icon=":material/lightbulb:", width="stretch"):
        for kind in example_prompts():
            st.markdown(f"**{kind.kind}**")
            for prompt in kind.prompts:
                st.button(plain(prompt), key=f"compare_menu_{prompt}", type="tertiary", on_click=ask, args=(prompt,))


def empty() -> None:
    """The page before the first prompt: what it does, and prompts to begin with."""
    st.space("small")
    st.markdown("#### Ask both models the same thing")
    st.caption(
        "The left model is the teacher in full precision, the right one the same model with about two bits a weight. "
        "Both answer at the same time; then you see where they part, and what each of them expected."
    )
    kinds = example_prompts()
    chosen = st.segmented_control(
        "Kind of prompt",
        [kind.kind for kind in kinds],
        default=kinds[0].kind,
        required=True,
        key="compare_kind",
        label_visibility="collapsed",
    )
    prompts = next(kind.prompts for kind in kinds if kind.kind == chosen)
    for number, column in enumerate(st.columns(2) * 2):
        if number < len(prompts):
            column.button(
                plain(prompts[number]),
                key=f"compare_example_{number}",
                width="stretch",
                on_click=ask,
                args=(prompts[number],),
            )


def running(talk: Conversation) -> None:
    """The exchange that is being written: both answers grow here until both have ended."""
    exchange = talk.exchanges[-1]
    show_prompt(exchange.prompt)
    places = live_places(exchange)
    st.button("Stop", icon=":material/stop:", type="primary", key="compare_stop", on_click=exchange.duel.stop)
    try:
        while not exchange.duel.over:
            show_live(exchange, places, time.monotonic() - exchange.duel.started)
            time.sleep(TICK)
    except StopException:
        # The session has ended: nobody reads the rest.
        exchange.duel.stop()
        raise
    st.rerun()


def finished(talk: Conversation, slots: tuple[Slot, Slot], names: tuple[str, str]) -> None:
    """The last exchange with what can be done with it."""
    exchange = talk.exchanges[-1]
    if st.session_state.get("compare_editing"):
        with st.form("compare_edit"):
            st.text_area("Edit the prompt", exchange.prompt, key="compare_edited", max_chars=8000)
            st.form_submit_button("Ask again", type="primary", on_click=ask_edited)
    else:
        show_prompt(exchange.prompt)
    show_finished(exchange)
    left, right = exchange.answers
    if left.text and right.text:
        st.markdown(difference_text(left.text, right.text))
        show_votes(exchange)
    seed = exchange.settings[0].seed - st.session_state["compare_ready"][2][0].seed + 1
    buttons = st.columns([1, 1, 1, 1.2, 2])
    buttons[0].button(
        "Regenerate",
        icon=":material/refresh:",
        key="compare_regenerate",
        width="stretch",
        help="Answer again with the next seed.",
        on_click=regenerate,
        args=(max(seed, 1),),
    )
    buttons[1].button("Edit", icon=":material/edit:", key="compare_edit_open", width="stretch", on_click=edit)
    buttons[2].button("Clear", icon=":material/delete:", key="compare_clear", width="stretch", on_click=clear)
    buttons[3].download_button(
        "Save as page",
        lambda: comparison_page(talk.exchanges, votes=votes_of(talk.exchanges), lens=kept_lens(exchange)),
        "comparison.html",
        "text/html",
        icon=":material/download:",
        key="compare_save",
        width="stretch",
        on_click="ignore",
        help="One HTML file with the prompts, both answers, their figures and the lens.",
    )
    show_lens(talk, slots, names)


def page() -> None:
    """The whole page."""
    st.header("Compare")
    talk = conversation()
    ready = top()
    st.chat_input("Ask both models", key="compare_prompt", on_submit=asked, max_chars=8000, disabled=talk.running)
    if ready is None:
        return
    show_earlier(talk.exchanges[:-1])
    if talk.running:
        running(talk)
    elif talk.exchanges:
        finished(talk, *ready)
    else:
        empty()
        show_lens(talk, *ready)


with guard():
    page()
