"""Compare: one prompt, two models, both answers at the same time."""

from __future__ import annotations

import time
from functools import partial

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import visits
from app.compare.answers import difference_text, prompt_bubble, show_earlier, show_exchange, show_live, show_prompt
from app.compare.lens import complete, show_lens
from app.compare.models import (
    SIDES,
    Offer,
    allow,
    allowed,
    choices,
    hold,
    mode_switch,
    pick,
    resolve,
    show_state,
    write_state,
)
from app.compare.settings import chosen, current, settings
from app.compare.votes import show_votes, votes_of
from app.view import guard, plain
from lbllm.chat.conversation import Conversation, Exchange
from lbllm.chat.page import comparison_page
from lbllm.chat.pool import Slot
from lbllm.chat.settings import ChatSettings
from lbllm.errors import LbllmError
from lbllm.texts.prompts import example_prompts

# Ten times a second looks smooth, and costs the generating threads next to nothing.
TICK = 0.1


def conversation() -> Conversation:
    """This session's conversation, which a reload of the page keeps."""
    return visits.kept().conversation


def contenders(names: tuple[str, str], both: tuple[ChatSettings, ChatSettings]) -> tuple[str, str]:
    """Names of the sides for headings and votes: if the models are the same, with the settings that differ."""
    if names[0] != names[1]:
        return names
    left, right = both
    return f"{names[0]} ({left.apart_from(right) or 'left'})", f"{names[1]} ({right.apart_from(left) or 'right'})"


def ask(prompt: str) -> None:
    """Let both models answer with what the page now shows."""
    prompt = prompt.strip()
    ready = st.session_state.get("compare_ready")
    if not prompt or ready is None or conversation().running:
        return
    slots, titles = ready
    left, right, timed = current()
    conversation().ask(prompt, slots, contenders(titles, (left, right)), (left, right), timed=timed)
    st.session_state.pop("compare_editing", None)


def asked() -> None:
    """A prompt was sent."""
    ask(st.session_state["compare_prompt"] or "")


def regenerate() -> None:
    """Answer the last prompt once more, from the same beginning, each side with its next seed: the same one would
    write the same again."""
    slots, titles = st.session_state["compare_ready"]
    *both, timed = current()
    last = conversation().exchanges[-1]
    seeds = [own.seed + 1 for own in last.settings]
    prompt = conversation().drop_last()
    left, right = (own.model_copy(update={"seed": seed}) for own, seed in zip(both, seeds, strict=True))
    names = contenders(titles, (both[0], both[1]))
    again = conversation().ask(prompt, slots, names, (left, right), timed=timed, begun=last.begun)
    again.before = last.before


def stop() -> None:
    """End the answers that are being written."""
    conversation().exchanges[-1].duel.stop()


def edit() -> None:
    """Open the last prompt for editing."""
    st.session_state["compare_editing"] = True


def cancel_edit() -> None:
    """Close the last prompt's form; the prompt stays as it was."""
    st.session_state.pop("compare_editing", None)


def ask_edited() -> None:
    """Put the edited prompt in the last one's place."""
    text = st.session_state["compare_edited"].strip()
    if text:
        conversation().drop_last()
        ask(text)


def go_on(begun: str, token: str) -> None:
    """Let both models answer the last prompt from the beginning ``begun`` and the ``token`` after it."""
    ready = st.session_state.get("compare_ready")
    if ready is not None and not conversation().running:
        st.session_state["compare_went_on"] = True
        conversation().go_on(begun + token, ready[0], timed=current()[2])


def back() -> None:
    """Bring back the answers from before a token was chosen in the lens."""
    conversation().back()


def clear() -> None:
    """Begin anew."""
    conversation().clear()
    st.session_state.pop("compare_editing", None)


def pickers() -> tuple[tuple[Offer, Offer] | None, list[str], list[DeltaGenerator]]:
    """Both model pickers. Return what was picked, None if one of the picks can't be used, the picks that wait for a
    click because a link chose them, and a place under each picker."""
    offered = choices()
    columns = st.columns(2, gap="medium")
    values = []
    for side, column in zip(SIDES, columns, strict=True):
        with column:
            values.append(pick(side, offered))
    picked, waiting, places = [], [], []
    for side, value, column in zip(SIDES, values, columns, strict=True):
        places.append(column.empty())
        try:
            picked.append(resolve(value, offered))
            with column:
                mode_switch(side, picked[-1])
        except LbllmError as error:
            column.error(plain(str(error)))
        if not allowed(side, value):
            waiting.append(value)
    return (picked[0], picked[1]) if len(picked) == 2 else None, waiting, places


def composer(talk: Conversation, *, ready: bool) -> None:
    """Prompt box, stop, settings, examples."""
    closed = talk.running or not ready
    # Not at the window's lower edge: there it would scroll the page down with every new word.
    with st.container(horizontal=True, vertical_alignment="center", key="compare_composer"):
        with st.container():
            st.chat_input("Ask both models", key="compare_prompt", on_submit=asked, max_chars=8000, disabled=closed)
        st.button(
            "Stop",
            icon=":material/stop:",
            type="primary" if talk.running else "secondary",
            key="compare_stop",
            disabled=not talk.running,
            on_click=stop,
        )
        settings()
        with st.popover("Examples", icon=":material/lightbulb:"):
            for kind in example_prompts():
                st.markdown(f"**{kind.kind}**")
                for prompt in kind.prompts:
                    st.button(
                        plain(prompt),
                        key=f"compare_menu_{prompt}",
                        type="tertiary",
                        on_click=ask,
                        args=(prompt,),
                        disabled=closed,
                    )


