"""Where things lie: the program's own files, what it keeps between runs, texts, and what pages may read.

In a checkout the pages (app/) and the assets lie beside this package. A wheel has them inside it, in _bundle/
(pyproject.toml puts them there), so that an installed program takes no other top-level name than its own.
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
    """The folder for everything this program keeps between runs: LBLLM_HOME or ~/.cache/lbllm."""
    return Path(os.environ.get("LBLLM_HOME") or Path.home() / ".cache" / "lbllm").expanduser()


def data_dir() -> Path | None:
    """The folder LBLLM_DATA_DIR names, or None."""
    named = os.environ.get("LBLLM_DATA_DIR")
    return Path(named).expanduser() if named else None


def root() -> Path:
    """The allowed folder, resolved."""
    return Path(os.environ.get("LBLLM_ROOT") or Path.cwd()).expanduser().resolve()
