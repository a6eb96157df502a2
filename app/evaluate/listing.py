"""The list of evaluations, and what can be done with one."""

from __future__ import annotations

import time

import streamlit as st

from app.view import guard, plain, sentence, store, time_text
from lbllm.errors import LbllmError
from lbllm.evaluation.store import ACTIVE, Evaluation, EvaluationStore, State

BADGES: dict[State, str] = {
    "queued": ":gray-badge[waits]",
    "running": ":blue-badge[running]",
    "done": ":green-badge[done]",
    "cancelled": ":gray-badge[cancelled]",
    "failed": ":red-badge[failed]",
    "interrupted": ":red-badge[interrupted]",
}
ADDRESS = "evaluation"
LISTED = 20


def message_text(one: Evaluation) -> str:
    """Why it failed or is incomplete, in the page's words, escaped for Markdown."""
    text = one.message.replace("--seq-len", "number of tokens in a window").replace("--limit", "number of windows")
    return sentence(text)


def badge(one: Evaluation) -> str:
    """Its state, in Markdown."""
    if one.is_ending:
        return ":gray-badge[ending]"
    return BADGES[one.state] + (" :orange-badge[incomplete]" if one.state == "done" and one.message else "")


def list_evaluations(evaluations: EvaluationStore, live: bool) -> None:
    """All evaluations, the newest first; a click on a name opens it."""
    found = list(reversed(evaluations.all()))
    if live and not any(one.state in ACTIVE for one in found):
        st.rerun()
    if not found:
        return
    st.subheader("Evaluations")
    shown = st.session_state.get("evaluations shown", LISTED)
    for one in found[:shown]:
        with st.container(key=f"evaluation {one.id}", border=True, gap="xsmall"), guard():
            _row(one)
    if len(found) > shown and st.button(f"Show {LISTED} more of {len(found)}", key="more evaluations"):
        st.session_state["evaluations shown"] = shown + LISTED
        st.rerun(scope="fragment")


def _row(one: Evaluation) -> None:
    try:
        title, names = one.job.title, ", ".join(one.job.shown_names)
    except LbllmError as error:
        st.error(sentence(error))
        if st.button("Delete", key=f"delete {one.id}"):
            EvaluationStore().delete(one.id)
            st.rerun()
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if st.button(plain(title), key=f"open {one.id}", type="tertiary", help=one.id):
            st.query_params.clear()
            st.query_params[ADDRESS] = one.id
            st.rerun()
        st.markdown(badge(one), width="content")
    st.caption(plain(f"{time.strftime('%-d %b, %H:%M', time.localtime(one.created))} · {names}"))
    show_progress(one)


def show_progress(one: Evaluation) -> None:
    """How far an evaluation is that waits or works."""
    if one.state not in ACTIVE:
        return
    if one.progress is None:
        st.caption(plain(waits_for(one)))
        return
    left = one.progress.seconds_left(time.time())
    said = f"{one.progress.what}, " + (
        f"about {time_text(left)} left" if left is not None else "time left not known yet"
    )
    st.progress(one.progress.share, plain("Ends after the current step" if one.is_ending else said))


def waits_for(one: Evaluation) -> str:
    """What a queued evaluation waits for."""
    before = sum(other.state in ACTIVE and other.id < one.id for other in EvaluationStore().all())
    working = [run.name for run in store().all() if run.state == "running"]
    if working:
        return f"Waits for its turn: run {working[0]} is at work"
    if before:
        return f"Waits for its turn, after {before} other {'evaluation' if before == 1 else 'evaluations'}"
    return "Starts"


def actions(evaluations: EvaluationStore, one: Evaluation) -> None:
    """Cancel, continue, delete."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small", width="content"):
        if one.state in ACTIVE:
            if st.button("Cancel", key="evaluation cancel", disabled=one.is_ending, help="What is finished stays."):
                evaluations.cancel(one.id)
                st.rerun()
            return
        if one.can_continue and st.button(
            "Continue", key="evaluation continue", type="primary", help="Measures what is missing."
        ):
            evaluations.start(one.id)
            st.rerun()
        with st.popover("Delete"):
            st.markdown("This removes its figures and answers. It can't be undone.")
            if st.button("Delete it", key="evaluation delete", type="primary"):
                evaluations.delete(one.id)
                del st.query_params[ADDRESS]
                st.rerun()
