"""The list of all runs, newest first, and the deleted ones."""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

from app.runs.facts import show_facts, show_settings
from app.runs.state import badge, elapsed
from app.view import guard, number_text, plain, time_text
from lbllm.runs.deleted import remove, restore
from lbllm.runs.store import Run, RunStore
from lbllm.runs.view import SUMMARY_KINDS, RunView
from lbllm.sections import STAGES, stage_number

LISTED = 30
# In the session: the run that was just deleted.
JUST_DELETED = "runs just deleted"


@st.cache_resource(max_entries=500, show_spinner=False)
def summary(root: Path, run_id: str) -> RunView:
    """The run's view without single steps, shared by all tabs of this server."""
    return RunView(run_id, SUMMARY_KINDS)


def list_runs(runs: RunStore) -> None:
    """What is known of each run; a click on its name opens it."""
    found = list(reversed(runs.all()))
    if not found:
        st.markdown("No runs yet. A run binarizes a model block by block. Start one on the Quantize page.")
        st.page_link("pages/quantize.py", label="Set up a run")
    for run in found[:LISTED]:
        # One run that can't be read hides no other.
        with st.container(key=f"run {run.id}", border=True, gap="xsmall"), guard():
            _row(runs, run)
    if len(found) > LISTED:
        st.caption(f"The newest {LISTED} of {len(found)} runs. `lbllm runs list` shows all of them.")


def _row(runs: RunStore, run: Run) -> None:
    left, right = st.columns([4, 9], vertical_alignment="center")
    with left.container(horizontal=True, vertical_alignment="center", gap="small"):
        if st.button(plain(run.name), key=f"open {run.id}", type="tertiary", help=run.id):
            st.query_params["run"] = run.id
            st.rerun()
        st.markdown(badge(run), width="content")
    view = summary(runs.root, run.id)
    with view.caught_up(runs):
        figures = {
            "Created": time.strftime("%-d %b, %H:%M", time.localtime(run.created)),
            "Time used": time_text(elapsed(run, view, time.time())),
            "Bits per binarized weight": f"{view.started.bpw:.2f}" if view.started is not None else "–",
            "Perplexity": perplexity_text(view),
        }
    with right:
        show_facts(figures, "figures")
    show_settings(run)


def perplexity_text(view: RunView) -> str:
    """The perplexity after the last stage that was evaluated, and the teacher's."""
    known = view.perplexities
    stages = [stage for stage in STAGES if stage in known]
    if not stages:
        return "–"
    teacher = f", teacher {number_text(known['teacher'].perplexity)}" if "teacher" in known else ""
    return f"{number_text(known[stages[-1]].perplexity)} after stage {stage_number(stages[-1])}{teacher}"


def offer_undo(runs: RunStore) -> None:
    """The run that was just deleted, and the button that brings it back."""
    deleted = [run for run in runs.deleted() if run.id == st.session_state.get(JUST_DELETED)]
    with st.container():
        for run in deleted:
            said, button = st.columns([5, 1], vertical_alignment="center")
            said.info(f"{plain(run.name)} is deleted.")
            if button.button("Undo", key="undo delete", width="stretch"):
                restore(runs, run.id)
                del st.session_state[JUST_DELETED]
                st.rerun()


def show_deleted(runs: RunStore) -> None:
    """The deleted runs: each can be brought back, or removed for good."""
    deleted = runs.deleted()
    if not deleted:
        return
    with st.expander(f"Deleted runs ({len(deleted)})", key="deleted runs"), guard():
        st.caption("Their files stay on this disk until you remove them for good.")
        for run in reversed(deleted):
            name, back, gone = st.columns([5, 1.2, 1.8], vertical_alignment="center")
            name.markdown(f"{plain(run.name)} ({plain(run.id)})")
            if back.button("Bring back", key=f"restore {run.id}", width="stretch"):
                restore(runs, run.id)
                st.rerun()
            with gone.popover("Remove for good", width="stretch"):
                st.markdown("This removes its blocks, its checkpoint and its charts. It can't be undone.")
                if st.button("Remove the files", key=f"remove {run.id}", type="primary"):
                    remove(runs, run.id)
                    st.rerun()
