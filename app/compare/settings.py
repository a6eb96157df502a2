"""The settings of both sides of the compare page: the same for both, or separate ones."""

from __future__ import annotations

from typing import Any

import streamlit as st

from lbllm.chat.settings import ChatSettings
from lbllm.fields import bounds

_FIRST = ChatSettings()
# The range of a widget, if it is smaller than the allowed range.
_OFFERED: dict[str, tuple[float, float]] = {
    "top_p": (0.05, 1.0),
    "repetition_penalty": (1.0, 1.5),
    "seed": (0, 2**31 - 1),
}


def settings() -> None:
    """Show the controls in a popover; ``current`` returns what is chosen."""
    with st.popover("Settings", icon=":material/tune:"):
        st.toggle(
            "One after the other",
            key="compare_timed",
            persist_state="session",
            help="For accurate speeds: the right model begins when the left one has ended, so they do not share the "
            "processor.",
        )
        apart = st.toggle(
            "Two settings",
            key="compare_apart",
            persist_state="session",
            on_change=_start_from_shared,
            help="Use separate settings for each side, for example to compare one model at two temperatures.",
        )
        if not apart:
            _controls("both")
            return
        for side, column in zip(("left", "right"), st.columns(2, gap="large"), strict=True):
            with column:
                st.markdown(f"**{side.capitalize()}**")
                _controls(side)


def current() -> tuple[ChatSettings, ChatSettings, bool]:
    """Return the settings of the left and the right side, and whether the models answer one after the other.

    In a callback this is what the page shows at that moment, also if the script has not run since a change.
    """
    state = st.session_state
    sides = ("left", "right") if state.get("compare_apart") else ("both", "both")
    left, right = (_of(side) for side in sides)
    return left, right, bool(state.get("compare_timed"))


def _of(side: str) -> ChatSettings:
    values = {name: st.session_state.get(f"compare_{name}_{side}") for name in ChatSettings.model_fields}
    return ChatSettings(**{name: value for name, value in values.items() if value is not None})


def chosen() -> dict[str, Any]:
    """Return what is chosen in the widgets of this page, by their keys, for a session that continues this one."""
    return {key: st.session_state[key] for key in _keys() if key in st.session_state}


def _keys() -> list[str]:
    names = [f"{name}_{side}" for name in ChatSettings.model_fields for side in ("both", "left", "right")]
    return [f"compare_{name}" for name in (*names, "apart", "timed", "shared")]


def _start_from_shared() -> None:
    """Two settings start from the shared ones. What was chosen for the sides is kept until the shared ones change."""
    state = st.session_state
    shared = {name: state.get(f"compare_{name}_both") for name in ChatSettings.model_fields}
    if state["compare_apart"] and shared != state.get("compare_shared"):
        state["compare_shared"] = shared
        for name, value in shared.items():
            for side in ("left", "right"):
                state[f"compare_{name}_{side}"] = value


def _controls(side: str) -> None:
    def shared(name: str) -> dict[str, Any]:
        """Return the arguments that all widgets of a setting have."""
        field = ChatSettings.model_fields[name]
        key = f"compare_{name}_{side}"
        return {"label": field.title, "help": field.description, "key": key, "persist_state": "session"}

    def number(name: str, step: float) -> dict[str, Any]:
        least, greatest = _OFFERED.get(name) or bounds(ChatSettings.model_fields[name])
        kind = type(step)
        ends = {"min_value": kind(least), "max_value": kind(greatest)}  # type: ignore[arg-type]
        return shared(name) | ends | _first(name, side) | {"step": step}

    for name in ("temperature", "top_p", "repetition_penalty"):
        st.slider(**number(name, 0.05))
    for column, (name, step) in zip(st.columns(2), (("seed", 1), ("max_new_tokens", 8)), strict=True):
        column.number_input(**number(name, step))
    st.text_area(**shared("system"), height=80, max_chars=4000, placeholder="None")
    st.toggle(**shared("template"), **_first("template", side))


def _first(name: str, side: str) -> dict[str, Any]:
    """Return the argument for a widget's first value, which Streamlit allows only while nothing is chosen."""
    return {} if f"compare_{name}_{side}" in st.session_state else {"value": getattr(_FIRST, name)}
