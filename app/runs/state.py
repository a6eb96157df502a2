"""A run's state in words, for the list of runs and for the page of one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import streamlit as st

from app.view import store, time_text
from lbllm.errors import LbllmError
from lbllm.measure.estimate import expected_seconds
from lbllm.runs.store import ACTIVE, Run, RunStore, State
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


def state_text(runs: RunStore, run: Run, view: RunView, now: float, expected: Mapping[Stage, float]) -> str:
    """A line about what the run does and the time left; ``expected``: the estimated seconds of each
    stage."""
    if run.state == "queued":
        ahead = sum(other.state in ACTIVE and other.created < run.created for other in runs.all())
        return f"waits for {ahead} other run{'s' if ahead > 1 else ''}" if ahead else "starts"
    took = time_text(elapsed(run, view, now))
    if run.state != "running":
        return f"after {took}"
    if view.asked is not None:
        return f"{took}, ends after the current step" + (", finished blocks are kept" if view.asked == "stop" else "")
    if view.phase == "loading":
        return f"{took}, loads model and text"
    left = view.seconds_left(now, expected)
    return f"{took}, " + (f"about {time_text(left)} left" if left is not None else "time left not known yet")
