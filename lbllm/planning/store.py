"""Studies on disk: one JSON file each in ``home()/plans``, named by a hash of what they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lbllm.errors import ModelError
from lbllm.files import file_sha256, write_errors, write_file
from lbllm.models.gguf import sha256
from lbllm.models.loading import FileFault
from lbllm.models.source import dense_place, resolve
from lbllm.models.weights import StoredWeights
from lbllm.places import home
from lbllm.planning.study import Study


def teacher_hash(name: str) -> str:
    """SHA-256 of a teacher's stored weights: of its GGUF file, or over its safetensors files. Raises ModelError."""
    source = resolve(name)
    if source.kind in ("embedded", "gguf"):
        return sha256(Path(source.place))
    place, offline = dense_place(source)
    try:
        files = {tensor.file for tensor in StoredWeights.find(place, offline).tensors.values()}
        digests = [file_sha256(file) for file in sorted(files, key=lambda file: file.name)]
    except (FileFault, OSError) as error:
        raise ModelError(f"{name} can't be read: {error}; give another copy of the model") from None
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def study_path(facts: dict[str, Any]) -> Path:
    """The file of the study that depends on these facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return home() / "plans" / f"{digest[:32]}.json"


def load_study(facts: dict[str, Any]) -> Study | None:
    """The stored study with these facts; None without one, or where its file is damaged."""
    try:
        found = Study.model_validate_json(study_path(facts).read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.facts == facts else None


def save_study(study: Study) -> None:
    """Store a study, atomically. Raises ResourceError."""
    path = study_path(study.facts)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, study.model_dump_json(indent=1).encode())
