"""Shared by the commands of benchmarks: parser, progress, and one message if something fails."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.report import add_out
from lbllm.errors import LbllmError


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark that prints figures: its docstring is the help, ``--out`` keeps the figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    return parser


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse. Raises ArgumentTypeError."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of 1 or more")
    return int(text)


def progress(line: str) -> None:
    """Print a line that does not belong to the figures."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def one_message() -> Iterator[None]:
    """End the program with one message instead of a traceback if a model, a file or another program fails."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        last = str(error.stderr or "").strip().splitlines()[-1:]
        raise SystemExit(": ".join([f"{shlex.join(error.cmd)} failed", *last])) from None
    except (LbllmError, OSError) as error:
        raise SystemExit(str(error)) from None
