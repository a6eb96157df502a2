"""What a checkpoint folder says of the run that made it: ``lbllm_run.json``, written beside the weights.

Settings, text, licence and the figures that the run measured travel with the weights, so that a model card can be
written on any machine. A folder without the file still has its settings, in config.json; the rest is then not known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lbllm.checkpoint import write_atomic
from lbllm.config import RunConfig
from lbllm.errors import CheckpointError
from lbllm.events import Evaluated
from lbllm.model_catalogue import catalogue_hub_id

RECORD = "lbllm_run.json"


class RunRecord(BaseModel):
    """A run's settings and results; None is what is not known. ``base_model``: the teacher's id on the hub, if it has
    one; ``precision``: what the teacher's weights were stored as; ``run``: the id in the store that made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    settings: RunConfig | None = None
    base_model: str | None = None
    precision: str | None = None
    licence: str | None = None
    bpw: float | None = None
    corpus_hash: str | None = None
    corpus_tokens: int | None = None
    evaluations: tuple[Evaluated, ...] = ()
    run: str | None = None

    def with_evaluations(self, more: list[Evaluated], run: str) -> RunRecord:
        """The record of a run in a store, with what was measured since: of one model on one text the newest."""
        newest = {(one.what, one.text): one for one in (*self.evaluations, *more)}
        return self.model_copy(update={"evaluations": tuple(newest.values()), "run": run})


def write_record(folder: Path, record: RunRecord) -> None:
    """Put the record into a checkpoint folder."""
    write_atomic(folder / RECORD, (record.model_dump_json(indent=2) + "\n").encode())


def read_record(folder: Path) -> RunRecord:
    """The record of a packed checkpoint's folder, from config.json where it has no file of its own.

    Raises CheckpointError where either can't be read.
    """
    path = folder / RECORD
    try:
        if path.is_file():
            return RunRecord.model_validate_json(path.read_bytes())
        path = folder / "config.json"
        stated = json.loads(path.read_text())["quantization_config"]
        known = stated.get("provenance") or {}
        model = known.get("model")
        return RunRecord(
            settings=known.get("run"),
            base_model=catalogue_hub_id(model) if model else None,
            precision=known.get("precision"),
            licence=known.get("licence"),
            bpw=stated.get("bpw"),
        )
    except (OSError, ValueError, KeyError, ValidationError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{path} can't be read ({reason}); copy the checkpoint again, or delete {RECORD} to do without what it says"
        ) from error
