"""evaluate (one model, or one beside its teacher), table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lbllm.commands.evaluating import OutFileOption, evaluate_stored, stored_job
from lbllm.commands.options import (
    DeviceOption,
    JsonOption,
    LimitOption,
    ModelsOption,
    RunArgument,
    SeqLenOption,
    TextOption,
)
from lbllm.commands.output import counter, notices, plain, print_json, results
from lbllm.errors import ConfigError, CorpusError, ModelError, RunError
from lbllm.events import Evaluated
from lbllm.runs.store import Run, RunStore

if TYPE_CHECKING:
    from lbllm.measure.table import TableRow
    from lbllm.measure.zero_shot import Score


def evaluate(
    model: ModelsOption,
    text: TextOption = "wikitext2",
    seq_len: SeqLenOption = None,
    limit: LimitOption = None,
    teacher: Annotated[str | None, typer.Option(help="Also measure KL and top-1 agreement to this model.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot accuracy instead: piqa, arc_easy and so on, joined by commas, or all."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Answers instead, to the prompts of a .txt (one a line) or .jsonl file.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of an answer at most.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of the answers; 0: the likeliest token.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draws the questions of tasks, and samples answers. \\[default: 0]")
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="Also intervals, and perplexity by position and by kind of token.")
    ] = False,
    out: OutFileOption = None,
    queue: Annotated[bool, typer.Option("--queue", help="Only put it into the queue, and print its id.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a teacher or a packed checkpoint on consecutive windows of a text, or its accuracy in tasks, beside
    another model's.

    With several --model, or with --prompts, --parts, --seed, --out or --queue, the evaluation is stored, as those of
    the page Evaluate: `evaluations` lists it, and it can be continued. Figures then have intervals (paired bootstrap).
    """
    from lbllm.checkpoints.find import open_model
    from lbllm.machine import device_named
    from lbllm.measure.perplexity import divergence, perplexity
    from lbllm.texts.windows import check_text, evaluation_windows

    if len(model) > 1 or parts or queue or any(given is not None for given in (prompts, seed, out)):
        if device != "auto":
            raise ConfigError("--device is for one model alone; a stored evaluation takes the device that is free")
        answering = {"max_new_tokens": max_tokens, "temperature": temperature, "seed": seed or 0}
        job = stored_job(model, teacher, text, seq_len, limit, tasks, prompts, answering, seed or 0)
        evaluate_stored(job, queue=queue, out=out, as_json=as_json)
        return
    name = model[0]
    if tasks is not None:
        evaluate_tasks(name, teacher, tasks, limit, device, as_json)
        return
    place = device_named(device)
    check_text(text, limit)
    student, tokenizer = open_model(name, device=place)
    sequences = evaluation_windows(text, student, tokenizer, seq_len, limit)
    document: dict[str, Any] = {"model": name, "text": text, "seq_len": sequences.shape[1], "windows": len(sequences)}
    with counter(notices(quiet=as_json)) as show:
        if teacher is None:
            result = perplexity(student, sequences, on_progress=lambda done, total: show(name, done, total))
            document |= asdict(result)
        else:
            reference, other = open_model(teacher, device=place)
            if other.get_vocab() != tokenizer.get_vocab():
                raise ModelError(f"{name} and {teacher} have different vocabularies and can't be compared")
            compared = divergence(
                reference, student, sequences, on_progress=lambda done, total: show(name, done, total)
            )
            document |= {"perplexity": compared.student_perplexity, "tokens": compared.tokens, "teacher": teacher}
            document |= {"teacher_perplexity": compared.teacher_perplexity, "kl": compared.kl}
            document |= {"top1_agreement": compared.top1_agreement}
    wrong = [key for key, value in document.items() if isinstance(value, float) and math.isnan(value)]
    if wrong:
        raise ModelError(
            f"{name} on {text}: {' and '.join(wrong)} became NaN. Its weights or its "
            "activations are damaged: load the model again, or try --device cpu"
        )
    if as_json:
        print_json(document)
        return
    counted = f"{document['tokens']:,} tokens, windows of {sequences.shape[1]}"
    plain(results(), f"perplexity {document['perplexity']:.4f}  ({counted})")
    if teacher is not None:
        plain(results(), f"teacher {document['teacher_perplexity']:.4f}, KL {document['kl']:.4f} nats per token")
        plain(results(), f"same most likely token: {100 * document['top1_agreement']:.1f}%")


