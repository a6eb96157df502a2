"""A system without POSIX file locks, such as Windows, is told so in one message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PREPARE = "import runpy, sys; sys.modules['fcntl'] = None; "


def start(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own that finds no module fcntl."""
    return subprocess.run([sys.executable, "-c", PREPARE + code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["lbllm", "lbllm.worker"])
def test_a_command_ends_with_the_message_alone(module: str) -> None:
    # While `python -m` looks for a module, argv[0] is "-m".
    ended = start(f"sys.argv = ['-m']; runpy.run_module({module!r}, run_name='__main__')")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("LBLLM Workbench does not run on this system")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["/usr/bin/lbllm", "lbllm.exe"])
def test_the_installed_command_ends_with_the_message_alone(script: str) -> None:
    ended = start(f"sys.argv = [{script!r}, '--help']; import lbllm.commands.main")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1


def test_an_import_raises_an_error_that_can_be_caught() -> None:
    ended = start("\ntry:\n    import lbllm\nexcept ImportError as error:\n    print(error)\n")
    assert ended.returncode == 0, ended.stderr
    assert "WSL 2" in ended.stdout
