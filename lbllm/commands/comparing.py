"""runs compare, runs sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from lbllm.commands.options import (
    ActBitsOption,
    ConfigOption,
    CorpusOption,
    FormatOption,
    FromOption,
    GroupSizeOption,
    IgnoreMemoryOption,
    JsonOption,
    KvBitsOption,
    PresetOption,
    ProcessesOption,
    RunDeviceOption,
    SetOption,
    TeacherOption,
    run_config,
)
from lbllm.commands.output import counter, notices, plain, print_json, results
from lbllm.commands.stored_runs import described
from lbllm.errors import ConfigError, ResourceError, RunError
from lbllm.runs.compared import (
    COSTS,
    QUALITIES,
    Cost,
    Group,
    Quality,
    cautions,
    differing,
    find,
    frontier,
    groups,
    points,
    setting_label,
)
from lbllm.runs.listed import Listed, Wanted, matching
from lbllm.runs.notes import notes
from lbllm.runs.store import RunStore
from lbllm.runs.sweep import Planned, free_name, parse_axis, planned, queue
from lbllm.units import duration, size

if TYPE_CHECKING:
    from lbllm.measure.sweep import SweepEstimate


def runs_compare(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN...", help="Ids of runs.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Also all runs with this tag. Repeatable.")] = None,
    cost: Annotated[str, typer.Option("--cost", help="bits, size or speed: what the frontier goes by.")] = "bits",
    quality: Annotated[str, typer.Option("--quality", help="perplexity or kl.")] = "perplexity",
    measure: Annotated[
        bool, typer.Option("--measure", help="First measure KL and speed of the finished runs on one text.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Runs side by side: the settings that differ, and which runs no other one beats (marked with *)."""
    for value, known, option in ((cost, COSTS, "--cost"), (quality, QUALITIES, "--quality")):
        if value not in known:
            raise ConfigError(f"{option} {value}: choose one of {', '.join(known)}")
    store = RunStore()
    listed = described(store, store.all())
    tagged = [one.run.id for name in tag or () for one in matching(listed, Wanted(tags=(name,)))]
    chosen = find(listed, [*(runs or ()), *tagged])
    if not chosen:
        raise RunError("no run is chosen; give ids as `python -m lbllm runs list` shows them, or a --tag that is used")
    if measure:
        _measure(store, chosen, quiet=as_json)
        chosen = find(described(store, store.all()), [one.run.id for one in chosen])
    by, of = cast("Cost", cost), cast("Quality", quality)
    if as_json:
        print_json(_document(chosen, by, of))
    else:
        _show(chosen, by, of)


def _measure(store: RunStore, chosen: list[Listed], *, quiet: bool) -> None:
    from lbllm.measure.finished import measure_finished

    finished = [one.run for one in chosen if one.run.state == "done"]
    with counter(notices(quiet=quiet)) as show:
        measure_finished(store, finished, on_progress=lambda done, what: show("runs", done, len(finished)))


def _best(chosen: list[Listed], group: Group, cost: Cost, quality: Quality) -> set[str]:
    made = points(chosen, group, cost, quality)
    return {point.run for point in frontier(made, more_is_better=cost == "speed")}


def _document(chosen: list[Listed], cost: Cost, quality: Quality) -> dict[str, Any]:
    rows, same = differing(chosen)
    return {
        "runs": [
            {
                "id": one.run.id,
                "name": one.run.name,
                "state": one.run.state,
                "model": one.model,
                "bpw": one.bits,
                "disk_bytes": one.size,
                "tokens_per_second": one.speed,
            }
            for one in chosen
        ],
        "settings": rows,
        "same_settings": same,
        "measured": [
            {
                "teacher": group.model,
                "text": group.text,
                "runs": {
                    one.run.id: {"perplexity": event.perplexity, "kl": event.kl, "stage": event.what}
                    for one in chosen
                    if one.run.id in group.runs and (event := one.measured.get(group.text)) is not None
                },
                "frontier": sorted(_best(chosen, group, cost, quality)),
            }
            for group in groups(chosen)
        ],
        "cautions": cautions(chosen),
    }