def evaluate_tasks(model: str, teacher: str | None, tasks: str, limit: int | None, device: str, as_json: bool) -> None:
    """Print the zero-shot accuracy of one or two models in tasks, and the averages over them."""
    from lbllm.checkpoints.find import open_model
    from lbllm.machine import device_named
    from lbllm.measure.zero_shot import QUESTIONS_SEED, task_names, zero_shot

    names = task_names(tasks)
    found: dict[str, dict[str, Score]] = {}
    with counter(notices(quiet=as_json)) as show:
        for one in (model,) if teacher is None else (model, teacher):
            network, tokenizer = open_model(one, device=device_named(device))
            shown = partial(_show_task, show, one)
            found[one] = {s.task: s for s in zero_shot(network, tokenizer, names, limit=limit, on_progress=shown)}
            del network
    averages = {one: sum(score.accuracy for score in scores.values()) / len(names) for one, scores in found.items()}
    chance = sum(score.chance for score in found[model].values()) / len(names)
    above = averages[teacher] - chance if teacher is not None else 0.0
    kept = (averages[model] - chance) / above if above > 0 else None
    if as_json:
        results_of = {one: [asdict(score) for score in scores.values()] for one, scores in found.items()}
        document = {"tasks": results_of, "average": averages, "chance": chance, "kept_above_chance": kept}
        print_json(document | {"questions": limit, "seed": None if limit is None else QUESTIONS_SEED})
        return
    grid = Table()
    for heading in ("", "metric", "examples", "chance", *found):
        grid.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, score in found[model].items():
        cells = [f"{100 * s[name].accuracy:.1f} ± {100 * s[name].stderr:.1f}" for s in found.values()]
        metric = "acc_norm" if score.normalized else "acc"
        grid.add_row(name, metric, str(score.examples), f"{100 * score.chance:.0f}", *cells)
    grid.add_row("average", "", "", f"{100 * chance:.1f}", *(f"{100 * average:.1f}" for average in averages.values()))
    results().print(grid)
    if limit is not None:
        plain(results(), f"at most {limit:,} questions of a task, drawn at random with seed {QUESTIONS_SEED}")
    if kept is not None:
        plain(results(), f"{100 * kept:.0f}% of {teacher}'s distance above chance")


def _show_task(show: Callable[[str, int, int], None], model: str, task: str, done: int, total: int) -> None:
    show(f"{model}: {task}", done, total)


def table(
    run: RunArgument,
    text: Annotated[str | None, typer.Option(help="As for evaluate. \\[default: wikitext2 if available]")] = None,
    seq_len: SeqLenOption = None,
    limit: LimitOption = 10,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a finished run's teacher, plain round-to-nearest at the same bits, and the model after each stage."""
    store = RunStore()
    found = store.get(run)
    if found.state != "done":
        raise RunError(f"run {run} is {found.state}; the table needs a finished run")
    measured_on, rows = evaluate_run(store, found, notices(quiet=as_json), text=text, seq_len=seq_len, limit=limit)
    if as_json:
        print_json({"run": run, "text": measured_on, "rows": [asdict(row) for row in rows]})
    else:
        results().print(rows_table(measured_on, rows))


def evaluate_run(
    store: RunStore,
    run: Run,
    console: Console,
    *,
    text: str | None = None,
    seq_len: int | None = None,
    limit: int | None = None,
) -> tuple[str, list[TableRow]]:
    """The name of the text, and the rows. Each row is also stored as an event of the run.

    Without a ``text`` it is WikiText-2, or the embedded text's held-out part if WikiText-2 is not available.
    """
    from lbllm.checkpoints.find import open_teacher
    from lbllm.machine import device_named
    from lbllm.measure.table import stages_table
    from lbllm.pipeline.packed_model import stage_model
    from lbllm.texts.windows import evaluation_windows

    teacher = open_teacher(run.config.model, device=device_named(run.config.device))
    try:
        sequences = evaluation_windows(text or "wikitext2", teacher.model, teacher.tokenizer, seq_len, limit)
        text = text or "wikitext2"
    except CorpusError as error:
        if text is not None:
            raise
        plain(console, f"{error}. Evaluating on the embedded text's held-out part")
        text = "embedded"
        sequences = evaluation_windows(text, teacher.model, teacher.tokenizer, seq_len, limit)
    measured_on = f"{text}, {len(sequences)} windows of {sequences.shape[1]} tokens"
    stages = {stage: stage_model(run.config, run.folder, stage, teacher) for stage in run.config.origins}
    with counter(console) as show:
        rows = stages_table(
            run.config, teacher, stages, sequences, on_progress=lambda done, total: show("windows", done, total)
        )
    for row in rows:
        figures = {"perplexity": row.perplexity, "kl": row.kl, "top1_agreement": row.top1_agreement}
        store.append(run.id, Evaluated(what=row.what, text=measured_on, tokens=row.tokens, **figures))
    return measured_on, rows


def rows_table(title: str, rows: list[TableRow]) -> Table:
    """The rows for a terminal."""
    grid = Table(title=title)
    for heading in ("", "perplexity", "KL to teacher", "same top token"):
        grid.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        grid.add_row(row.label, f"{row.perplexity:,.2f}", f"{row.kl:.3f}", f"{100 * row.top1_agreement:.1f}%")
    return grid
