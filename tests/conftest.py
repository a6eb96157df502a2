"""How tests are shared out where they run side by side (``pytest -n 2``), and where Triton's kernels run."""

from __future__ import annotations

import gc
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
    "tests/pipeline/test_architectures.py",
    "tests/app/test_compare_page.py",
    "tests/checkpoints/test_decode.py",
    "tests/course/test_first_lessons.py",
    "tests/course/test_later_lessons.py",
    "tests/chat/test_duel.py",
    "tests/stages/test_e2e.py",
    "tests/share/test_export.py",
    "tests/checkpoints/test_hf.py",
    "tests/test_packaging.py",
    "tests/pipeline/test_run.py",
    "tests/pipeline/test_start.py",
    "tests/measure/test_preview.py",
    "tests/microscope/test_before.py",
    "tests/benchmarks/test_quality.py",
    "tests/app/test_quantize_preview.py",
    "tests/checkpoints/test_shipped.py",
    "tests/checkpoints/test_find.py",
    "tests/commands/test_names.py",
    "tests/benchmarks/test_names.py",
    "tests/chat/test_showcase.py",
    "tests/share/test_space.py",
    "tests/pipeline/test_worker.py",
)
# These and the above take most of the time of all tests; `make quick-test` leaves them out.
SLOW = (
    *TOGETHER,
    "tests/app/",
    "tests/baselines/",
    "tests/benchmarks/",
    "tests/commands/test_main.py",
    "tests/kernels/",
    "tests/measure/test_estimate.py",
    "tests/measure/test_zero_shot.py",
    "tests/evaluation/test_evaluations.py",
    "tests/commands/test_evaluating.py",
    "tests/commands/test_reporting.py",
    "tests/reporting/test_report.py",
    "tests/pipeline/",
    "tests/stages/test_wat.py",
    "tests/test_files.py",
    "tests/texts/test_corpus.py",
)


class Sharing(LoadScopeScheduling):
    """Hands out each test by itself, but those of one place in ``TOGETHER`` as a whole, and these first."""

    def _split_scope(self, nodeid: str) -> str:
        return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make quick-test` leaves out."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What was imported stays for good. Loading a model collects garbage, and so does each stage of a run: each time
    the collector would look through a million objects of the libraries again, for longer than a tiny model trains."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """At its end Python takes everything apart by the collector, and some libraries complain of what it leaves."""
    gc.unfreeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    return Sharing(config, log)
