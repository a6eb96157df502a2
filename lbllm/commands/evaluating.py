"""evaluate with several models, prompts or parts, and the stored evaluations: list, show, continue, cancel, delete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from lbllm.commands.attend import StoppedByUser
from lbllm.commands.options import JsonOption
from lbllm.commands.output import counter, notices, plain, print_json, results
from lbllm.errors import ConfigError, CorpusError, ResourceError, RunError
from lbllm.evaluation.store import ACTIVE, Evaluation, EvaluationStore
from lbllm.files import write_file
from lbllm.units import duration

if TYPE_CHECKING:
    from lbllm.evaluation.job import EvaluationJob
    from lbllm.evaluation.parts import Parts
    from lbllm.evaluation.results import Difference

POLL_SECONDS = 0.2
WAITING_SECONDS = 5.0
EvaluationArgument = Annotated[str, typer.Argument(metavar="ID", help="As `evaluations list` shows it.")]
OutFileOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Also write all answers to this file, .csv or .html.")
]


def evaluate_stored(job: EvaluationJob, *, queue: bool, out: Path | None, as_json: bool) -> None:
    """Put an evaluation into the queue and, unless ``queue``, show it until its end. Ctrl-C leaves it at work."""
    _check_out(out, job.measure)
    store = EvaluationStore()
    made = store.create(job)
    store.start(made.id)
    if queue:
        if as_json:
            print_json({"evaluation": made.id})
        else:
            plain(results(), made.id)
        return
    _show(follow(store, made.id, quiet=as_json), out, as_json)


def stored_job(
    models: Sequence[str],
    teacher: str | None,
    text: str,
    seq_len: int | None,
    limit: int | None,
    tasks: str | None,
    prompts: Path | None,
    answering: dict[str, Any],
    seed: int,
) -> EvaluationJob:
    """The evaluation that the options of `evaluate` ask for; the teacher is one of its models. Raises LbllmError."""
    from lbllm.checkpoints.find import find_model
    from lbllm.evaluation.job import make_job
    from lbllm.measure.zero_shot import task_names
    from lbllm.texts.catalogue import TEXTS
    from lbllm.texts.windows import check_text

    named = [*models, *([teacher] if teacher is not None and teacher not in models else [])]
    for name in named:
        find_model(name)
    values: dict[str, Any] = {"models": tuple(map(absolute, named)), "titles": tuple(named), "seed": seed}
    values["teacher"] = None if teacher is None else absolute(teacher)
    if prompts is not None:
        return make_job(measure="prompts", prompts=prompts_in(prompts), settings=answering, **values)
    if tasks is not None:
        return make_job(measure="tasks", tasks=tuple(task_names(tasks)), questions=limit, **values)
    check_text(text, limit)
    place = text if text in (entry.id for entry in TEXTS) else str(Path(text).absolute())
    return make_job(measure="text", text=place, seq_len=seq_len, windows=limit, **values)


def prompts_in(file: Path) -> tuple[str, ...]:
    """The prompts of a file that --prompts names. Raises CorpusError."""
    from lbllm.evaluation.prompt_files import read_prompts

    try:
        data = file.read_bytes()
    except OSError as error:
        raise CorpusError(f"--prompts {file} can't be read ({error.strerror}); give another file") from None
    return read_prompts(file.name, data)


def absolute(name: str) -> str:
    """A model's name that means the same in another process: a path from the root, other names as they are."""
    from lbllm.checkpoints.find import ALONE
    from lbllm.config import SHIPPED
    from lbllm.models.catalogue import MODELS

    path = Path(name).expanduser()
    if name.endswith(ALONE) and not path.exists():
        return f"{absolute(name.removesuffix(ALONE))}{ALONE}"
    known = name == SHIPPED or any(entry.id == name.lower() for entry in MODELS)
    return str(path.resolve()) if path.exists() and not known else name


def evaluations_list(as_json: JsonOption = False) -> None:
    """All evaluations, oldest first."""
    found = EvaluationStore().all()
    if as_json:
        print_json({"evaluations": [_listed(one) for one in found]})
        return
    grid = Table(Column("id", no_wrap=True), "name", "models", "state", box=None)
    for one in found:
        listed = _listed(one)
        names = ", ".join(listed["models"])
        grid.add_row(one.id, escape(listed["name"]), escape(names), _state(one))
    if found:
        results().print(grid)
    else:
        plain(notices(), "no evaluations yet; `python -m lbllm evaluate` starts one")


def evaluations_show(name: EvaluationArgument, out: OutFileOption = None, as_json: JsonOption = False) -> None:
    """What an evaluation has found so far."""
    found = EvaluationStore().get(name)
    _check_out(out, found.job.measure)
    _show(found, out, as_json)


def evaluations_continue(name: EvaluationArgument, out: OutFileOption = None, as_json: JsonOption = False) -> None:
    """Measure what is missing of an evaluation that ended early, and show it until its end."""
    store = EvaluationStore()
    _check_out(out, store.get(name).job.measure)
    store.start(name)
    _show(follow(store, name, quiet=as_json), out, as_json)


