"""The report on runs as a file to give away: what is missing is measured in the background, then it is downloaded."""

from __future__ import annotations

from functools import partial

import streamlit as st

from app.evaluate.listing import message_text, show_progress
from app.view import guard
from lbllm.evaluation.store import ACTIVE, Evaluation, EvaluationStore
from lbllm.reporting.evaluations import Wish, at_work, groups_of, missing
from lbllm.reporting.page import report, report_name
from lbllm.reporting.subjects import find_subjects
from lbllm.runs.store import RunStore

POLL_SECONDS = 2.0


def show_report(runs: RunStore, ids: list[str]) -> None:
    """The section, folded. Nothing of the runs is read before the button is pressed."""
    with st.expander("Report", icon=":material/summarize:"), guard():
        waits = any(one.state in ACTIVE for one in _asked(ids) or ())
        st.fragment(_section, run_every=POLL_SECONDS if waits else None)(runs, ids, waits)


def _asked(ids: list[str]) -> list[Evaluation] | None:
    """The evaluations that the report waits for, or waited for; None before it was asked for."""
    names = st.session_state.get(_key(ids))
    return None if names is None else EvaluationStore().those(names)


def _key(ids: list[str]) -> str:
    return f"report {','.join(ids)}"


def _section(runs: RunStore, ids: list[str], waited: bool) -> None:
    said, press = st.columns([5, 2], vertical_alignment="center")
    first = said.toggle(
        "Measure what is missing",
        True,
        key=f"{_key(ids)} first",
        help="Perplexity and KL with intervals beside the teacher, GPTQ and plain rounding, and answers of both models "
        "to example prompts, which show their speed, too. It takes minutes for a small model, and goes on without this "
        "page. What the page Evaluate has measured of these runs and their teacher is taken from there.",
    )
    with guard():
        if press.button("Make the report", key=f"{_key(ids)} make", width="stretch"):
            st.session_state[_key(ids)] = _begin(runs, ids) if first else []
            st.rerun()
        found = _asked(ids)
        if found is None:
            st.caption("One HTML page for people who decide: it loads nothing, and can be printed.")
            return
        active = [one for one in found if one.state in ACTIVE]
        if waited and not active:
            st.rerun()
        for one in active:
            show_progress(one)
        for one in found:
            if one.message:
                st.warning(message_text(one))
            elif one.state not in (*ACTIVE, "done"):
                st.warning(f"A measurement is {one.state}. The page Evaluate continues it.")
        st.download_button(
            "Download as far as it is" if active else "Download",
            partial(_page, runs, ids),
            report_name([run.name for run in runs.all() if run.id in ids]),
            "text/html",
            on_click="ignore",
            key=f"{_key(ids)} download",
            type="secondary" if active else "primary",
        )


def _begin(runs: RunStore, ids: list[str]) -> list[str]:
    """Queue what is missing; returns the evaluations to wait for, those that are at work already among them."""
    evaluations = EvaluationStore()
    groups = groups_of(find_subjects(ids, runs))
    names = [one.id for one in at_work(evaluations, groups)]
    if names:
        return names
    for job in missing(evaluations, groups, Wish()):
        made = evaluations.create(job)
        evaluations.start(made.id)
        names.append(made.id)
    return names


def _page(runs: RunStore, ids: list[str]) -> str:
    return report(find_subjects(ids, runs), EvaluationStore())
