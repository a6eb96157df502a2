"""How tests are shared out where they run side by side (``pytest -n 2``), and where Triton's kernels run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Without a GPU, Triton's interpreter; Triton reads this when it is first imported, which torch may do.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# One process for all tests of these: they share what takes long to make (a browser, a server, a finished run).
TOGETHER = (
    "tests/browser/",
    "tests/test_architectures.py",
    "tests/test_export.py",
    "tests/test_pipeline.py",
    "tests/test_preview.py",
    "tests/test_showcase.py",
    "tests/test_worker.py",
)


class Sharing(LoadScopeScheduling):
    """Hands out each test by itself, but those of one place in ``TOGETHER`` as a whole, and these first."""

    def _split_scope(self, nodeid: str) -> str:
        return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    return Sharing(config, log)
