"""The Runs page and the terminal, reading the same events: they say the same about a run."""

from __future__ import annotations

import fcntl
import io
from pathlib import Path

from rich.console import Console

from app.runs.charts import timeline
from app.runs.state import state_text
from app.view import time_text
from lbllm.commands.attend import RunDisplay, render
from lbllm.config import make_config
from lbllm.events import RunFailed
from lbllm.runs.store import RunStore
from lbllm.runs.view import RunView
from lbllm.sections import Stage
from lbllm.units import duration
from tests.helpers.run_events import whole_run

EXPECTED: dict[Stage, float] = {"ptq": 300.0, "wat": 2000.0, "aar": 1000.0}
# What the terminal says of a run, and the page then, where it isn't the run's state.
ACTIVITIES = {
    "waiting for its turn": "starts",
    "loading model and text": "loads model and text",
    "stopping": "ends after the current step",
}


def test_page_and_terminal_agree_at_every_event(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create(make_config("preview"))
    console = Console(file=io.StringIO(), width=120)
    display = RunDisplay(console, RunView(run.id), EXPECTED)
    page = RunView(run.id)
    times_left = 0
    with (run.folder / "alive.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for event in (*whole_run()[:-1], RunFailed(message="no room")):
            stored = store.append(run.id, event)
            now = stored.time + 3
            display.take(stored)
            with console.capture() as capture:
                console.print(render(display.view, now, EXPECTED))
            shown = capture.get()
            with page.caught_up(store):
                run = store.get(run.id)
                said = state_text(store, run, page, now, EXPECTED)
                cells = timeline(page, None)

            # What the run does. The page shows its state as a badge.
            activity = next((words for words in (*ACTIVITIES, "stopped", "failed") if words in shown), "running")
            page_activity = next((words for words, part in ACTIVITIES.items() if part in said), run.state)
            assert activity == page_activity

            # How long it still takes.
            left = display.view.seconds_left(now, EXPECTED)
            assert ("about" in said, "about" in shown) == (left is not None, left is not None)
            if left is not None:
                times_left += 1
                assert f"about {time_text(left)} left" in said
                assert f"about {duration(left)} left" in shown

            # How many blocks of the current stage are done: finished cells have the number of their stage.
            if display.view.stage is not None and display.view.started is not None:
                row = display.view.started.stages.index(display.view.stage)
                finished = sum(code == row + 1.5 for code in cells["data"][0]["z"][row])
                assert f"block {min(finished + 1, 2)}/2" in shown
                assert finished == display.view.blocks_done(display.view.stage)
    assert times_left > 20
    assert run.state == "failed"
    store.close()
