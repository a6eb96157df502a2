"""Learn: a course of short lessons on the model that comes with the program. ``?lesson=KEY`` opens one."""

from __future__ import annotations

from weakref import WeakValueDictionary

import streamlit as st

from app.learn import course_view
from app.learn.desk import Desk
from app.view import guard, pool
from lbllm.config import SHIPPED
from lbllm.course.course import Course


@st.cache_resource
def _desks() -> WeakValueDictionary[str, Desk]:
    """The desks that some session holds: without readers, the models of a course are released."""
    return WeakValueDictionary()


def desk() -> Desk:
    """The desk of this process for the shipped checkpoint; this session holds it from now on."""
    held: Desk | None = st.session_state.get("learn_desk")
    if held is None:
        held = _desks().get(SHIPPED)
        if held is None:
            held = _desks()[SHIPPED] = Desk(lambda load: Course.open(SHIPPED, load=load), pool())
        st.session_state["learn_desk"] = held
    return held


@st.fragment
def course(held: Desk) -> None:
    """The whole page; it runs again alone."""
    with guard():
        course_view(held)


with guard():
    course(desk())
