"""A run's state in words, for the list of runs and for the page of one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import streamlit as st

from app.view import store, time_text
from lbllm.errors import LbllmError
from lbllm.measure.estimate import expected_seconds
from lbllm.runs.store import Run, RunStore, State
from lbllm.runs.view import RunView
from lbllm.sections import Stage

BADGES: dict[State, str] = {
    "queued": ":gray-badge[queued]",
    "running": ":blue-badge[running]",
    "done": ":green-badge[done]",
    "stopped": ":orange-badge[stopped]",
    "cancelled": ":gray-badge[cancelled]",
    "failed": ":red-badge[failed]",
    "interrupted": ":red-badge[interrupted]",
}


def badge(run: Run) -> str:
    """The run's state as a badge, in Markdown, and whether its folder is missing."""
    return BADGES[run.state] + (" :red-badge[folder missing]" if run.is_missing else "")


@st.cache_data(max_entries=100, show_spinner=False)
def stage_seconds(root: Path, run_id: str) -> dict[Stage, float]:
    """The estimated seconds of each stage of the run; empty if they can't be estimated."""
    try:
        return expected_seconds(store().get(run_id))
    except LbllmError:
        return {}


def elapsed(run: Run, view: RunView, now: float) -> float:
    """Seconds that the run's workers have worked until ``now``."""
    return view.elapsed(now if run.state == "running" else view.last_time)


def runs_before(runs: RunStore, run: Run) -> int | None:
    """How many runs work or were queued before a queued run, which then waits for its turn; None if the run has no
    worker yet. A resumed run is queued when it is resumed, however old it is."""
    since = _queued_since(runs, run)
    if since is None:
        return None
    before = 0
    for other in runs.all():
        if other.state == "queued" and other.id != run.id:
            queued = _queued_since(runs, other)
            before += queued is not None and queued < since
        before += other.state == "running"
    return before


def _queued_since(runs: RunStore, run: Run) -> float | None:
    queued = runs.events(run.id, kinds=("run_queued",))
    return queued[-1].time if queued else None


def state_text(runs: RunStore, run: Run, view: RunView, now: float, expected: Mapping[Stage, float]) -> str:
    """A line about what the run does and the time left; ``expected``: the estimated seconds of each
    stage."""
    if run.state == "queued":
        before = runs_before(runs, run)
        if before is None:
            return "has no worker yet"
        return f"waits for its turn, after {before} other run{'s' if before > 1 else ''}" if before else "starts"
    took = f"time used {time_text(elapsed(run, view, now))}"
    if run.state != "running":
        return took
    if view.asked is not None:
        return f"{took}, ends after the current step" + (", finished blocks are kept" if view.asked == "stop" else "")
    if view.phase == "loading":
        return f"{took}, loads model and text"
    left = view.seconds_left(now, expected)
    return f"{took}, " + (f"about {time_text(left)} left" if left is not None else "time left not known yet")
