"""export."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lbllm.commands.attend import check_out
from lbllm.commands.options import JsonOption
from lbllm.commands.output import notices, plain, print_json, results
from lbllm.errors import ConfigError
from lbllm.share.gguf_names import GgufType
from lbllm.units import size


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|RUN", help="A packed checkpoint's folder, a finished run, or shipped.")
    ],
    to: Annotated[
        Literal["packed", "dense", "gguf", "space"],
        typer.Option(
            help="packed: as it is; dense: bfloat16 weights; gguf: one file for llama.cpp, and a Modelfile for Ollama; "
            "space: the showcase as a Gradio Space."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Then upload it to the hub; a new repository is private."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The teacher in a Space: catalogue id, hub id, folder or .gguf file. \\[default: what the checkpoint "
            "was made from]"
        ),
    ] = None,
    gguf_type: Annotated[
        GgufType | None,
        typer.Option(
            "--type", help="The type of the weights in a GGUF file; see docs/use-elsewhere.md. \\[default: bf16]"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a finished checkpoint to a folder with a model card, or as a Space that shows it.

    --push takes the token from HF_TOKEN or `hf auth login`, or asks for it.
    """
    check_out(out)
    token = ""
    if push is not None:
        from lbllm.share.push import check_repository

        check_repository(push)
        token = _token(may_ask=not as_json)
    from lbllm.checkpoints.find import find_checkpoint
    from lbllm.share.export import export

    exported = export(find_checkpoint(checkpoint), to, out, teacher=teacher, gguf_type=gguf_type)
    document = asdict(exported)
    if not as_json:
        what = {
            "space": "`python app.py` in it starts the showcase",
            "gguf": "with a model card (README.md) and a Modelfile for Ollama",
        }.get(to, "with a model card (README.md)")
        plain(results(), f"{exported.path}: {to}, {size(exported.disk_bytes)}, {what}")
    if push is not None:
        from lbllm.share.push import push as upload

        plain(notices(quiet=as_json), f"pushing to {push}", style="dim")
        document["pushed"] = upload(exported.path, push, token, space=to == "space")
        if not as_json:
            plain(results(), f"pushed to {document['pushed']}")
    if as_json:
        print_json(document)


def _token(*, may_ask: bool) -> str:
    """The user's token for the hub, which is not stored. Raises ConfigError if there is no token."""
    from huggingface_hub import get_token

    token = get_token()
    if token is None and may_ask and sys.stdin.isatty():
        token = typer.prompt("Token for the hub, with the right to write", hide_input=True, err=True).strip()
    if not token:
        raise ConfigError("--push needs a token for the hub: set HF_TOKEN, or log in with `hf auth login`")
    return token
