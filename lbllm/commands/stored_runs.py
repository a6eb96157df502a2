"""runs list, show, resume, stop, cancel, rename, delete, restore."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from lbllm.commands.attend import attend, check_out, line, render
from lbllm.commands.options import JsonOption, ProcessesOption, RunArgument
from lbllm.commands.output import notices, plain, print_json, results
from lbllm.commands.training import print_outcome
from lbllm.events import Evaluated, RunDone, RunFailed, StageDone
from lbllm.labels import run_facts
from lbllm.runs.deleted import remove, restore
from lbllm.runs.store import Request, Run, RunStore
from lbllm.runs.view import RunView


def runs_list(
    as_json: JsonOption = False,
    deleted: Annotated[bool, typer.Option("--deleted", help="The deleted runs instead.")] = False,
) -> None:
    """All runs, oldest first."""
    found = RunStore().deleted() if deleted else RunStore().all()
    if as_json:
        print_json({"runs": [_run_document(run) for run in found]})
        return
    grid = Table(Column("id", no_wrap=True), "name", "state", "created", box=None)
    for run in found:
        grid.add_row(run.id, escape(run.name), run.state, f"{datetime.fromtimestamp(run.created):%Y-%m-%d %H:%M}")
    if found:
        results().print(grid)
    else:
        plain(results(), "no deleted runs" if deleted else "no runs yet; `python -m lbllm quantize` makes one")


def runs_show(run: RunArgument, as_json: JsonOption = False) -> None:
    """A run's settings, state and results so far."""
    store = RunStore()
    found = store.get(run)
    stored = store.events(run)
    if as_json:
        document = _run_document(found) | {"config": found.config.model_dump(mode="json"), "events": len(stored)}
        # The last event of each kind tells where the run stands; the evaluations are all results.
        document["latest"] = {one.event.kind: one.event.model_dump(mode="json") for one in stored}
        evaluations = [one.event for one in stored if isinstance(one.event, Evaluated)]
        document["evaluated"] = [event.model_dump(mode="json") for event in evaluations]
        print_json(document)
        return
    console = results()
    config = found.config
    plain(console, f"{found.id}  {found.name}  {found.state}")
    plain(console, str(found.folder))
    plain(console, f"model {config.model}, text {config.corpus}, preset {config.preset}")
    plain(console, ", ".join(f"{label}: {value}" for label, value in run_facts(config).items()))
    view = RunView(run)
    for one in stored:
        view.update(one)
        if isinstance(one.event, RunFailed):
            plain(console, one.event.message, style="red")
        elif isinstance(one.event, StageDone | Evaluated | RunDone):
            plain(console, str(line(view, one.event, {})))
    if found.state == "interrupted" and found.failure is not None:
        plain(console, found.failure, style="red")
    if found.state == "running" and stored:
        # Without an estimate, which takes seconds: the time left is shown where the finished blocks tell it.
        console.print(render(view, time.time(), {}))


def runs_resume(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also copy the finished checkpoint here.")] = None,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a stopped, failed or interrupted run from its last finished block."""
    store = RunStore()
    found = store.get(run)
    if out is not None:
        check_out(out)
    if processes is not None:
        from lbllm.machine import check_processes  # late: it brings torch

        check_processes(found.config.device, processes)
    outcome = attend(store, found, notices(quiet=as_json), out, processes=processes)
    print_outcome(outcome, as_json=as_json)


def runs_stop(run: RunArgument, as_json: JsonOption = False) -> None:
    """Ask a run to stop after its current step; finished blocks are kept."""
    _request(run, "stop", as_json)


def runs_cancel(run: RunArgument, as_json: JsonOption = False) -> None:
    """Ask a run to end and delete its finished blocks."""
    _request(run, "cancel", as_json)


def runs_rename(run: RunArgument, name: Annotated[str, typer.Argument()], as_json: JsonOption = False) -> None:
    """Give a run another name."""
    renamed = RunStore().rename(run, name)
    if as_json:
        print_json({"run": run, "name": renamed.name})
    else:
        plain(results(), f"run {run} is now called {renamed.name}")


def runs_delete(
    run: RunArgument,
    for_good: Annotated[bool, typer.Option("--for-good", help="Remove a run that is deleted already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move a run aside; `runs restore` brings it back. With --for-good, after that, remove its files."""
    store = RunStore()
    if for_good:
        remove(store, run)
        said = f"run {run} is removed for good"
    else:
        store.delete(run)
        said = f"run {run} is deleted; `python -m lbllm runs restore {run}` brings it back"
    if as_json:
        print_json({"run": run, "for_good": for_good})
    else:
        plain(results(), said)


def runs_restore(run: RunArgument, as_json: JsonOption = False) -> None:
    """Bring a deleted run back."""
    restored = restore(RunStore(), run)
    if as_json:
        print_json({"run": run, "state": restored.state})
    else:
        plain(results(), f"run {run} is back; it is {restored.state}")


def _request(run: str, request: Request, as_json: bool) -> None:
    store = RunStore()
    store.request(run, request)
    state = store.get(run).state
    if as_json:
        print_json({"run": run, "request": request, "state": state})
    else:
        plain(results(), f"asked run {run} to {request}; it is {state}")


def _run_document(run: Run) -> dict[str, Any]:
    return {"id": run.id, "name": run.name, "state": run.state, "created": run.created, "folder": run.folder}
