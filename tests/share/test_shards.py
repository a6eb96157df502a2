"""A packed checkpoint in several files does all that one in one file does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lbllm
from lbllm.chat.pool import ModelPool
from lbllm.chat.showcase import open_showcase
from lbllm.checkpoints.dense import dense_copy
from lbllm.checkpoints.find import find_checkpoint, open_model, teacher_of
from lbllm.checkpoints.shipped import strip
from lbllm.checkpoints.weights import WEIGHTS, save_parts, weights_bytes, weights_files
from lbllm.errors import CheckpointError
from lbllm.events import RunDone
from lbllm.files import file_sha256
from lbllm.models.loading import INDEX
from lbllm.pipeline.start import settings_to_go_on
from lbllm.runs.repair import _end
from lbllm.runs.store import Run, RunStore
from lbllm.share import export as exporting
from lbllm.share.export import ExportKind, export
from tests.helpers.homes import own_home
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

KINDS: dict[str, tuple[ExportKind, ...]] = {"whole": ("dense", "gguf"), "parts": ("packed", "dense", "gguf", "space")}


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(run.folder / "checkpoint", tmp_path_factory.mktemp("whole") / "checkpoint"))


@pytest.fixture(scope="module")
def parts(run: Run, whole: Path) -> Path:
    """The run's own checkpoint, now in several files."""
    folder = run.folder / "checkpoint"
    lbllm.load(whole, dtype=torch.bfloat16)[0].save_pretrained(folder, max_shard_size=20_000)
    assert len(weights_files(folder)) >= 3
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_every_export_is_that_of_one_file(run: Run, whole: Path, parts: Path, tmp_path: Path) -> None:
    made = {}
    for name, folder in {"whole": whole, "parts": parts}.items():
        for kind in KINDS[name]:
            out = tmp_path / name / kind
            export(find_checkpoint(str(folder)), kind, out, teacher=run.config.model if kind == "space" else None)
            made[name, kind] = files(out)
    for kind in ("dense", "gguf"):
        found, wanted = made["parts", kind], made["whole", kind]
        assert found.keys() == wanted.keys()
        assert {file for file in found if found[file] != wanted[file]} <= {"README.md"}
    exported = {name: hashed for name, hashed in made["parts", "packed"].items() if "safetensors" in name}
    assert exported == {name: hashed for name, hashed in files(parts).items() if "safetensors" in name}
    assert exported.keys() == {INDEX, *(path.name for path in weights_files(parts))}
    assert {f"checkpoint/{name}" for name in exported} < made["parts", "space"].keys()
    for folder in (tmp_path / "parts" / "packed", tmp_path / "parts" / "space" / "checkpoint"):
        lbllm.load(folder)
    card = (tmp_path / "parts" / "packed" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in exported)


def test_a_dense_export_is_what_transformers_writes_also_in_several_files(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_checkpoint(str(parts))
    export(source, "dense", tmp_path / "one")
    dense_copy(lbllm.load(parts)[0]).save_pretrained(tmp_path / "memory")
    one = files(tmp_path / "one")
    assert files(tmp_path / "memory").items() < one.items()
    monkeypatch.setattr(exporting, "save_parts", lambda *arguments: save_parts(*arguments, largest=30_000))
    export(source, "dense", tmp_path / "several")
    found = [load_file(file) for file in weights_files(tmp_path / "several")]
    assert len(found) >= 3
    wanted = load_file(tmp_path / "one" / WEIGHTS)
    assert {name for part in found for name in part} == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for part in found for name, tensor in part.items())
    open_model(str(tmp_path / "several"))


def test_chat_comparison_and_showcase_open_it(
    run: Run, whole: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    pool = ModelPool()
    slots = [pool.get(str(folder)) for folder in (whole, parts)]
    for slot in slots:
        assert slot.wait(120)
    assert slots[0].loaded.bpw == slots[1].loaded.bpw
    showcase = open_showcase(str(parts), run.config.model)
    for slot in showcase.slots:
        assert slot.wait(120)
        assert slot.state == "ready", slot.error


def test_its_run_is_found_by_its_weights(store: RunStore, run: Run, parts: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(parts, tmp_path / "copy"))
    assert teacher_of(find_checkpoint(str(copy), store), store) == run.config.model
    (end,) = [event for event in _end(parts) if isinstance(event, RunDone)]
    assert end.disk_bytes == weights_bytes(parts)


def test_a_run_begins_with_it(tmp_path: Path) -> None:
    teacher = tiny_teacher("llama")
    run_tiny(run_config(stages=["ptq"]), tmp_path / "first", teacher)
    begun = tmp_path / "first" / "checkpoint"
    small = {"tokens": 64, "batch_tokens": 64, "epochs": 1, "lr_weight": 0, "lr_levels": 0, "lr_act": 0}
    settings = run_config(**{**settings_to_go_on(str(begun)), "model": "tiny", "e2e": small})
    before = load_file(begun / WEIGHTS)
    lbllm.load(begun, dtype=torch.bfloat16)[0].save_pretrained(begun, max_shard_size=20_000)
    run_tiny(settings, tmp_path / "second", tiny_teacher("llama"))
    after = load_file(tmp_path / "second" / "checkpoint" / WEIGHTS)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)


def test_the_asset_of_the_project_is_made_of_one_file(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}; save it in one file"):
        strip(parts, tmp_path / "asset")