def welcome() -> None:
    """The page before the first prompt: what it does, and prompts to begin with."""
    st.space("small")
    st.markdown("#### Ask both models the same thing")
    st.caption(
        "By default the left model is the teacher in full precision, and the right one the same model with its weights "
        "in about two bits each. Both answer at the same time; then you see where the answers begin to differ, and "
        "what each model expected."
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


def running(exchange: Exchange, slots: tuple[Slot, Slot] | None, states: list[DeltaGenerator]) -> None:
    """The exchange that is being written: both answers grow here until both have ended."""
    with prompt_bubble():
        show_prompt(exchange.prompt)
    places = show_exchange(exchange)
    # A page that is closed or reloaded does not end the answers: after a reload it shows what was written meanwhile.
    while not exchange.duel.over:
        show_live(exchange, places, time.monotonic() - exchange.duel.started)
        for slot, state in zip(slots or (), states, strict=False):
            write_state(slot, state)
        time.sleep(TICK)
    st.rerun()


def finished(exchange: Exchange) -> None:
    """The last exchange, its prompt open for editing where that was asked for."""
    with prompt_bubble():
        if st.session_state.get("compare_editing"):
            with st.form("compare_edit", border=False):
                st.text_area("Edit the prompt", exchange.prompt, key="compare_edited", max_chars=8000)
                with st.container(horizontal=True):
                    st.form_submit_button("Ask again", type="primary", on_click=ask_edited)
                    st.form_submit_button("Cancel", on_click=cancel_edit)
        else:
            with st.container(horizontal=True, vertical_alignment="top"):
                with st.container():
                    show_prompt(exchange.prompt)
                st.button("Edit", icon=":material/edit:", key="compare_edit_open", type="tertiary", on_click=edit)
    show_exchange(exchange)


def save(talk: Conversation, slots: tuple[Slot, Slot], names: tuple[str, str]) -> str:
    """The conversation as a page of HTML, with a lens for every exchange of the models that are loaded."""
    complete(talk, slots, names)
    return comparison_page(talk.exchanges, votes=votes_of(talk.exchanges))


def actions(talk: Conversation, slots: tuple[Slot, Slot], names: tuple[str, str]) -> None:
    """What can be done with the last exchange."""
    exchange = talk.exchanges[-1]
    left, right = exchange.answers
    if left.text and right.text:
        st.markdown(difference_text(left.text, right.text, exchange.begun))
        show_votes(exchange)
    with st.container(horizontal=True):
        st.button(
            "Regenerate",
            icon=":material/refresh:",
            key="compare_regenerate",
            help="Answer again, with the next seed.",
            on_click=regenerate,
        )
        if exchange.before is not None:
            st.button(
                "Back",
                icon=":material/undo:",
                key="compare_back",
                help="Bring back the answers from before a token was chosen in the lens.",
                on_click=back,
            )
        st.button("Clear", icon=":material/delete:", key="compare_clear", on_click=clear)
        st.download_button(
            "Save as page",
            partial(save, talk, slots, names),
            "comparison.html",
            "text/html",
            icon=":material/download:",
            key="compare_save",
            on_click="ignore",
            help="One HTML file with the prompts, both answers, their figures and the lens of each.",
        )


def ask_to_load(values: list[str]) -> None:
    """Say that a link chose models, and let the user load them."""
    names = " and ".join(f"**{plain(value)}**" for value in dict.fromkeys(values))
    st.info(f"The link that opened this page chose {names}. Nothing is loaded until you say so.")
    st.button("Load these models", type="primary", key="compare_load", on_click=allow, args=tuple(values))


def page() -> None:
    """The whole page."""
    visits.arrive()
    talk = conversation()
    picked, waiting, states = pickers()
    ready = picked is not None and not waiting
    composer(talk, ready=ready)
    visits.kept().settings = chosen()
    # A place for each state of the page: the one that is not filled vanishes at once, not at the end of the script.
    beginning, earlier, stage, below, lens = (st.empty() for _ in range(5))
    slots, names = None, ("", "")
    st.session_state.pop("compare_ready", None)
    if picked is not None and waiting:
        with beginning.container():
            ask_to_load(waiting)
    elif picked is not None:
        slots = hold((picked[0].name, picked[1].name))
        titles = (picked[0].title, picked[1].title)
        left, right, _ = current()
        names = contenders(titles, (left, right))
        st.session_state["compare_ready"] = (slots, titles)
    if slots is not None and not talk.running:
        for slot, place, side in zip(slots, states, SIDES, strict=True):
            with place.container():
                show_state(slot, side)
    if slots is not None and not talk.exchanges:
        with beginning.container():
            welcome()
    if len(talk.exchanges) > 1:
        with earlier.container():
            show_earlier(talk.exchanges[:-1])
    if talk.running:
        with stage.container():
            running(talk.exchanges[-1], slots, states)
    elif talk.exchanges:
        with stage.container():
            finished(talk.exchanges[-1])
        if slots is not None:
            with below.container():
                actions(talk, slots, names)
    if slots is not None:
        with lens.container():
            show_lens(talk, slots, names, go_on)


with guard():
    page()
