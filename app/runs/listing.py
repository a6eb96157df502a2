"""The list of runs, filtered and in an order of choice, and the deleted ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import streamlit as st

from app.runs.facts import show_facts, show_note, show_settings
from app.runs.state import badge, stage_seconds
from app.view import guard, number_text, plain, time_text
from lbllm.runs.deleted import remove, restore
from lbllm.runs.listed import Listed, Order, Wanted, describe, matching, ordered, scales
from lbllm.runs.notes import Note, all_tags, notes
from lbllm.runs.store import Run, RunStore, State
from lbllm.runs.view import SUMMARY_KINDS, RunView
from lbllm.sections import STAGES, Stage, stage_number

LISTED = 30  # at a time
# In the session: the run that was just deleted, those that are chosen to be compared, and how many are shown.
JUST_DELETED, PICKED, SHOWN = "runs just deleted", "runs picked", "runs shown"
ORDER_NAMES: dict[Order, str] = {
    "newest": "Newest first",
    "oldest": "Oldest first",
    "name": "Name",
    "state": "State",
    "bits": "Fewest bits",
    "size": "Smallest",
    "perplexity": "Lowest perplexity",
    "time": "Longest time",
}


@st.cache_resource(max_entries=500, show_spinner=False)
def summary(root: Path, run_id: str) -> RunView:
    """The run's view without single steps, shared by all tabs of this server."""
    return RunView(run_id, SUMMARY_KINDS)


def expected_of(runs: RunStore, run: Run, view: RunView) -> dict[Stage, float]:
    """The estimated seconds of each stage of a run at work; empty for others, which have no time left."""
    return stage_seconds(runs.root, run.id) if run.state == view.phase == "running" else {}


def described(runs: RunStore) -> list[Listed]:
    """What the list says of each run, oldest first. One run that can't be read hides no other."""
    written, now, found = notes(runs), time.time(), []
    for run in runs.all():
        view = summary(runs.root, run.id)
        with guard(), view.caught_up(runs):
            expected = expected_of(runs, run, view)
            found.append(describe(run, view, written.get(run.id, Note()), now, expected))
    return found


def filters(runs: RunStore) -> None:
    """Which runs are listed, and in which order; the address keeps it."""
    found = runs.all()
    if len(found) < 2:
        return
    tags = all_tags(notes(runs).values())
    # On a phone the widths make two fields a row.
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input("Find", placeholder="Name, note, tag, model", key="find", bind="query-params", width=340)
        states = list(get_args(State))
        st.multiselect("State", states, key="state", placeholder="All", bind="query-params", width=165)
        if tags:
            st.multiselect("Tags", tags, key="tag", placeholder="All", bind="query-params", width=165)
        st.selectbox("Order", list(ORDER_NAMES.values()), key="sort", bind="query-params", width=185)


def _wanted() -> tuple[Wanted, Order]:
    chosen = st.session_state
    order: Order = next((order for order, name in ORDER_NAMES.items() if name == chosen.get("sort")), "newest")
    return Wanted(chosen.get("find") or "", tuple(chosen.get("tag") or ()), tuple(chosen.get("state") or ())), order


def list_runs(runs: RunStore) -> None:
    """What is known of each run; a click on its name opens it."""
    every = described(runs)
    wanted, order = _wanted()
    found = ordered(matching(every, wanted), order)
    if not every:
        st.markdown("No runs yet. A run binarizes a model block by block. Start one on the Quantize page.")
        st.page_link("pages/quantize.py", label="Set up a run")
        return
    if len(every) > 1:
        _compare_bar({one.run.id for one in every}, len(found), len(every))
    if not found:
        st.info("No run is like this. Change or empty the fields above.")
    if order == "perplexity" and len(scales(found)) > 1:
        st.caption("Perplexities of different texts or teachers can't be compared: such runs stand together.")
    shown = max(LISTED, st.session_state.get(SHOWN, LISTED))
    for one in found[:shown]:
        with st.container(key=f"run {one.run.id}", border=True, gap="xsmall"), guard():
            _row(one, pick=len(every) > 1)
    if len(found) > shown and st.button(f"Show {LISTED} more of {len(found)}", key="more runs"):
        st.session_state[SHOWN] = shown + LISTED
        st.rerun(scope="fragment")


def _compare_bar(known: set[str], shown: int, total: int) -> None:
    """How many runs are listed, and the button that compares those that are ticked."""
    picked = [run_id for run_id in st.session_state.setdefault(PICKED, []) if run_id in known]
    said, buttons = st.columns([3, 4], vertical_alignment="center")
    said.caption(f"{total} runs" if shown == total else f"{shown} of {total} runs")
    with buttons.container(horizontal=True, horizontal_alignment="right", gap="small"):
        if picked and st.button("Clear", key="pick none", type="tertiary"):
            st.session_state[PICKED] = []
            st.session_state["runs round"] = st.session_state.get("runs round", 0) + 1
            st.rerun(scope="fragment")
        label = f"Compare {len(picked)} runs" if len(picked) > 1 else "Compare"
        hint = "Tick two runs or more in the list."
        if st.button(label, key="compare picked", disabled=len(picked) < 2, help=hint, type="primary"):
            st.query_params["compare"] = ",".join(picked)
            st.rerun()


def _row(one: Listed, *, pick: bool) -> None:
    run = one.run
    left, right = st.columns([4, 9], vertical_alignment="center")
    with left.container(horizontal=True, vertical_alignment="center", gap="small", key=f"head {run.id}"):
        if pick:
            _tick(run)
        if st.button(plain(run.name), key=f"open {run.id}", type="tertiary", help=run.id):
            st.query_params["run"] = run.id
            st.rerun()
        st.markdown(badge(run), width="content")
    figures = {
        "Created": time.strftime("%-d %b, %H:%M", time.localtime(run.created)),
        "Time used": time_text(one.seconds),
    }
    if run.state == "running":
        figures["Time left"] = f"about {time_text(one.left)}" if one.left is not None else "–"
    figures |= {
        "Bits per binarized weight": f"{one.bits:.2f}" if one.bits is not None else "–",
        "Perplexity": perplexity_text(one),
    }
    with right:
        show_facts(figures, "figures")
    done, parts = one.parts
    if run.state != "done" and parts:
        st.progress(one.progress, f"{done} of {parts} parts: blocks in each stage")
    show_settings(run)
    show_note(one.note)


def _tick(run: Run) -> None:
    """The box that chooses a run to be compared. The choice lasts while a filter hides the run."""
    key = f"pick {run.id} {st.session_state.get('runs round', 0)}"
    if key not in st.session_state:
        st.session_state[key] = run.id in st.session_state[PICKED]

    def change() -> None:
        others = [run_id for run_id in st.session_state[PICKED] if run_id != run.id]
        st.session_state[PICKED] = [*others, run.id] if st.session_state[key] else others

    st.checkbox(f"Compare {plain(run.name)}", key=key, on_change=change, label_visibility="collapsed", width="content")


def perplexity_text(one: Listed) -> str:
    """The perplexity after the last stage that was evaluated, and the teacher's on the same text."""
    latest = one.latest
    if latest is None:
        return "–"
    teacher = one.teachers.get(latest.text)
    beside = f", teacher {number_text(teacher.perplexity)}" if teacher is not None else ""
    stage = next(stage for stage in STAGES if stage == latest.what)
    return f"{number_text(latest.perplexity)} after stage {stage_number(stage)}{beside}"


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
