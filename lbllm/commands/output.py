"""Output of commands: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def results() -> Console:
    """The console for results."""
    return Console()


def notices(*, quiet: bool = False) -> Console:
    """The console for progress and messages; silent if the result is JSON."""
    return Console(stderr=True, quiet=quiet)


def plain(console: Console, text: str, **options: Any) -> None:
    """Print text unchanged, without rich's markup and line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, **options)


def print_json(value: Any) -> None:
    """Print one document. NaN and infinity become null, paths strings."""
    text = json.dumps(_document(value), indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate, as in a file name that is not UTF-8, becomes an escape of JSON.
    typer.echo(text.encode("utf-8", "backslashreplace").decode())


def _document(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_document(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def counter(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, shown only in a terminal; gives a callable (what, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show
