"""The perplexities that a run has measured so far: ``blocks/evaluated.json``, with a hash.

A damaged file, or one that is not of this run, is not used: a resumed run measures again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lbllm.config import RunConfig
from lbllm.files import write_file
from lbllm.json_input import decode_object

_SEAL = "sha256"


def read_evaluated(blocks: Path, config: RunConfig) -> dict[str, float]:
    """Return the perplexities by what was measured: the teacher, or the model after a stage."""
    try:
        document = decode_object((blocks / "evaluated.json").read_bytes())
    except (OSError, ValueError):
        return {}
    # Runs of versions 0.1 and 0.2 have no hash.
    seal = document.pop(_SEAL, None)
    names = {"teacher", *config.origins}
    known = {
        name: float(value)
        for name, value in document.items()
        if name in names and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    whole = known.keys() == document.keys() and (seal is None or seal == _hash(document))
    return known if whole else {}


def write_evaluated(blocks: Path, config: RunConfig, known: dict[str, float]) -> None:
    """Write the perplexities by what was measured. Raises OSError."""
    write_file(blocks / "evaluated.json", json.dumps(known | {_SEAL: _hash(known)}).encode())


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
