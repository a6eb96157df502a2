"""repack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lbllm.commands.attend import check_out
from lbllm.commands.options import JsonOption
from lbllm.commands.output import plain, print_json, results
from lbllm.config import SETTINGS
from lbllm.errors import ConfigError
from lbllm.fields import allowed, choices
from lbllm.units import size

_BITS = SETTINGS["quant.embedding_bits"]


def repack(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|RUN", help="A packed checkpoint's folder, a finished run, or shipped.")
    ],
    embedding_bits: Annotated[int, typer.Option(help=f"{_BITS.description} Values: {allowed(_BITS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="The model whose weights are packed. \\[default: what the checkpoint was made from]"),
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Pack the checkpoint's own weights, which were rounded before.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give a checkpoint embeddings and an output head of other bits, without training; all else stays as it is."""
    check_out(out)
    bits = next((value for value in choices(_BITS) if value == embedding_bits), None)
    if bits is None:
        raise ConfigError(f"--embedding-bits {embedding_bits}: choose one of {allowed(_BITS)}")
    if own and teacher is not None:
        raise ConfigError("--own takes the checkpoint's own weights and reads no teacher; leave out --teacher or --own")
    from lbllm.checkpoints.find import find_checkpoint
    from lbllm.share.repack import repack as repacked

    made = repacked(find_checkpoint(checkpoint), bits, out, teacher=teacher, own=own)
    if as_json:
        print_json(asdict(made))
        return
    plain(results(), f"{made.path}: {made.embedding_bits} bits for embeddings and output head, {size(made.disk_bytes)}")