def _show(chosen: list[Listed], cost: Cost, quality: Quality) -> None:
    console = results()
    for group in groups(chosen):
        best = _best(chosen, group, cost, quality)
        grid = Table(title=escape(f"Teacher {group.model}, {group.text}"), title_justify="left", box=None)
        for heading in ("", "run", "bits", "size", "tokens/s", "perplexity", "KL"):
            grid.add_column(heading, justify="left" if heading in ("", "run") else "right")
        for one in chosen:
            if one.run.id in group.runs:
                event = one.measured[group.text]
                grid.add_row(
                    "*" if one.run.id in best else "",
                    escape(one.run.name),
                    "–" if one.bits is None else f"{one.bits:.3f}",
                    "–" if one.size is None else size(one.size),
                    "–" if one.speed is None else f"{one.speed:.1f}",
                    f"{event.perplexity:.2f}",
                    "–" if event.kl is None else f"{event.kl:.4f}",
                )
        console.print(grid)
        plain(console, f"* no other run here is better in both: {COSTS[cost]} and {QUALITIES[quality]}", style="dim")
    if not groups(chosen):
        plain(console, "none of these runs has been evaluated yet")
    rows, same = differing(chosen)
    grid = Table("setting", *(escape(one.run.name) for one in chosen), box=None)
    for path, values in rows.items():
        grid.add_row(escape(setting_label(path)), *map(escape, values))
    if rows:
        console.print(grid)
    plain(console, f"{len(rows)} {'setting differs' if len(rows) == 1 else 'settings differ'}, {same} are the same")
    for caution in cautions(chosen):
        plain(notices(), caution, style="yellow")


def runs_sweep(
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="KEY=V,V", help="A setting and its values, e.g. quant.group_size=16,32."),
    ],
    start: Annotated[bool, typer.Option("--start", help="Queue the runs; without it they are only shown.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="The tag of all runs. \\[default: sweep N]")] = None,
    model: TeacherOption = None,
    preset: PresetOption = None,
    group_size: GroupSizeOption = None,
    weight_format: FormatOption = None,
    act_bits: ActBitsOption = None,
    kv_bits: KvBitsOption = None,
    corpus: CorpusOption = None,
    device: RunDeviceOption = None,
    assignments: SetOption = None,
    config: ConfigOption = None,
    checkpoint: FromOption = None,
    processes: ProcessesOption = None,
    ignore_memory: IgnoreMemoryOption = False,
    as_json: JsonOption = False,
) -> None:
    """One run for each combination of the settings' values, queued one after the other. Without --start: what they
    would cost."""
    base = run_config(
        model, preset, group_size, weight_format, act_bits, kv_bits, corpus, device, assignments, config, checkpoint
    )
    axes: dict[str, list[Any]] = {}
    for text in vary:
        path, values = parse_axis(text)
        axes[path] = [*axes.get(path, ()), *values]
    runs = planned(base, axes)
    from lbllm.machine import check_processes
    from lbllm.measure.sweep import estimate_sweep

    check_processes(base.device, processes or 1)
    store = RunStore()
    found = estimate_sweep(runs, store.root, ignore_memory=ignore_memory)
    if not as_json:
        _show_sweep(runs, found)
    if start and found.problems:
        raise ResourceError(f"the sweep can't start: {'; '.join(found.problems)}")
    made = queue(store, runs, name or free_name(notes(store)), processes or 1) if start else []
    if as_json:
        print_json(_sweep_document(runs, found) | {"started": [run.id for run in made]})
    elif made:
        plain(results(), f"{len(made)} runs are queued; `python -m lbllm runs list` shows them")
    else:
        for problem in found.problems:
            plain(notices(), problem, style="yellow")
        plain(results(), "nothing is started; add --start to queue these runs")


def _show_sweep(runs: list[Planned], found: SweepEstimate) -> None:
    grid = Table("run", "bits", "checkpoint", "time", box=None)
    for one, result in zip(runs, found.runs, strict=True):
        figures = ("–", "–", "–")
        if result is not None:
            figures = (f"{result.bpw:.3f}", size(result.disk_bytes), duration(result.seconds))
        grid.add_row(escape(one.name), *figures)
    console = results()
    console.print(grid)
    total = f"{len(runs)} runs, about {duration(found.seconds)} one after the other, {size(found.disk_bytes)} on disk"
    plain(console, total)


def _sweep_document(runs: list[Planned], found: SweepEstimate) -> dict[str, Any]:
    each = [
        {"choice": one.choice, "bpw": result.bpw, "disk_bytes": result.disk_bytes, "seconds": result.seconds}
        if result is not None
        else {"choice": one.choice}
        for one, result in zip(runs, found.runs, strict=True)
    ]
    return {"runs": each, "seconds": found.seconds, "disk_bytes": found.disk_bytes, "problems": found.problems}
