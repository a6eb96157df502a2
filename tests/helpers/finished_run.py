"""A finished run of a tiny model in a store of its own, made in the testing process: texts, figures, checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbllm.events import RunLoading, RunQueued
from lbllm.pipeline import run as pipeline
from lbllm.runs.store import Run, RunStore
from lbllm.sections import PAPER_STAGES, Stage
from tests.helpers.tiny_models import SENTENCES
from tests.helpers.tiny_runs import stored_run_config


def finished_run(store: RunStore, folder: Path, stages: tuple[Stage, ...] = PAPER_STAGES, **changes: Any) -> Run:
    """The run; its teacher and its text, a hundred documents, are written to ``folder``. ``changes``: to its settings,
    as they are in ``RunConfig``."""
    config = stored_run_config(folder).model_copy(update={"stages": stages} | changes)
    text = folder / "text.jsonl"
    documents = (" ".join(f"{number} {line}" for line in SENTENCES) for number in range(100))
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    run = store.create(config.model_copy(update={"corpus": str(text)}), "tiny one")
    (run.folder / "precision").write_text("no")  # measuring which one is faster would take longer than the run
    for begun in (RunQueued(), RunLoading()):
        store.append(run.id, begun)
    for event in pipeline.run(run.config, run.folder, request=lambda: None):
        store.append(run.id, event)
    return store.get(run.id)
