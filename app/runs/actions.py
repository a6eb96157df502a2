"""What can be done with a run: the buttons beside its name."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.runs.listing import JUST_DELETED
from app.view import guard, plain
from lbllm.runs.notes import LONGEST_NOTE, MOST_TAGS, all_tags, note_of, notes, write_note, write_tags
from lbllm.runs.store import ACTIVE, Run, RunStore
from lbllm.runs.view import RunView


def header(runs: RunStore, run: Run, view: RunView) -> DeltaGenerator:
    """The run's name and its buttons; returns the place of the state line, which changes every second."""
    back, title, buttons = st.columns([0.35, 5, 5], vertical_alignment="center")
    if back.button("", icon=":material/arrow_back:", type="tertiary", help="All runs", key="all runs"):
        _leave()
    title.markdown(f"#### {plain(run.name)}")
    line = title.empty()
    row = buttons.container(horizontal=True, horizontal_alignment="right", gap="small")
    ending = view.asked is not None and run.state == "running"
    over = run.state in ("done", "cancelled")
    confirm = f"cancel {run.id}"
    # This container is always there, so its content doesn't move what follows.
    below = st.container()
    with below, guard():
        if row.button("Save and stop", disabled=run.state not in ACTIVE or ending):
            runs.request(run.id, "stop")
            st.rerun()
        if row.button("Cancel", disabled=over or run.is_missing or (ending and view.asked == "cancel")):
            st.session_state[confirm] = True
        resumable = run.can_be_resumed and not run.is_missing
        if row.button("Resume", disabled=not resumable, type="primary"):
            runs.resume(run.id)
            st.rerun()
        with row.popover("More"):
            _more(runs, run)
        if st.session_state.get(confirm) and not over:
            _ask_cancel(runs, run, view, confirm)
    return line


def _more(runs: RunStore, run: Run) -> None:
    """Another name, another run like this one, and the way out of the list."""
    with guard():
        name = st.text_input("Name", run.name, max_chars=100, key=f"name {run.id}")
        if st.button("Rename", key=f"rename {run.id}", width="stretch"):
            runs.rename(run.id, name)
            st.rerun()
        note = note_of(runs, run.id)
        text = st.text_area(
            "Note",
            note.text,
            max_chars=LONGEST_NOTE,
            height=90,
            key=f"note {run.id}",
            placeholder="What you think of it",
        )
        tags = st.multiselect(
            "Tags",
            all_tags([note, *notes(runs).values()]),
            list(note.tags),
            accept_new_options=True,
            max_selections=MOST_TAGS,
            key=f"tags {run.id}",
            placeholder="None",
            help="Type a new one and press Enter. The list of runs can be filtered by them.",
        )
        if st.button("Save note and tags", key=f"write {run.id}", width="stretch"):
            write_tags(runs, run.id, tags)
            write_note(runs, run.id, text)
            st.rerun()
        st.page_link(
            "pages/quantize.py",
            label="Run again with these",
            icon=":material/replay:",
            disabled=run.is_missing,
            query_params={"again": run.id},
        )
        if st.button(
            "Delete",
            key=f"delete {run.id}",
            icon=":material/delete:",
            disabled=run.state in ACTIVE,
            help="It can be brought back from the list of runs. A run that works has to be stopped or cancelled first.",
            width="stretch",
        ):
            runs.delete(run.id)
            st.session_state[JUST_DELETED] = run.id
            _leave()


def _leave() -> None:
    """Back to the list. The address keeps how charts are drawn."""
    del st.query_params["run"]
    st.rerun()


def _ask_cancel(runs: RunStore, run: Run, view: RunView, confirm: str) -> None:
    """Ask for a second click: a cancelled run can't be resumed."""
    with st.container(border=True):
        count = len(view.finished)
        kept = f"its {count} finished blocks" if count != 1 else "its finished block"
        st.markdown(f"Cancel this run and delete {kept}? You can't resume it then. *Save and stop* keeps them.")
        yes, no = st.columns([1, 3])
        if yes.button("Cancel and delete", type="primary", width="stretch"):
            st.session_state[confirm] = False
            runs.request(run.id, "cancel")
            st.rerun()
        if no.button("Keep the run"):
            st.session_state[confirm] = False
            st.rerun()
