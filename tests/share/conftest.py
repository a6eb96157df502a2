"""What the tests of exports begin with: a finished run in a store of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lbllm.runs.store import Run, RunStore
from tests.helpers.finished_run import finished_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunStore]:
    store = RunStore(tmp_path_factory.mktemp("home") / "runs")
    yield store
    store.close()


@pytest.fixture(scope="module")
def run(store: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(store, tmp_path_factory.mktemp("given"))
