"""The list of all runs, newest first."""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

from app.runs.state import BADGES, elapsed
from app.view import number_text, plain, time_text
from lbllm.runs.store import RunStore
from lbllm.runs.view import SUMMARY_KINDS, RunView
from lbllm.sections import STAGES, stage_number

LISTED = 30


@st.cache_resource(max_entries=500, show_spinner=False)
def summary(root: Path, run_id: str) -> RunView:
    """The run's view without single steps, shared by all tabs of this server."""
    return RunView(run_id, SUMMARY_KINDS)


def list_runs(runs: RunStore) -> None:
    """One row per run; a click opens it."""
    found = list(reversed(runs.all()))
    if not found:
        st.markdown("No runs yet. A run binarizes a model block by block. Start one on the Quantize page.")
        st.page_link("pages/quantize.py", label="Set up a run")
        return
    widths = [5, 2, 2, 1.5, 1.5, 4]
    titles = ("Run", "State", "Created", "Time used", "Bits per binarized weight", "Perplexity")
    for column, title in zip(st.columns(widths), titles, strict=True):
        column.caption(title)
    for run in found[:LISTED]:
        view = summary(runs.root, run.id)
        columns = st.columns(widths, vertical_alignment="center")
        with view.caught_up(runs):
            if columns[0].button(plain(run.name), key=f"open {run.id}", type="tertiary", help=run.id):
                st.query_params["run"] = run.id
                st.rerun()
            columns[1].markdown(BADGES[run.state])
            columns[2].markdown(time.strftime("%-d %b, %H:%M", time.localtime(run.created)))
            columns[3].markdown(time_text(elapsed(run, view, time.time())))
            columns[4].markdown(f"{view.started.bpw:.2f}" if view.started is not None else "–")
            columns[5].markdown(perplexity_text(view))
    if len(found) > LISTED:
        st.caption(f"The newest {LISTED} of {len(found)} runs. `lbllm runs list` shows all of them.")


def perplexity_text(view: RunView) -> str:
    """The perplexity after the last stage that was evaluated, and the teacher's."""
    known = view.perplexities
    stages = [stage for stage in STAGES if stage in known]
    if not stages:
        return "–"
    teacher = f", teacher {number_text(known['teacher'].perplexity)}" if "teacher" in known else ""
    return f"{number_text(known[stages[-1]].perplexity)} after stage {stage_number(stages[-1])}{teacher}"
