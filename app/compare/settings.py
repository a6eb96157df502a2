"""The settings of both sides of the compare page: the same for both, or some that differ."""

from __future__ import annotations

import streamlit as st

from lbllm.chat.settings import ChatSettings

_FIRST = ChatSettings()


def settings() -> tuple[ChatSettings, ChatSettings, bool]:
    """The settings of the left and the right side, and whether they answer in turn; draws their controls in a
    popover."""
    with st.popover("Settings", icon=":material/tune:", width="stretch"):
        timed = st.toggle(
            "One after the other",
            key="compare_timed",
            persist_state="session",
            help="For clean figures: the right model begins when the left one has ended, so neither takes the other's "
            "processor time.",
        )
        apart = st.toggle(
            "Two settings",
            key="compare_apart",
            persist_state="session",
            help="Give each side its own settings, for example one model at two temperatures.",
        )
        if not apart:
            both = _controls("both")
            return both, both, timed
        left, right = st.columns(2, gap="large")
        with left:
            st.markdown("**Left**")
            first = _controls("left")
        with right:
            st.markdown("**Right**")
            second = _controls("right")
    return first, second, timed


def _controls(side: str) -> ChatSettings:
    def key(name: str) -> str:
        return f"compare_{name}_{side}"

    temperature = st.slider(
        "Temperature",
        0.0,
        2.0,
        _FIRST.temperature,
        0.05,
        key=key("temperature"),
        persist_state="session",
        help="How much chance there is in an answer. 0: always the most likely token.",
    )
    top_p = st.slider(
        "Top-p",
        0.05,
        1.0,
        _FIRST.top_p,
        0.05,
        key=key("top_p"),
        persist_state="session",
        help="Draw from the most likely tokens that together have this probability.",
    )
    repetition_penalty = st.slider(
        "Repetition penalty",
        1.0,
        1.5,
        _FIRST.repetition_penalty,
        0.05,
        key=key("repetition_penalty"),
        persist_state="session",
        help="Makes words that the answer has already less likely, so that it doesn't go in circles. 1: none.",
    )
    columns = st.columns(2)
    seed = columns[0].number_input(
        "Seed",
        0,
        2**31 - 1,
        _FIRST.seed,
        key=key("seed"),
        persist_state="session",
        help="The same seed gives the same answer again.",
    )
    length = columns[1].number_input(
        "Longest answer",
        1,
        4096,
        _FIRST.max_new_tokens,
        8,
        key=key("length"),
        persist_state="session",
        help="In tokens, about three quarters of a word each.",
    )
    system = st.text_area(
        "System prompt",
        key=key("system"),
        persist_state="session",
        height=80,
        max_chars=4000,
        placeholder="None",
        help="What the model is told before the conversation. Base models are not given one.",
    )
    template = st.toggle(
        "Chat template",
        True,
        key=key("template"),
        persist_state="session",
        help="Off: the model goes on with your text instead of answering it.",
    )
    return ChatSettings(
        system=system or "",
        template=template,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=length,
    )
