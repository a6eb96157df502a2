"""The command that opens the workbench: which port, which address, what it refuses and warns of."""

import socket
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import streamlit
from streamlit.runtime.pages_manager import PagesManager

from lbllm.commands.main import main
from lbllm.web import LOOPBACK, Gate


class Started(NamedTuple):
    """A server that would have been started: Streamlit's settings, and the names that it answers under."""

    settings: Mapping[str, Any]
    names: frozenset[str]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    servers: list[Started] = []

    def run(app: streamlit.App, *, config: Mapping[str, Any]) -> None:
        gates: list[Any] = [one for one in app._user_middleware if getattr(one, "cls", None) is Gate]
        servers.append(Started(config, gates[0].kwargs["names"]))

    monkeypatch.setattr(streamlit.App, "run", run)
    monkeypatch.setattr(PagesManager, "uses_pages_directory", PagesManager.uses_pages_directory)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.delenv("LBLLM_HOST", raising=False)
    return servers


def test_a_port_that_is_taken_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port), "--no-browser"]) == 1
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "::1"])
def test_a_host_that_is_not_this_machine_s_is_refused_by_name(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--host", host, "--no-browser"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert f"host '{host}' can't be listened on" in message
    assert "127.0.0.1 for this machine only" in message


def test_the_workbench_is_for_this_machine_alone(started: list[Started], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--no-browser"]) == 0
    assert started[0].settings["server.address"] == "127.0.0.1"
    assert started[0].names == set(LOOPBACK)
    assert "Warning" not in capsys.readouterr().err


@pytest.mark.parametrize("by", ["option", "variable"])
def test_the_network_is_let_in_by_name_with_a_warning(
    by: str, started: list[Started], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if by == "variable":
        monkeypatch.setenv("LBLLM_HOST", "0.0.0.0")
    assert main(["ui", "--no-browser", *(["--host", "0.0.0.0"] if by == "option" else [])]) == 0
    assert started[0].settings["server.address"] == "0.0.0.0"
    # Under a name of its own no page elsewhere gets in, although the port is open.
    assert started[0].names >= {*LOOPBACK, socket.gethostname().lower()}
    assert not any("example" in name for name in started[0].names)
    assert "there is no password" in " ".join(capsys.readouterr().err.split())
