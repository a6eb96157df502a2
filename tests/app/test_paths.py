"""Paths from a page stay under one root."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app.paths import corpus_name, model_name, resolve_under_root, teacher_name
from lbllm.errors import ConfigError, LbllmError, RunError
from lbllm.runs.store import RunStore
from tests.helpers.finished_run import finished_run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "allowed"
    (folder / "models" / "mine").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "notes.txt").write_text("not for pages")
    monkeypatch.setenv("LBLLM_ROOT", str(folder))
    return folder


def test_relative_and_absolute_paths_below_the_root(root: Path) -> None:
    assert resolve_under_root("models/mine") == root / "models" / "mine"
    assert resolve_under_root(str(root / "models")) == root / "models"
    assert resolve_under_root("not/there") == root / "not" / "there"


@pytest.mark.parametrize("text", ["..", "../secret/notes.txt", "models/../../secret", "/etc/passwd", "~", "a\0b"])
def test_paths_outside_are_refused(root: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"outside|can't be read"):
        resolve_under_root(text)


def test_a_link_that_leaves_the_root_is_refused(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    with pytest.raises(ConfigError, match="LBLLM_ROOT"):
        resolve_under_root("link/notes.txt")


def test_the_root_is_the_current_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBLLM_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_under_root("here") == tmp_path.resolve() / "here"


def test_catalogue_and_hub_names_are_no_paths(root: Path) -> None:
    assert model_name(" smollm2-135m-instruct ") == "smollm2-135m-instruct"
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert corpus_name("embedded+wikipedia") == "embedded+wikipedia"


def test_a_folder_under_the_root_wins_over_a_hub_name(root: Path) -> None:
    assert model_name("models/mine") == str(root / "models" / "mine")


def test_a_folder_of_the_current_directory_is_no_way_round_the_root(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.parent / "secret" / "model").mkdir()
    monkeypatch.chdir(root.parent)
    # As a path it would be the folder outside the root; under the root there is nothing of that name.
    with pytest.raises(ConfigError, match="neither known nor a path"):
        model_name("secret/model")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (corpus_name, "neither known nor a path under"),
        (model_name, r"not known; give .*looks for paths under"),
        (teacher_name, r"not known; give .*looks for paths under"),
    ],
)
def test_what_is_not_there_is_said(root: Path, name: Callable[[str], str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        name("nothing.txt")
    with pytest.raises(ConfigError, match="is chosen"):
        name(" ")


def test_runs_and_the_shipped_checkpoint_are_named_on_pages(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    store = RunStore()
    run = finished_run(store, tmp_path, ("ptq",))
    waiting = store.create(run.config)
    store.close()
    checkpoint = run.folder / "checkpoint"
    assert model_name("shipped") == "shipped"
    assert model_name(run.id) == str(checkpoint)
    with pytest.raises(RunError, match=f"{waiting.id} is queued"):
        model_name(waiting.id)
    with pytest.raises(ConfigError, match=rf"close names: {run.id} \(tiny one\).*looks for paths under"):
        model_name(run.id[:-1])
    for name in ("shipped", run.id):
        with pytest.raises(LbllmError, match="already quantized"):
            teacher_name(name)
    with pytest.raises(ConfigError, match="outside"):  # the same folder, but named by its path
        model_name(str(run.folder))

    shutil.copytree(checkpoint, root / "copied" / "checkpoint")
    assert model_name("copied") == str(root / "copied" / "checkpoint")
    (root / "linked").mkdir()
    (root / "linked" / "checkpoint").symlink_to(checkpoint)
    with pytest.raises(ConfigError, match="outside"):
        model_name("linked")

    # A folder of the current directory with a run's name is no way round the root.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, elsewhere / run.id)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError, match="neither known nor a path"):
        model_name(run.id)
