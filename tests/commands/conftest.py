"""The command line as a test calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lbllm.commands.main import main
from tests.helpers.spoken import Spoken


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Spoken:
    """Call the program, check its exit code and that nothing is a traceback; returns what it printed, or its JSON."""

    def call(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return json.loads(out) if "--json" in arguments else out + err

    return call
