"""plan: a format for each layer, for a number of bits, a size of the file or of memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lbllm.commands.options import (
    ConfigOption,
    CorpusOption,
    JsonOption,
    PresetOption,
    RunDeviceOption,
    SetOption,
    run_config,
)
from lbllm.commands.output import notices, plain, print_json, results
from lbllm.errors import ConfigError
from lbllm.files import write_errors, write_file

if TYPE_CHECKING:
    from lbllm.planning.plan import Choice, Plan


def plan(
    target: Annotated[str, typer.Option(help='At most so much: "2.6 bits", "70 MB" or "4 GB of memory".')],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The teacher, as for quantize.")] = None,
    check: Annotated[
        bool,
        typer.Option(help="Measure the plan and one format for all layers, and take the better; some minutes each."),
    ] = True,
    overridden: Annotated[
        str, typer.Option(help="Layers whose format is set already by quant.overrides: refuse, keep or replace.")
    ] = "refuse",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the settings with the plan here, for quantize --config.")
    ] = None,
    preset: PresetOption = None,
    corpus: CorpusOption = None,
    device: RunDeviceOption = None,
    assignments: SetOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose format, group size and parameter bits layer by layer, by what each layer costs.

    The first plan of a model and text measures them, some minutes on the embedded model; later ones reuse that.
    """
    from lbllm.planning.plan import WAYS, OverriddenError
    from lbllm.planning.target import parse_target
    from lbllm.planning.work import planned

    wanted = parse_target(target)
    if overridden not in WAYS:
        raise ConfigError(f"--overridden {overridden}: choose from {', '.join(WAYS)}")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out {out}: give a file in a folder that exists")
    settings = run_config(model, preset, None, None, None, None, corpus, device, assignments, config)
    console = notices(quiet=as_json)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("Reading", total=1.0)
        try:
            found = planned(
                settings,
                wanted,
                overridden=overridden,
                check=check,
                report=lambda share, what: bars.update(task, completed=share, description=what),
            )
        except OverriddenError as error:
            raise ConfigError(f"{error}: --overridden keep, or --overridden replace") from None
    if out is not None:
        with write_errors(out):
            write_file(out, (found.config.model_dump_json(indent=2) + "\n").encode())
    if as_json:
        print_json(_document(found))
        return
    _show(found)
    if out is not None:
        plain(results(), f"settings with the plan: {out}; python -m lbllm quantize --config {out} --out FOLDER")


def _show(found: Plan) -> None:
    from lbllm.planning.words import chosen_words, format_counts

    console = results()
    for line in chosen_words(found):
        plain(console, line)
    grid = Table("layers", "format", box=None)
    for words, count in format_counts(found).items():
        grid.add_row(str(count), escape(words))
    console.print(grid)
    grid = Table("bits", "KL of a plan", "one format", "KL", box=None)
    for one in found.curve[:: max(1, len(found.curve) // 12)]:
        best = _best(found, one)
        beside = ("", "") if best is None else (escape(_name(best)), f"{best.kl:.3f}")
        grid.add_row(f"{one.bits:.2f}", f"{one.kl:.3f}", *beside)
    console.print(grid)


def _best(found: Plan, one: Choice) -> Choice | None:
    return min((u for u in found.uniforms if u.bits <= one.bits + 1e-9), key=lambda u: u.kl, default=None)


def _name(one: Choice) -> str:
    from lbllm.planning.candidates import format_words

    assert one.uniform is not None
    return f"{format_words(one.uniform)} ({one.bits:.2f})"


def _document(found: Plan) -> dict[str, Any]:
    def choice(one: Choice | None) -> dict[str, Any] | None:
        if one is None:
            return None
        uniform = (
            None if one.uniform is None else one.uniform.model_dump(include={"format", "group_size", "param_bits"})
        )
        return {"bits": one.bits, "predicted_kl": one.predicted, "measured_kl": one.measured, "uniform": uniform}

    return {
        "target": found.target.words,
        "chosen": choice(found.chosen),
        "rejected": choice(found.rejected),
        "best_uniform": choice(found.uniform),
        "disk_bytes": found.size,
        "memory_bytes": found.memory,
        "kept": list(found.kept),
        "curve": [choice(one) for one in found.curve],
        "uniforms": [choice(one) for one in found.uniforms],
        "settings": found.config.model_dump(mode="json"),
    }
