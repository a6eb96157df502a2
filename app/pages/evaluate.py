"""Evaluate: models measured side by side, in a queue that goes on without the page. ``?evaluation=ID`` opens one."""

from __future__ import annotations

import streamlit as st

from app.evaluate.figures import style
from app.evaluate.form import show_form
from app.evaluate.listing import ADDRESS, actions, badge, list_evaluations, message_text, show_progress
from app.evaluate.on_prompts import show_prompts
from app.evaluate.on_tasks import show_tasks
from app.evaluate.on_text import show_text
from app.view import guard, plain
from lbllm.errors import LbllmError, RunError
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.store import ACTIVE, Evaluation, EvaluationStore

LIVE_SECONDS = 2.0


def page() -> None:
    """One evaluation, or the form and the list."""
    style()
    evaluations = EvaluationStore()
    wanted = st.query_params.get(ADDRESS)
    if wanted is not None:
        try:
            found = evaluations.get(wanted)
        except RunError:
            st.error(f"There is no evaluation {plain(wanted[:100])}. Those that there are follow.")
        else:
            show(evaluations, found)
            return
    st.header("Evaluate")
    with st.container(), guard():
        show_form(evaluations)
    live = any(one.state in ACTIVE for one in evaluations.all())
    st.fragment(list_evaluations, run_every=LIVE_SECONDS if live else None)(evaluations, live)


def show(evaluations: EvaluationStore, one: Evaluation) -> None:
    """One evaluation in full."""
    if st.button("All evaluations", icon=":material/arrow_back:", type="tertiary", key="all evaluations"):
        del st.query_params[ADDRESS]
        st.rerun()
    live = one.state in ACTIVE
    try:
        title = one.job.title
    except LbllmError as error:
        st.error(plain(str(error)))
        actions(evaluations, one)
        return
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small", width="content"):
            st.header(plain(title), width="content")
            st.markdown(badge(one), width="content")
        with guard():
            actions(evaluations, one)
    st.fragment(body, run_every=LIVE_SECONDS if live else None)(evaluations, one.id, live)


def body(evaluations: EvaluationStore, name: str, live: bool) -> None:
    """Progress and results; drawn again every few seconds while the evaluation works."""
    with guard():
        one = evaluations.get(name)
        if live and one.state not in ACTIVE:
            st.rerun()
        show_progress(one)
        if one.message:
            (st.error if one.state == "failed" else st.warning)(message_text(one))
        elif one.state == "interrupted":
            st.warning("Its process has ended. What is finished is kept: continue, and only the rest is measured.")
        job, parts = one.job, Parts(one.folder)
        {"text": show_text, "tasks": show_tasks, "prompts": show_prompts}[job.measure](job, parts)


with guard():
    page()
