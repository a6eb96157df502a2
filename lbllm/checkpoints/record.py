"""What a checkpoint folder says of the run that made it: ``lbllm_run.json``, written beside the weights.

Settings, text, licence and the figures that the run measured travel with the weights, so that a model card can be
written on any machine. A folder without the file still has its settings, in config.json; the rest is then not known.

What others get names a folder or file of this machine only by the last part of its path: the rest describes the
machine, not the model.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from lbllm.checkpoints.seal import check_folder
from lbllm.config import RunConfig
from lbllm.errors import CheckpointError
from lbllm.events import Evaluated
from lbllm.files import refuse_links, write_file
from lbllm.models.catalogue import catalogue_hub_id, last_part
from lbllm.texts.catalogue import parts

RECORD = "lbllm_run.json"
_MEASURED_ON = re.compile(r"(held-out part of )?(.*)(, \d+ windows of \d+ tokens)")


class RunRecord(BaseModel):
    """A run's settings and results; None means not known. ``base_model``: the teacher's id on the hub, if it has
    one; ``precision``: what the teacher's weights were stored as; ``run``: the id in the store that made it; ``start``:
    the record of the starting checkpoint."""

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
    start: RunRecord | None = None

    def with_evaluations(self, more: list[Evaluated], run: str) -> RunRecord:
        """The record of a run in a store, with later measurements: for each model and text only the newest."""
        newest = {(one.what, one.text): one for one in (*self.evaluations, *more)}
        return self.model_copy(update={"evaluations": tuple(newest.values()), "run": run})

    def public(self) -> RunRecord:
        """The record as others may have it."""
        settings = self.settings
        if settings is not None:
            model = settings.model if settings.model == self.base_model else _public_model(settings.model)
            settings = settings.model_copy(update={"model": model, "corpus": _public_corpus(settings.corpus)})
            if settings.start is not None:
                settings = settings.model_copy(update={"start": checkpoint_name(settings.start)})
        evaluations = tuple(one.model_copy(update={"text": _public_text(one.text)}) for one in self.evaluations)
        start = self.start.public() if self.start is not None else None
        return self.model_copy(update={"settings": settings, "evaluations": evaluations, "start": start})


def _public_model(name: str) -> str:
    return name if catalogue_hub_id(name) else last_part(name)


def checkpoint_name(name: str) -> str:
    """The name of a checkpoint's folder: the last part of its path, or the run's id in a run's folder."""
    last = last_part(name)
    return last_part(name[: -len(last)].rstrip("/\\")) or last if last == "checkpoint" else last


def _public_corpus(name: str) -> str:
    return "+".join(last_part(one) for one in parts(name))


def _public_text(text: str) -> str:
    found = _MEASURED_ON.fullmatch(text)
    return text if found is None else f"{found[1] or ''}{_public_corpus(found[2])}{found[3]}"


def copy_public(checkpoint: Path, record: RunRecord, folder: Path) -> None:
    """Copy a packed checkpoint for others: its files unchanged, except for what config.json and the record say about
    the run; the card is written again.

    Raises ResourceError for a link to a file outside the checkpoint, CheckpointError if a file that decides the output
    is not what was saved.
    """
    refuse_links(checkpoint)
    check_folder(checkpoint)
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in (RECORD, "README.md"):
            shutil.copyfile(path, folder / path.name)
    if (checkpoint / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(checkpoint / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)
    record = record.public()
    write_record(folder, record)
    document = json.loads((folder / "config.json").read_text())
    provenance = document["quantization_config"].get("provenance") or {}
    if provenance.get("model"):
        settings = record.settings
        provenance["model"] = settings.model if settings is not None else _public_model(provenance["model"])
    if provenance.get("run") and record.settings is not None:
        named = record.settings.model_dump(include={"model", "corpus", "start"}, exclude_none=True)
        provenance["run"] |= named
    write_file(folder / "config.json", (json.dumps(document, indent=2) + "\n").encode())


def write_record(folder: Path, record: RunRecord) -> None:
    """Put the record into a checkpoint folder."""
    write_file(folder / RECORD, (record.model_dump_json(indent=2) + "\n").encode())


def read_record(folder: Path) -> RunRecord:
    """The record of a packed checkpoint's folder, from config.json if the folder has no record.

    Raises CheckpointError if one of them can't be read.
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
            f"{path} can't be read ({reason}); copy the checkpoint again, or delete {RECORD} to ignore it"
        ) from error


def provenance(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint says about its origin: "model", "precision", "licence", if known."""
    stated = json.loads((checkpoint / "config.json").read_text())["quantization_config"].get("provenance") or {}
    return {key: str(stated[key]) for key in ("model", "precision", "licence") if stated.get(key)}
