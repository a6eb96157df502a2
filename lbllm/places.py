"""The folders of the program: its own files, its stored data, texts, and the folder that pages may read.

In a checkout, the pages (app/) and the assets are beside this package. In a wheel they are inside it, in _bundle/
(pyproject.toml puts them there), so that an installed program uses only one top-level name.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "_bundle"

BUNDLE = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
APP = BUNDLE / "app"
ASSETS = BUNDLE / "assets"


def home() -> Path:
    """Return the folder for all data that this program stores: LBLLM_HOME or ~/.cache/lbllm."""
    return Path(os.environ.get("LBLLM_HOME") or Path.home() / ".cache" / "lbllm").expanduser()


def data_dir() -> Path | None:
    """Return the folder LBLLM_DATA_DIR, or None if it is not set."""
    named = os.environ.get("LBLLM_DATA_DIR")
    return Path(named).expanduser() if named else None


def root() -> Path:
    """Return the folder that the pages may read, resolved: LBLLM_ROOT or the current folder."""
    return Path(os.environ.get("LBLLM_ROOT") or Path.cwd()).expanduser().resolve()
