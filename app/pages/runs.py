"""All runs, one in full (``?run=ID``), or several side by side (``?compare=ID,ID``).

The page reads the run store and sends requests to workers.
"""

from __future__ import annotations

import streamlit as st

from app.runs.compared import ADDRESS, show_compared_runs
from app.runs.detail import show_run
from app.runs.facts import style
from app.runs.listing import filters, list_runs, offer_undo, show_deleted
from app.view import guard, plain, store
from lbllm.runs.deleted import restore
from lbllm.runs.store import ACTIVE, RunStore

LIST_SECONDS = 3.0


def main() -> None:
    style()
    runs = store()
    run_id = st.query_params.get("run")
    if run_id is not None and any(run.id == run_id for run in runs.all()):
        show_run(runs, run_id)
        return
    compared = st.query_params.get(ADDRESS)
    if compared is not None and run_id is None:
        show_compared_runs(runs, compared)
        return
    st.header("Runs")
    if run_id is not None:
        not_found(runs, run_id)
    offer_undo(runs)
    live = any(run.state in ACTIVE for run in runs.all())
    filters(runs)
    st.fragment(list_runs, run_every=LIST_SECONDS if live else None)(runs)
    show_deleted(runs)


def not_found(runs: RunStore, run_id: str) -> None:
    """Say that the address names no run; the list of all runs follows."""
    said, button = st.columns([5, 1], vertical_alignment="center")
    if not any(run.id == run_id for run in runs.deleted()):
        said.error(f"There is no run {plain(run_id[:100])}. The runs that there are follow.")
        if button.button("All runs", width="stretch"):
            del st.query_params["run"]
            st.rerun()
        return
    said.warning(f"The run {plain(run_id)} is deleted.")
    with guard():
        if button.button("Bring back", key="restore this", width="stretch"):
            restore(runs, run_id)
            st.rerun()


main()
