"""The commands that open the workbench or serve a model: which port, which address, what they refuse and warn of; and
the one that runs another program."""

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import streamlit
import uvicorn
from starlette.testclient import TestClient
from streamlit.runtime.pages_manager import PagesManager
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lbllm.checkpoints.hf import METHOD
from lbllm.commands import elsewhere, serving
from lbllm.commands.main import main
from lbllm.sections import QuantConfig
from lbllm.web import LOOPBACK, Gate
from tests.helpers.ports import free_port
from tests.helpers.tiny_packed import tiny_checkpoint


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


def test_a_model_is_served_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", QuantConfig(group_size=16, act_bits=16, kv_bits=16))[0]
    served: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: served.append((app, settings)))
    monkeypatch.delenv("LBLLM_HOST", raising=False)
    port = free_port()
    assert main(["serve", str(folder), "--port", str(port), "--waiting", "3"]) == 0
    message = " ".join(capsys.readouterr().err.split())
    assert f"packed (W(1+1)A16KV16, groups of 16) at http://localhost:{port}/v1" in message
    assert "3 requests may wait" in message
    assert "no password" not in message
    ((app, settings),) = served
    assert (settings["host"], settings["port"]) == ("127.0.0.1", port)
    client = TestClient(app, base_url=f"http://localhost:{port}")
    assert client.get("/v1/models").json()["data"][0]["id"] == "packed"
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert main(["serve", str(folder), "--port", str(port), "--host", "0.0.0.0", "--name", "gpt-4o"]) == 0
    assert "there is no password" in " ".join(capsys.readouterr().err.split())
    assert TestClient(served[1][0], base_url="http://localhost").get("/v1/models/gpt-4o").status_code == 200


def test_a_served_run_is_called_by_its_own_name() -> None:
    names = ["shipped", "runs/quick", "runs/quick/checkpoint", "checkpoint", "0a1b2c"]
    assert [serving._model_name(name) for name in names] == ["shipped", "quick", "quick", "checkpoint", "0a1b2c"]


def test_another_program_loads_packed_checkpoints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def program() -> int:
        called.append([*sys.argv])
        return 7

    found = SimpleNamespace(load=lambda: program)
    monkeypatch.setattr(elsewhere, "entry_points", lambda **wanted: [found] if wanted["name"] == "judge" else [])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    assert main(["with", "judge", "--model", "hf", "-h"]) == 7
    assert called == [["judge", "--model", "hf", "-h"]]
    assert METHOD in AUTO_QUANTIZER_MAPPING
    assert main(["with", "no-such-program"]) == 1
    assert "'no-such-program' is not a command" in " ".join(capsys.readouterr().err.split())
