"""ui: the workbench in the browser."""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lbllm.commands.output import notices, plain
from lbllm.errors import ResourceError

ADDRESS = "127.0.0.1"
FIRST_PORT, PORTS = 8501, 20


def ui(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Port on {ADDRESS}. \\[default: the first free from 8501]")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open the workbench: configure, watch and compare in the browser. Ctrl-C ends it; runs go on."""
    try:
        from streamlit.runtime.pages_manager import PagesManager
        from streamlit.web import bootstrap
    except ImportError:
        raise ResourceError("the workbench needs streamlit: pip install -r requirements.txt") from None

    root = Path(__file__).resolve().parents[2]
    script = root / "app" / "workbench.py"
    if not script.is_file():
        raise ResourceError(f"the workbench's pages are not at {script.parent}; start it from the project's folder")
    port = _port(port)
    sys.path.insert(0, str(root))
    options = _options(root, port, browser)
    bootstrap.load_config_options(options)
    # Streamlit takes a folder pages/ for the whole navigation until the entry script says otherwise, and so a page that
    # is opened by its own address before that would run without it.
    PagesManager.uses_pages_directory = False
    # Before the first page is asked for: transformers can't be imported by two threads at once.
    for name in ("lbllm.pool", "lbllm.preview"):
        importlib.import_module(name)
    plain(notices(), f"LBLLM Workbench: http://localhost:{port} (Ctrl-C ends it)")
    bootstrap.run(str(script), False, [], options)


def _port(wanted: int | None) -> int:
    """The port to listen on. Raises ResourceError where it, or each of the usual ones, is taken."""
    candidates = range(FIRST_PORT, FIRST_PORT + PORTS) if wanted is None else [wanted]
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            return port
    raise ResourceError(f"port {candidates[0]} of {ADDRESS} is taken or not allowed; give another with --port")


def _options(root: Path, port: int, browser: bool) -> dict[str, Any]:
    """Streamlit's settings: this machine only, nothing sent anywhere, no tracebacks on a page."""
    options = {
        "server_address": ADDRESS,
        "server_port": port,
        # A page elsewhere must not reach the server under a name of its own (DNS rebinding).
        "server_allowedHosts": ["localhost", ADDRESS],
        "server_fileWatcherType": "none",
        "server_maxUploadSize": 5,
        # With torch loaded a full collection takes 0.25 s, and a page that watches a run would cause one every second.
        "runner_postScriptGC": False,
        # A page's script goes on to its next call and starts anew there, on one thread. Otherwise a second thread would
        # begin beside it, and the first one could not tell a changed setting from a closed page.
        "runner_fastReruns": False,
        "browser_gatherUsageStats": False,
        "browser_serverAddress": "localhost",
        "client_showErrorDetails": "none",
        "client_showErrorLinks": False,
        "client_toolbarMode": "minimal",
        "logger_hideWelcomeMessage": True,
        "theme_base": str(root / "assets" / "theme" / "theme.toml"),
        "global_developmentMode": False,
    }
    # Where there is no display Streamlit itself opens none.
    return options if browser else options | {"server_headless": True}
