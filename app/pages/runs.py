"""All runs, or one in full: ``?run=ID``. The page reads the run store and sends requests to workers."""

from __future__ import annotations

import streamlit as st

from app.runs.detail import show_run
from app.runs.listing import list_runs
from app.view import store
from lbllm.runs.store import ACTIVE

LIST_SECONDS = 3.0
# Without it Streamlit would grey out parts of the page once a second, while it redraws them.
STEADY = "<style>[data-stale] { opacity: 1 !important; transition: none !important; }</style>"


def main() -> None:
    st.html(STEADY)
    runs = store()
    run_id = st.query_params.get("run")
    if run_id is not None:
        show_run(runs, run_id)
        return
    st.header("Runs")
    live = any(run.state in ACTIVE for run in runs.all())
    st.fragment(list_runs, run_every=LIST_SECONDS if live else None)(runs)


main()
