"""ui, showcase and serve: the workbench in the browser, a binarized model beside its teacher for an audience, and a
model for programs that speak OpenAI's interface."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import PurePath
from typing import Annotated, Any

import typer

from lbllm.commands.options import HostOption
from lbllm.commands.output import notices, plain
from lbllm.config import SHIPPED
from lbllm.errors import ResourceError
from lbllm.extras import extra
from lbllm.places import APP, ASSETS, BUNDLE

ADDRESS = "127.0.0.1"
EVERY_ADDRESS = "0.0.0.0"
FIRST_PORT, PORTS = 8501, 20


def ui(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on. \\[default: the first free from 8501]")
    ] = None,
    host: HostOption = ADDRESS,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open the workbench: configure, watch and compare in the browser. Ctrl-C ends it; runs continue."""
    with extra("app", "the workbench"):
        import pandas  # noqa: F401 - the pages draw with both
        import plotly  # noqa: F401
        import streamlit
        from starlette.middleware import Middleware
        from streamlit.runtime.pages_manager import PagesManager

    script = APP / "workbench.py"
    if not script.is_file():
        raise ResourceError(f"the workbench's pages are not at {APP}; install lbllm again")
    port = _port(host, port)
    # The pages are the top-level package app.
    sys.path.insert(0, str(BUNDLE))
    from app.visits import Visitors
    from lbllm.web import Gate, names_of

    address = "localhost" if host in (ADDRESS, EVERY_ADDRESS) else host
    url = f"http://{address}:{port}"
    # Streamlit uses a folder pages/ as the whole navigation until the entry script says otherwise, so a page that
    # is opened by its own address before that would run without it.
    PagesManager.uses_pages_directory = False
    # Before the first page is asked for: transformers can't be imported by two threads at once.
    for name in ("lbllm.chat.pool", "lbllm.measure.preview"):
        importlib.import_module(name)
    plain(notices(), f"LBLLM Workbench: {url} (Ctrl-C ends it)")
    if warning := _exposed(host, port):
        plain(notices(), warning, style="yellow")
    workbench = streamlit.App(
        script,
        lifespan=partial(_opening, url if browser else None),
        middleware=[Middleware(Gate, names=names_of(host)), Middleware(Visitors)],
    )
    # Streamlit takes the folder of the script that Python was started with for the application's.
    sys.argv = [str(script)]
    workbench.run(config=streamlit_options(host, port))


@asynccontextmanager
async def _opening(url: str | None, _: object) -> AsyncIterator[None]:
    """Open the browser when the server starts, where there is a display."""
    if url is not None and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(url)
    yield


def _exposed(host: str, port: int) -> str | None:
    """A warning if users of other machines may reach the workbench, else None."""
    from lbllm.places import root

    if host.startswith("127."):
        return None
    return (
        f"Warning: there is no password. Whoever reaches port {port} of {host} can start and cancel runs, load models "
        f"and see texts under {root()}"
    )


def _port(host: str, wanted: int | None) -> int:
    """The port to listen on. Raises ResourceError if it, or each of the default ports, is taken, or if ``host`` is
    not an address of this machine."""
    candidates = range(FIRST_PORT, FIRST_PORT + PORTS) if wanted is None else [wanted]
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise ResourceError(
                    f"host {host!r} can't be listened on ({error.strerror}); give --host an IPv4 address of this "
                    f"machine, {ADDRESS} for this machine only or {EVERY_ADDRESS} for all its addresses"
                ) from None
            return port
    raise ResourceError(f"port {candidates[0]} of {host} is taken or not allowed; give another with --port")


def streamlit_options(host: str, port: int) -> dict[str, Any]:
    """Streamlit's settings: this address only, nothing sent anywhere, no tracebacks on a page."""
    return {
        "server.address": host,
        "server.port": port,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.maxUploadSize": 5,
        # With torch loaded a full collection takes 0.25 s, and a page that watches a run would cause one every second.
        "runner.postScriptGC": False,
        # A page's script continues to its next call and restarts there, on one thread. Otherwise a second thread would
        # begin beside it, and the first one could not tell a changed setting from a closed page.
        "runner.fastReruns": False,
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",
        "client.showErrorLinks": False,
        "client.toolbarMode": "minimal",
        "logger.hideWelcomeMessage": True,
        # Widgets have the session's value as their default, too: see app/components/shown.py.
        "global.disableWidgetStateDuplicationWarning": True,
        "theme.base": str(ASSETS / "theme" / "theme.toml"),
        "global.developmentMode": False,
    }


CheckpointArgument = Annotated[
    str | None,
    typer.Argument(
        help="A packed checkpoint: its folder, a finished run, or shipped. \\[default: shipped, included with the "
        "program]"
    ),
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
    if not (APP / "showcase" / "page.py").is_file():
        raise ResourceError(f"the showcase's page is not at {APP}; install lbllm again")
    sys.path.insert(0, str(BUNDLE))
    with extra("showcase", "the showcase"):
        from app.showcase.page import run
    from lbllm.chat.showcase import Limits, open_showcase

    limits = Limits(answer_tokens=answer_tokens, per_minute=per_minute, address_per_minute=10 * per_minute)
    opened = open_showcase(SHIPPED if checkpoint is None else checkpoint, teacher, limits=limits)
    run(opened, host=host, port=port, share=share, say=partial(plain, notices()))


def serve(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A packed checkpoint: its folder, a finished run, or shipped, included with the program. A teacher is "
            "served, too."
        ),
    ] = SHIPPED,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: HostOption = ADDRESS,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model. \\[default: the name of its run or folder]")
    ] = None,
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait while one is answered; a further one gets status 503.")
    ] = 8,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer for a request without max_tokens.")] = 1024,
) -> None:
    """Serve a model to programs that speak OpenAI's chat completions, streamed or not. Ctrl-C ends it."""
    port = _port(host, port)
    with extra("serve", "the server"):
        import uvicorn

        from lbllm.serving.server import build
    from lbllm.chat.pool import load_model
    from lbllm.serving.line import Line
    from lbllm.web import names_of

    name = name or _model_name(checkpoint)
    loaded = load_model(checkpoint)
    line = Line(loaded, waiting=waiting, answer_tokens=answer_tokens)
    address = "localhost" if host in (ADDRESS, EVERY_ADDRESS) else host
    what = f"one answer is written at a time, and {waiting} requests may wait"
    plain(notices(), f"{name} ({loaded.precision}) at http://{address}:{port}/v1: {what} (Ctrl-C ends it)")
    if not loaded.is_chat:
        plain(notices(), f"{name} has no chat template: it continues the text of the messages", style="yellow")
    if not host.startswith("127."):
        plain(
            notices(),
            f"Warning: there is no password. Whoever reaches port {port} of {host} can ask the model",
            style="yellow",
        )
    uvicorn.run(
        build(line, name, names_of(host)),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,
    )


def _model_name(checkpoint: str) -> str:
    """The last part of a checkpoint's name, without the folder ``checkpoint`` of a run."""
    path = PurePath(checkpoint)
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.name
