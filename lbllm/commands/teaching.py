"""export-course."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lbllm.commands.attend import check_out
from lbllm.commands.options import JsonOption
from lbllm.commands.output import counter, notices, plain, print_json, results
from lbllm.config import SHIPPED
from lbllm.units import size


def export_course(
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the site.")],
    checkpoint: Annotated[
        str, typer.Option(metavar="CHECKPOINT|RUN", help="A packed checkpoint's folder, a finished run, or shipped.")
    ] = SHIPPED,
    teacher: Annotated[
        str | None, typer.Option(help="Its teacher. \\[default: what the checkpoint was made from]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the course of the page Learn, computed from a checkpoint, as a site of static files.

    Put the folder on any web space, or open its index.html in a browser: it needs no server of its own.
    """
    check_out(out)
    from lbllm.course.course import Course
    from lbllm.course.export import export_course as export

    course = Course.open(checkpoint, teacher)
    titles = dict(course.outline)
    with counter(notices(quiet=as_json)) as show:
        for key, title in titles.items():
            for step in course.prepare(key):
                show(title, round(100 * step.share), 100)
        finished = iter(range(1, len(titles) + 1))
        exported = export(course, out, done=lambda key: show("lessons", next(finished), len(titles)))
    if as_json:
        print_json(asdict(exported))
        return
    counted = f"{exported.lessons} lessons, {exported.scenes} scenes, {size(exported.disk_bytes)}"
    plain(results(), f"{exported.path}: {counted}, computed from {exported.checkpoint}; open index.html in it")
