"""models, corpora, corpora sample."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from lbllm.commands.options import JsonOption, TeacherOption
from lbllm.commands.output import counter, notices, plain, print_json, results
from lbllm.config import DEFAULT_MODEL
from lbllm.errors import CorpusError
from lbllm.models.catalogue import MODELS
from lbllm.units import size


def models(as_json: JsonOption = False) -> None:
    """The catalogue of teachers. Any hub id, folder or .gguf file of a decoder-only model works as well."""
    if as_json:
        print_json({"models": [asdict(entry) for entry in MODELS]})
        return
    grid = Table(Column("id", no_wrap=True), "parameters", "licence", "note", box=None)
    for entry in MODELS:
        grid.add_row(entry.id, f"{entry.parameters / 1e6:,.0f}M", entry.licence, entry.note)
    results().print(grid)


def corpora(context: typer.Context, as_json: JsonOption = False) -> None:
    """The catalogue of texts. Any .txt or .jsonl file or folder of them works as well."""
    if context.invoked_subcommand is not None:
        return
    from lbllm.texts.catalogue import TEXTS, location

    if as_json:
        print_json({"corpora": [asdict(entry) | {"location": location(entry)} for entry in TEXTS]})
        return
    grid = Table(Column("id", no_wrap=True), "text", "licence", "here", box=None)
    for entry in TEXTS:
        grid.add_row(entry.id, entry.note, entry.licence, escape(location(entry)))
    results().print(grid)


def corpora_sample(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, .jsonl.gz.")],
    model: TeacherOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="About how many tokens.")] = 1_000_000,
    length: Annotated[int, typer.Option(min=16, help="Tokens in a row.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows sampled at once.")] = 256,
    seed: int = 0,
    questions: Annotated[
        Path | None, typer.Option(help="Text file with one question per line: only these and answers.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.05, max=2, help="Below 1: less varied, nearer to its answers in a chat.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Let a model write a training text: conversations and documents on varied seeds. Continues an unfinished file."""
    from lbllm.checkpoints.find import open_teacher
    from lbllm.texts.documents import read_lines
    from lbllm.texts.sampling import sample_corpus

    asked = [line.strip() for line in read_lines(questions) if line.strip()] if questions is not None else []
    if questions is not None and not asked:
        raise CorpusError(f"{questions} has no questions; give a text file with one per line")

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    teacher = open_teacher(model or DEFAULT_MODEL)
    done = 0
    with counter(notices(quiet=as_json)) as show:
        for done in sample_corpus(
            teacher.model,
            teacher.tokenizer,
            out,
            tokens=tokens,
            length=length,
            batch=batch,
            seed=seed,
            questions=asked,
            temperature=temperature,
        ):
            show("tokens", min(done, tokens), tokens)
    if not out.exists():
        raise CorpusError(f"{out} is not finished: other processes still sample for it, and the last one writes it")
    if as_json:
        print_json({"path": out, "tokens": done, "bytes": out.stat().st_size})
    else:
        plain(results(), f"{out}: about {done:,} tokens, {size(out.stat().st_size)}")
