"""The page Learn: the course as a component that asks Python for lessons and scenes.

    desk = Desk(open_course, pool)
    course_view(desk)

The browser draws; every number comes from the desk's course. A question that needs longer is answered with progress,
and the component asks again, so that no session waits for another one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import streamlit as st

from app.learn.desk import Desk
from lbllm.course.export import facts, renderer, style

_KEY = "learn_course"
_QUESTION = "learn_question"
_course = st.components.v2.component(
    "lbllm.learn", css=style(), js=f"{renderer()}\n{Path(__file__).with_name('learn.js').read_text('utf-8')}"
)


def course_view(desk: Desk) -> None:
    """Show the course. For use in a fragment, as only this part must run when the browser asks for something."""
    document = {"facts": facts(desk.course), "answer": _answer(desk)}
    _course(key=_KEY, data=json.dumps(document, allow_nan=False).encode(), on_asked_change=_asked)


def _asked() -> None:
    """Keep the question that the component has just sent."""
    st.session_state[_QUESTION] = st.session_state[_KEY].asked


def _answer(desk: Desk) -> dict[str, Any] | None:
    """The answer to the question that waits, with the question itself; None if there is none."""
    question = st.session_state.pop(_QUESTION, None)
    if not isinstance(question, dict):
        return None
    positions = question.get("positions")
    where = None if positions is None else tuple(int(position) for position in cast("list[int]", positions))
    return question | desk.ask(str(question.get("key")), where)
