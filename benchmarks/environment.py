"""Empty virtual environments, and how large folders are."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

# This user's variables, which registry pip asks maybe among them, and nothing that Python would find besides.
VARIABLES = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def make_environment(folder: Path, *requirements: str, cwd: Path) -> str:
    """Make an environment with what pip installs, called in ``cwd``; the path of its Python. Raises OSError,
    CalledProcessError."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", *requirements]
    subprocess.run(install, cwd=cwd, env=VARIABLES, check=True)
    return python


def folder_bytes(folder: Path) -> int:
    """The size of all files below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