def evaluations_cancel(name: EvaluationArgument, as_json: JsonOption = False) -> None:
    """End an evaluation that waits or works; what is finished stays."""
    EvaluationStore().cancel(name)
    _said(name, "ends after its current step", as_json)


def evaluations_delete(name: EvaluationArgument, as_json: JsonOption = False) -> None:
    """Remove an evaluation with its figures and answers."""
    EvaluationStore().delete(name)
    _said(name, "is deleted", as_json)


def _said(name: str, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"evaluation": name})
    else:
        plain(notices(), f"evaluation {name} {what}")


def follow(store: EvaluationStore, name: str, *, quiet: bool, what: str = "evaluation") -> Evaluation:
    """Wait for the end of an evaluation, with a bar named ``what``. Raises RunError if it failed; StoppedByUser after
    Ctrl-C, which leaves it at work."""
    began, told = time.monotonic(), False
    try:
        with counter(notices(quiet=quiet)) as show:
            while (found := store.get(name)).state in ACTIVE:
                if found.state == "queued" and not told and time.monotonic() - began > WAITING_SECONDS:
                    plain(notices(quiet=quiet), "waits for its turn: a run or another evaluation is at work")
                    told = True
                if found.progress is not None and found.progress.total:
                    show(what, found.progress.done, found.progress.total)
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise StoppedByUser(
            f"evaluation {name} goes on without this command; `python -m lbllm evaluations show {name}` shows it, "
            f"`evaluations cancel {name}` ends it"
        ) from None
    if found.state != "done":
        raise RunError(
            f"evaluation {name} is {found.state}" + (f": {found.message}" if found.message else "") + ". "
            f"`python -m lbllm evaluations continue {name}` goes on after its finished parts"
        )
    return found


def _check_out(out: Path | None, measure: str) -> None:
    """Refuse before hours of work what can't be written."""
    if out is None:
        return
    if measure != "prompts":
        raise ConfigError("--out writes the answers of --prompts; print other figures with --json")
    if out.suffix.lower() not in (".csv", ".html"):
        raise ConfigError(f"--out {out}: give a name that ends in .csv or .html")
    check_folder(out)


