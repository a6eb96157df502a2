"""Widgets whose value the script has put into the session: the arguments that let them show it in any case.

    st.number_input("Sweeps", **with_value("quantize sweeps"))
    st.segmented_control("Weights", options, **with_default("quantize format"))
    st.selectbox("Stages", options, **with_index("quantize stages", options))

Streamlit sends such a value to the browser once, in the run that sets it. A browser that has not yet loaded the code of
this kind of widget when the page runs again never gets it: it shows the widget's default and sends that back with the
next change. With these arguments the default is the value in the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st


def with_value(key: str) -> dict[str, Any]:
    """For numbers, texts, sliders and switches."""
    return {"key": key} | _kept("value", key)


def with_default(key: str) -> dict[str, Any]:
    """For rows of buttons and for choices of several."""
    return {"key": key} | _kept("default", key)


def with_index(key: str, options: Sequence[Any]) -> dict[str, Any]:
    """For menus; a value that is not among the ``options`` leaves the first one."""
    chosen = st.session_state.get(key)
    return {"key": key, "index": options.index(chosen) if chosen in options else 0}


def _kept(argument: str, key: str) -> dict[str, Any]:
    """The argument with the value in the session, if there is one."""
    return {argument: st.session_state[key]} if key in st.session_state else {}
