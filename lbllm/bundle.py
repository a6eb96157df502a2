"""Where the program's own files lie that are no part of the engine: the pages (app/) and the assets.

In a checkout both lie beside this package; a wheel has them inside it, in _bundle/ (pyproject.toml puts them there), so
that an installed program takes no other top-level name than its own.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "_bundle"

BUNDLE = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
APP = BUNDLE / "app"
ASSETS = BUNDLE / "assets"
