"""The command line: ``python -m lbllm COMMAND``. It calls the engine and shows the results.

Each command but ui, demo, showcase, serve and with takes --json: one JSON document on stdout and nothing else there.
Errors that a user can cause are one message on stderr, and with --json also ``{"error": ...}`` on stdout. Exit codes:
0 done, 1 an error, 2 bad usage, 130 Ctrl-C. The engine, and torch with it, is imported inside the commands that need
it, so that --help answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import typer

from lbllm.commands import (
    catalogues,
    chatting,
    checking,
    comparing,
    elsewhere,
    evaluating,
    exporting,
    measuring,
    planning,
    repacking,
    reporting,
    serving,
    stored_runs,
    teaching,
    training,
)
from lbllm.commands.attend import StoppedByUser
from lbllm.commands.output import notices, plain, print_json
from lbllm.config import options_named
from lbllm.errors import LbllmError


def build() -> typer.Typer:
    """All commands under one name."""
    app = typer.Typer(
        help="Binarize language models to W(1+1)A4 by three-stage distillation (LBLLM), and use the result.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (
        training.quantize,
        training.estimate,
        planning.plan,
        training.demo,
        measuring.evaluate,
        measuring.table,
        reporting.report,
        exporting.export,
        repacking.repack,
        teaching.export_course,
        chatting.chat,
        catalogues.models,
        checking.doctor,
        serving.ui,
        serving.showcase,
        serving.serve,
    ):
        app.command()(command)
    app.command("with", context_settings=elsewhere.OPTIONS)(elsewhere.with_)

    corpora = typer.Typer(help="The texts a run can train on; `corpora sample` makes one from a model.")
    corpora.callback(invoke_without_command=True)(catalogues.corpora)
    corpora.command("sample")(catalogues.corpora_sample)
    app.add_typer(corpora, name="corpora")

    runs = typer.Typer(
        help="Runs: list, compare, sweep, show, resume, stop, note, tag and so on.", no_args_is_help=True
    )
    runs.command("list")(stored_runs.runs_list)
    runs.command("show")(stored_runs.runs_show)
    runs.command("compare")(comparing.runs_compare)
    runs.command("sweep")(comparing.runs_sweep)
    runs.command("resume")(stored_runs.runs_resume)
    runs.command("stop")(stored_runs.runs_stop)
    runs.command("cancel")(stored_runs.runs_cancel)
    runs.command("rename")(stored_runs.runs_rename)
    runs.command("note")(stored_runs.runs_note)
    runs.command("tag")(stored_runs.runs_tag)
    runs.command("delete")(stored_runs.runs_delete)
    runs.command("restore")(stored_runs.runs_restore)
    app.add_typer(runs, name="runs")

    evaluations = typer.Typer(
        help="Stored evaluations: list, show, continue, cancel, delete; `evaluate` starts one.", no_args_is_help=True
    )
    evaluations.command("list")(evaluating.evaluations_list)
    evaluations.command("show")(evaluating.evaluations_show)
    evaluations.command("continue")(evaluating.evaluations_continue)
    evaluations.command("cancel")(evaluating.evaluations_cancel)
    evaluations.command("delete")(evaluating.evaluations_delete)
    app.add_typer(evaluations, name="evaluations")
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the arguments of the process); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings = _Warnings()
    logging.getLogger("lbllm").addHandler(warnings)
    try:
        return _run(arguments)
    finally:
        logging.getLogger("lbllm").removeHandler(warnings)


class _Warnings(logging.Handler):
    """Shows what the engine warns of on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            plain(notices(), f"Warning: {record.getMessage()}", style="yellow")


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    command = typer.main.get_command(build())
    try:
        # Typer itself shows bad usage, but not as JSON.
        code = command.main(args=arguments, prog_name="python -m lbllm", standalone_mode=not as_json)
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except typer.TyperException as error:
        message, code = error.format_message(), error.exit_code
    except LbllmError as error:
        message, code = options_named(str(error)), 130 if isinstance(error, StoppedByUser) else 1
    except OSError as error:
        message, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    if as_json:
        print_json({"error": message})
    plain(notices(), f"Error: {message}", style="red")
    return code
