"""Tiny models under every kind of name that a command, a page or a benchmark takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lbllm.checkpoints.shipped import strip
from lbllm.models.gguf import sha256
from lbllm.runs.store import Run, RunStore
from tests.helpers.finished_run import finished_run
from tests.helpers.homes import own_home
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import save_tiny

TEACHERS = ("catalogue id", "catalogue id in capitals", "folder", "folder called like a catalogue id", "gguf")
PACKED = (
    "shipped",
    "run's id",
    "run's folder",
    "run's checkpoint",
    "copied checkpoint",
    "copied run",
    "called shipped",
)


@dataclass(frozen=True)
class NamedModels:
    """``names``: a name of each kind; they hold in ``folder``, the working directory. ``run`` is finished, ``waiting``
    is not; ``text`` is a file to evaluate on."""

    folder: Path
    names: dict[str, str]
    run: Run
    waiting: Run
    text: str


@contextmanager
def named_models(folder: Path) -> Iterator[NamedModels]:
    """Make the models, with a home, an embedded model and a shipped checkpoint of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_HOME", str(own_home(folder / "home", "kernels")))
        patch.chdir(folder)
        store = RunStore()
        run = finished_run(store, folder, ("ptq", "wat"))
        waiting = store.create(run.config, "waits")
        store.close()
        write_gguf(folder / "tiny.gguf")
        patch.setattr("lbllm.models.source.embedded_file", lambda: folder / "tiny.gguf")
        patch.setattr("lbllm.models.source.EMBEDDED_SHA256", sha256(folder / "tiny.gguf"))
        checkpoint = run.folder / "checkpoint"
        strip(checkpoint, folder / "assets")
        for module in ("shipped", "find"):
            patch.setattr(f"lbllm.checkpoints.{module}.ASSET_FOLDER", folder / "assets")
        save_tiny(folder / "qwen3-0.6b", "llama")
        shutil.copytree(checkpoint, folder / "packed")
        shutil.copytree(checkpoint, folder / "shipped")
        shutil.copytree(checkpoint, folder / "copied" / "checkpoint")
        names = {
            "catalogue id": "smollm2-135m-instruct",
            "catalogue id in capitals": "SmolLM2-135M-Instruct",
            "folder": run.config.model,
            "folder called like a catalogue id": "./qwen3-0.6b",
            "gguf": "tiny.gguf",
            "shipped": "shipped",
            "run's id": run.id,
            "run's folder": str(run.folder),
            "run's checkpoint": str(checkpoint),
            "copied checkpoint": "packed",
            "copied run": "copied",
            "called shipped": "./shipped",
        }
        yield NamedModels(folder, names, run, waiting, run.config.corpus)