def check_folder(out: Path) -> None:
    """Refuse before any work a file whose folder does not exist. Raises ConfigError."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.absolute().parent} does not exist; make it first")


def _show(found: Evaluation, out: Path | None, as_json: bool) -> None:
    from lbllm.evaluation.export import answers_csv, answers_page
    from lbllm.evaluation.parts import Parts

    job, parts = found.job, Parts(found.folder)
    if out is not None:
        written = answers_csv(job, parts) if out.suffix.lower() == ".csv" else answers_page(job, parts)
        try:
            write_file(out, written.encode())
        except OSError as error:
            raise ResourceError(f"{out} can't be written ({error}); choose another place") from None
    if as_json:
        document = _listed(found) | {"measure": job.measure, "teacher": job.teacher, "message": found.message}
        print_json(document | _document(job, parts))
        return
    plain(results(), f"{job.title}: {_state(found)}")
    if found.message:
        plain(notices(), found.message, style="yellow")
    for grid in {"text": _text_tables, "tasks": _task_tables, "prompts": _answer_tables}[job.measure](job, parts):
        results().print(grid)
    if out is not None:
        plain(notices(), f"answers written to {out}")


def _listed(one: Evaluation) -> dict[str, Any]:
    document: dict[str, Any] = {"evaluation": one.id, "name": "", "models": [], "state": one.state}
    try:
        document |= {"name": one.job.title, "models": list(one.job.models)}
    except ConfigError as error:
        document |= {"name": str(error)}
    if one.state == "running" and one.progress is not None:
        document["progress"] = one.progress.share
    return document


def _state(one: Evaluation) -> str:
    if one.state != "running" or one.progress is None:
        return one.state
    left = one.progress.seconds_left(time.time())
    return f"running, {one.progress.share:.0%}" + (f", about {duration(left)} left" if left is not None else "")


def _document(job: EvaluationJob, parts: Parts) -> dict[str, Any]:
    from dataclasses import asdict

    from lbllm.evaluation import results as read

    names = job.models
    other = job.reference
    if job.measure == "prompts":
        given = [[asdict(answer) for answer in parts.answers(n)] for n in range(len(names))]
        figures = {names[n]: asdict(found) for n, found in read.answers_results(job, parts).items()}
        return {"prompts": list(job.prompts), "figures": figures, "answers": dict(zip(names, given, strict=True))}
    if job.measure == "tasks":
        tasks = read.task_results(job, parts)
        return {
            "figures": {names[n]: {t or "average": asdict(r) for t, r in of.items()} for n, of in tasks.items()},
            "differences": _differences(job, {n: read.task_difference(job, parts, n, other) for n in tasks}),
            "only_one_right": {
                names[n]: [
                    asdict(one) | {"winner": names[one.winner], "chosen": {names[k]: c for k, c in one.chosen.items()}}
                    for one in read.disputed(job, parts, other, n)
                ]
                for n in tasks
                if n != other
            },
        }
    texts = read.text_results(job, parts)
    taken = {"by_kind": read.by_kind(job, parts), "by_position": read.by_position(job, parts)}
    return {
        "text": job.text,
        "figures": {names[n]: asdict(result) for n, result in texts.items()},
        "differences": _differences(job, {n: read.text_difference(job, parts, n, other) for n in texts}),
    } | {
        key: [
            {"label": p.label, "share": p.share, "perplexity": {names[n]: v for n, v in p.perplexity.items()}}
            for p in found
        ]
        for key, found in taken.items()
    }


def _differences(job: EvaluationJob, found: dict[int, Difference | None]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        job.models[n]: None if one is None else asdict(one) | {"from": job.models[job.reference]}
        for n, one in found.items()
        if n != job.reference
    }


def _table(*heads: str) -> Table:
    grid = Table()
    for head in heads:
        grid.add_column(escape(head), justify="right" if head else "left", overflow="fold")
    return grid


def _text_tables(job: EvaluationJob, parts: Parts) -> list[Table]:
    from lbllm.evaluation import results as read

    found = read.text_results(job, parts)
    other = job.reference
    grid = _table("", "perplexity", "95%", "KL", "same top token", "bits per byte", "difference")
    grid.caption = f"differences from {escape(job.shown_names[other])}, with 95% intervals (paired bootstrap)"
    for n, one in found.items():
        within = f"{one.interval.low:.2f} to {one.interval.high:.2f}" if one.interval else ""
        kl = "" if one.kl is None or one.agreement is None else f"{one.kl:.4f}"
        agreed = f"{100 * one.agreement:.1f}%" if kl and one.agreement is not None else ""
        apart = "" if n == other else _apart(read.text_difference(job, parts, n, other), "{:+.2f}", 1)
        grid.add_row(
            escape(job.shown_names[n]), f"{one.perplexity:.4f}", within, kl, agreed, f"{one.bits_per_byte:.4f}", apart
        )
    tables = [grid]
    for head, taken in (("kind of token", read.by_kind(job, parts)), ("tokens read", read.by_position(job, parts))):
        shown = list(taken[0].perplexity) if taken else []
        part = _table(head, "share", *(job.shown_names[n] for n in shown))
        for row in taken:
            part.add_row(row.label, f"{100 * row.share:.1f}%", *(f"{row.perplexity[n]:.2f}" for n in shown))
        tables.append(part)
    return tables


def _task_tables(job: EvaluationJob, parts: Parts) -> list[Table]:
    from lbllm.evaluation import results as read

    found = read.task_results(job, parts)
    grid = _table("", "questions", "chance", *(job.shown_names[n] for n in found))
    for task in (*job.tasks, ""):
        row = {n: tasks[task] for n, tasks in found.items() if task in tasks}
        if not row:
            continue
        one = next(iter(row.values()))
        cells = []
        for n in found:
            result = row.get(n)
            within = (
                f" ({100 * result.interval.low:.1f} to {100 * result.interval.high:.1f})"
                if result and result.interval
                else ""
            )
            cells.append("" if result is None else f"{100 * result.accuracy:.1f}{within}")
        grid.add_row(task or "average", f"{one.questions:,}", f"{100 * one.chance:.0f}", *cells)
    apart = _table("", f"points from {job.shown_names[job.reference]}", "only this one is right", "only the other")
    for n in found:
        if n != job.reference and job.reference in found:
            only = read.disputed(job, parts, n, job.reference)
            won = sum(one.winner == n for one in only)
            said = _apart(read.task_difference(job, parts, n, job.reference), "{:+.1f}", 100)
            apart.add_row(escape(job.shown_names[n]), said, f"{won:,}", f"{len(only) - won:,}")
    return [grid, apart] if len(found) > 1 else [grid]


def _answer_tables(job: EvaluationJob, parts: Parts) -> list[Table]:
    from lbllm.evaluation import results as read

    grid = _table("", "answers", "without", "tokens each", "tokens/s", "KL", "voted best")
    for n, one in read.answers_results(job, parts).items():
        kl = "" if one.kl is None else f"{one.kl:.4f}"
        figures = (f"{one.tokens:.0f}", f"{one.tokens_per_second:.1f}", kl, str(one.best))
        grid.add_row(escape(job.shown_names[n]), str(one.answers), str(one.errors), *figures)
    return [grid]


def _apart(found: Difference | None, form: str, times: float) -> str:
    if found is None:
        return "not comparable"
    said = form.format(times * found.value)
    if found.interval is None:
        return said
    return f"{said} ({form.format(times * found.interval.low)} to {form.format(times * found.interval.high)})"
