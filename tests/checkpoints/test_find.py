"""Where the names of models lead: every kind of name, the order in which they are looked up, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbllm.checkpoints.find import (
    CHECKPOINTS,
    FoundCheckpoint,
    find_checkpoint,
    find_model,
    find_teacher,
    open_model,
    open_teacher,
)
from lbllm.checkpoints.hf import is_checkpoint
from lbllm.errors import CheckpointError, LbllmError, ModelError, RunError
from lbllm.models.source import TEACHERS as ACCEPTED_TEACHERS
from lbllm.models.source import ModelSource
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.store import RunStore
from tests.helpers.named_models import PACKED, TEACHERS, NamedModels, named_models
from tests.helpers.tiny_models import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamedModels]:
    with named_models(tmp_path_factory.mktemp("names")) as made:
        yield made


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_name_of_a_teacher(models: NamedModels, kind: str) -> None:
    name = models.names[kind]
    found = find_model(name)
    assert isinstance(found, ModelSource)
    assert find_teacher(name) == found
    assert not any(isinstance(module, PackedLinear) for module in open_model(name)[0].modules())
    assert open_teacher(name).name == name
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(name)
    assert str(error.value) == f"{name} is not a packed checkpoint; give {CHECKPOINTS}"


@pytest.mark.parametrize("kind", PACKED)
def test_every_name_of_a_packed_checkpoint(models: NamedModels, kind: str) -> None:
    name = models.names[kind]
    found = find_model(name)
    assert isinstance(found, FoundCheckpoint)
    assert find_checkpoint(name) == found
    assert is_checkpoint(found.folder)
    assert any(isinstance(module, PackedLinear) for module in open_model(name)[0].modules())
    again = find_checkpoint(found.name)
    assert again.folder == found.folder
    assert found.record.settings == models.run.config
    assert found.run == (models.run.id if kind in ("run's id", "run's folder") else None)
    for refuse in (find_teacher, open_teacher):
        with pytest.raises(ModelError) as error:
            refuse(name)
        assert str(error.value).startswith(f"{name} is already quantized")
        assert str(error.value).endswith(ACCEPTED_TEACHERS)


def test_a_hub_id_is_not_asked_for_before_it_is_loaded() -> None:
    assert find_model("Qwen/Qwen3-0.6B").place == "Qwen/Qwen3-0.6B"  # type: ignore[union-attr]
    assert find_teacher("somebody/their-model").kind == "hub"
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        find_checkpoint("somebody/their-model")


def test_the_programs_own_names_come_before_paths_and_paths_before_runs(models: NamedModels) -> None:
    shipped = find_checkpoint("shipped")
    assert shipped.shipped
    assert shipped.name == "shipped"
    assert find_checkpoint("./shipped").name == "./shipped"
    assert find_teacher("qwen3-0.6b").kind == "hub"  # a folder has that name
    assert find_teacher("./qwen3-0.6b").kind == "folder"
    named = save_tiny(models.folder / models.run.id, "llama")
    assert find_teacher(models.run.id).place == named.name
    shutil.rmtree(named)


def test_a_teachers_folder_stays_one_whatever_lies_in_it(models: NamedModels, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", "llama")
    (teacher / "checkpoint").symlink_to(models.folder / "packed")
    assert find_teacher(str(teacher)).kind == "folder"


@pytest.mark.parametrize(
    ("name", "close"),
    [("shiped", "shipped"), ("smollm2-135-instruct", "smollm2-135m-instruct"), ("tiny ones", "tiny one")],
)
def test_close_names_are_offered(models: NamedModels, name: str, close: str) -> None:
    with pytest.raises(ModelError) as error:
        find_model(name)
    message = str(error.value)
    assert message.startswith(f"model {name!r} is not known; close names: ")
    assert close in message
    assert message.endswith(f"; give {ACCEPTED_TEACHERS}, {CHECKPOINTS}")


def test_a_misspelt_run_is_offered_by_its_id_and_one_that_waits_is_not(models: NamedModels) -> None:
    with pytest.raises(ModelError, match=rf"close names: .*{models.run.id} \(tiny one\)") as error:
        find_checkpoint(models.run.id[:-1])
    assert models.waiting.id not in str(error.value)
    assert "smollm2" not in str(error.value)
    with pytest.raises(RunError, match=f"{models.waiting.id} is queued; only a finished run"):
        find_model(models.waiting.id)
    with pytest.raises(RunError, match=f"{models.waiting.id} is queued"):
        find_model(str(models.waiting.folder))


@pytest.mark.parametrize("name", ["", " ", "zzzz", "no/such/folder", "lost.gguf", "text.txt", "../x", "\0"])
def test_names_that_lead_nowhere(models: NamedModels, name: str) -> None:
    for find in (find_model, find_teacher, find_checkpoint):
        with pytest.raises(LbllmError) as error:
            find(name)
        assert "\n" not in str(error.value)


def test_a_store_of_ones_own_is_asked(models: NamedModels, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(ModelError, match="not known"):
        find_checkpoint(models.run.id.replace("-", "_"), store)
    assert find_checkpoint(str(models.run.folder), store).run is None  # a run's folder, but of another store
    store.close()


def test_no_store_is_made_for_a_name_that_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    for name in ("shipped", "smollm2-135m-instruct", "Qwen/Qwen3-0.6B", str(save_tiny(tmp_path / "mine", "llama"))):
        find_model(name)
    assert not (tmp_path / "home").exists()


def test_a_checkpoint_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with named_models(tmp_path) as models:
        (models.run.folder / "checkpoint" / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"is done, but its checkpoint .* is gone"):
            find_model(models.run.id)
