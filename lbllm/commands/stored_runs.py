"""runs list, show, resume, stop, cancel, rename, note, tag, delete, restore."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.markup import escape
from rich.table import Column, Table

from lbllm.commands.attend import attend, check_out, line, render
from lbllm.commands.options import JsonOption, ProcessesOption, RunArgument
from lbllm.commands.output import notices, plain, print_json, results
from lbllm.commands.training import print_outcome
from lbllm.errors import ConfigError, RunError
from lbllm.events import Evaluated, RunDone, RunFailed, StageDone
from lbllm.labels import run_facts
from lbllm.runs.deleted import remove, restore
from lbllm.runs.listed import ORDERS, Listed, Order, Wanted, describe, matching, ordered, scales
from lbllm.runs.notes import Note, note_of, notes, write_note, write_tags
from lbllm.runs.store import Request, Run, RunStore, State
from lbllm.runs.view import SUMMARY_KINDS, RunView
from lbllm.units import duration

SortOption = Annotated[
    str, typer.Option("--sort", help=f"{', '.join(ORDERS[:-1])} or {ORDERS[-1]}; the best, or the largest time, first.")
]
TagOption = Annotated[list[str] | None, typer.Option("--tag", help="Only runs with this tag. Repeatable: with all.")]
StateOption = Annotated[list[str] | None, typer.Option("--state", help="Only runs in this state. Repeatable.")]
FindOption = Annotated[str, typer.Option("--find", help="Only runs whose name, note, model or tags have these words.")]


def runs_list(
    as_json: JsonOption = False,
    deleted: Annotated[bool, typer.Option("--deleted", help="The deleted runs instead.")] = False,
    tag: TagOption = None,
    state: StateOption = None,
    find: FindOption = "",
    sort: SortOption = "oldest",
) -> None:
    """All runs, oldest first."""
    store = RunStore()
    for given, known, option in (((sort,), ORDERS, "--sort"), (state or (), get_args(State), "--state")):
        if wrong := [value for value in given if value not in known]:
            raise ConfigError(f"{option} {wrong[0]}: choose one of {', '.join(known)}")
    every = described(store, store.deleted() if deleted else store.all())
    wanted = Wanted(find, tuple(tag or ()), cast("tuple[State, ...]", tuple(state or ())))
    found = ordered(matching(every, wanted), cast("Order", sort))
    if as_json:
        print_json({"runs": [_listed_document(one) for one in found]})
        return
    grid = Table(Column("id", no_wrap=True), "name", "model", "format", "state", "bits", "perplexity", "tags", box=None)
    for one in found:
        figures = (f"{one.bits:.2f}" if one.bits else "", f"{one.latest.perplexity:.2f}" if one.latest else "")
        texts = (one.run.name, one.model or "", one.format or "", _state_text(one), *figures, ", ".join(one.note.tags))
        grid.add_row(one.run.id, *map(escape, texts))
    if found:
        results().print(grid)
        if len(scales(found)) > 1:
            plain(notices(), "Perplexities of different texts or teachers can't be compared.", style="dim")
    elif every:
        plain(results(), "no run is like this; `python -m lbllm runs list` shows all runs")
    else:
        plain(results(), "no deleted runs" if deleted else "no runs yet; `python -m lbllm quantize` makes one")


def described(store: RunStore, runs: Sequence[Run]) -> list[Listed]:
    """All that a list says of these runs."""
    written, found = notes(store), []
    for run in runs:
        view = RunView(run.id, SUMMARY_KINDS)
        with view.caught_up(store):
            found.append(describe(run, view, written.get(run.id, Note()), time.time()))
    return found


def _state_text(one: Listed) -> str:
    """The state, and of a run at work how far it is."""
    if one.run.state != "running" or not one.parts[1]:
        return one.run.state
    left = f", about {duration(one.left)} left" if one.left is not None else ""
    return f"{one.run.state}, {one.progress:.0%}{left}"


def runs_show(run: RunArgument, as_json: JsonOption = False) -> None:
    """A run's settings, state and results so far."""
    store = RunStore()
    found = store.get(run)
    stored = store.events(run)
    if as_json:
        note = note_of(store, run)
        document = _run_document(found) | {"note": note.text, "tags": note.tags}
        document |= {"config": found.config.model_dump(mode="json"), "events": len(stored)}
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
    note = note_of(store, run)
    if note.tags:
        plain(console, f"tags: {', '.join(note.tags)}")
    if note.text:
        plain(console, note.text)
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


def runs_note(
    run: RunArgument,
    text: Annotated[str | None, typer.Argument(help="The new note; an empty one removes it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a note about a run, or print the one it has."""
    store = RunStore()
    store.get(run)
    note = note_of(store, run) if text is None else write_note(store, run, text)
    if as_json:
        print_json({"run": run, "note": note.text, "tags": note.tags})
    else:
        plain(results(), note.text or f"run {run} has no note")


def runs_tag(
    run: RunArgument,
    tags: Annotated[list[str] | None, typer.Argument(help="Tags to add.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", "-r", help="A tag to take away. Repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Add tags to a run, take some away, or print those it has."""
    store = RunStore()
    store.get(run)
    note = note_of(store, run)
    gone = {tag.casefold() for tag in remove or ()}
    if unknown := gone - {tag.casefold() for tag in note.tags}:
        raise RunError(f"run {run} has no tag {min(unknown)!r}; it has {', '.join(note.tags) or 'none'}")
    if tags or remove:
        note = write_tags(store, run, [*(tag for tag in note.tags if tag.casefold() not in gone), *(tags or ())])
    if as_json:
        print_json({"run": run, "note": note.text, "tags": note.tags})
    else:
        plain(results(), ", ".join(note.tags) or f"run {run} has no tags")


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


def _listed_document(one: Listed) -> dict[str, Any]:
    latest = one.latest
    return _run_document(one.run) | {
        "note": one.note.text,
        "tags": one.note.tags,
        "model": one.model,
        "format": one.format,
        "bpw": one.bits,
        "disk_bytes": one.size,
        "tokens_per_second": one.speed,
        "progress": one.progress,
        "seconds_left": one.left,
        "perplexity": latest.perplexity if latest is not None else None,
        "kl": latest.kl if latest is not None else None,
        "text": latest.text if latest is not None else None,
    }
