"""with: another Python program, in which our checkpoints are registered with transformers."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from lbllm.errors import ResourceError

# What follows the program's name is its own, also --help.
OPTIONS = {"allow_interspersed_args": False}


def with_(
    program: Annotated[str, typer.Argument(help="A command that a Python package installed here, such as lm-eval.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the program gets.")] = None,
) -> None:
    """Run another Python program that loads models by transformers, and let it load packed checkpoints."""
    found = [*entry_points(group="console_scripts", name=program)]
    if not found:
        raise ResourceError(
            f"{program!r} is not a command of a Python package that is installed for {sys.executable}; install the "
            "package there, or write `import lbllm` into a program of your own"
        )
    from lbllm.checkpoints import hf  # noqa: F401 - registers

    sys.argv = [program, *(arguments or [])]
    sys.exit(found[0].load()())
