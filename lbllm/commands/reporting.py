"""report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbllm.commands.attend import StoppedByUser
from lbllm.commands.evaluating import absolute, check_folder, follow, prompts_in
from lbllm.commands.options import JsonOption, LimitOption, SeqLenOption
from lbllm.commands.output import notices, plain, print_json, results
from lbllm.errors import ConfigError, ResourceError, RunError
from lbllm.evaluation.store import EvaluationStore
from lbllm.files import write_file
from lbllm.runs.store import RunStore


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Ids of runs, folders of runs or checkpoints, or shipped.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write. \\[default: report-NAME.html]")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Answers to the prompts of this .txt (one a line) or .jsonl file. \\[default: examples]"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Measure on this text, as for evaluate. \\[default: wikitext2 if available, else embedded]"),
    ] = None,
    seq_len: SeqLenOption = None,
    limit: LimitOption = None,
    teacher: Annotated[str | None, typer.Option(help="Beside this model, not the one it was made from.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="First measure what has not been measured yet.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """One HTML page about runs or checkpoints for people who decide: settings in words, size, bits, quality with
    intervals beside the teacher, GPTQ and plain rounding, losses of the blocks, answers to prompts, speed on this
    machine.

    What has been measured before, by `evaluate` or the page Evaluate, is taken from there. What is missing becomes
    evaluations of the same queue; Ctrl-C leaves them at work. A run that is not finished is reported as far as it is.
    """
    from lbllm.reporting.evaluations import Wish, groups_of, missing
    from lbllm.reporting.page import problems_of, report_name
    from lbllm.reporting.page import report as page
    from lbllm.reporting.subjects import find_subjects

    store, evaluations = RunStore(), EvaluationStore()
    wish = Wish(text, limit, seq_len, prompts_in(prompts) if prompts is not None else None)
    subjects = find_subjects(runs, store, absolute(teacher) if teacher is not None else None)
    place = out or Path(report_name([subject.title for subject in subjects]))
    if place.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {place}: give a name that ends in .html")
    check_folder(place)
    said = notices(quiet=as_json)
    problems = problems_of(subjects)
    lacking = missing(evaluations, groups_of(subjects), wish)
    made = []
    for number, job in enumerate(lacking if measure else [], 1):
        one = evaluations.create(job)
        evaluations.start(one.id)
        made.append(one.id)
        what = {"text": f"perplexity and KL on {Path(job.text).name}", "prompts": "answers", "tasks": "tasks"}
        try:
            done = follow(evaluations, one.id, quiet=as_json, what=f"{number}/{len(lacking)} {what[job.measure]}")
        except StoppedByUser:
            raise
        except RunError as error:
            problems.append(str(error))
        else:
            problems += [done.message] if done.message else []
    if lacking and not measure:
        problems.append("quality, answers or speed are not measured; leave out --no-measure to measure them")
    document = page(subjects, evaluations, wish)
    try:
        write_file(place, document.encode())
    except OSError as error:
        raise ResourceError(f"{place} can't be written ({error}); choose another place with --out") from None
    if as_json:
        print_json({"report": place, "bytes": len(document.encode()), "evaluations": made, "problems": problems})
        return
    for problem in problems:
        plain(said, problem, style="yellow")
    plain(results(), str(place))
