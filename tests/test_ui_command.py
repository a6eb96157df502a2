"""The command that opens the workbench: which port, which address, what it refuses."""

import socket

import pytest

from lbllm.cli import main
from lbllm.commands.workbench import ADDRESS


def test_a_port_that_is_taken_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port), "--no-browser"]) == 1
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


def test_the_workbench_is_for_this_machine_alone() -> None:
    assert ADDRESS == "127.0.0.1"
