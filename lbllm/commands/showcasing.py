"""showcase: a binarized model beside its teacher, for an audience."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from lbllm.bundle import APP, BUNDLE
from lbllm.commands.options import HostOption
from lbllm.commands.output import notices, plain
from lbllm.errors import ResourceError

CheckpointArgument = Annotated[
    str | None,
    typer.Argument(help="Folder of a packed checkpoint. \\[default: the one that comes with the program]"),
]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="Catalogue id, hub id, folder or .gguf file. \\[default: what the checkpoint was made from]"),
]


def showcase(
    checkpoint: CheckpointArgument = None,
    teacher: TeacherOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Also a public address, through Gradio's servers.")] = False,
    answer_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer.")] = 128,
    per_minute: Annotated[
        int, typer.Option(min=1, help="Questions a visitor may ask in a minute; an address: ten times that.")
    ] = 6,
) -> None:
    """Let an audience ask a binarized model and its teacher the same things, side by side. Ctrl-C ends it."""
    if not (APP / "showcase.py").is_file():
        raise ResourceError(f"the showcase's page is not at {APP}; install lbllm again")
    sys.path.insert(0, str(BUNDLE))
    try:
        from app.showcase import run
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise ResourceError("the showcase needs gradio: pip install -r requirements.txt") from None
    from lbllm.showcase import Limits, open_showcase

    limits = Limits(answer_tokens=answer_tokens, per_minute=per_minute, address_per_minute=10 * per_minute)
    opened = open_showcase(checkpoint, teacher, limits=limits)
    run(opened, host=host, port=port, share=share, say=partial(plain, notices()))
