"""A home folder of a test's own (LBLLM_HOME), which shares with the usual one what takes long to make."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lbllm.places import home


def own_home(folder: Path, *shared: Literal["kernels", "models"]) -> Path:
    """Make ``folder`` a home without runs. ``shared``: compiled kernels, converted models; what the usual home lacks is
    made there once."""
    folder.mkdir()
    for name in shared:
        usual = home() / name
        usual.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(usual)
    return folder
