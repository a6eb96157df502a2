"""Which models a showcase opens, and what the command says about those that it can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbllm.chat.showcase import open_showcase
from lbllm.checkpoints.find import find_checkpoint
from lbllm.commands.main import main
from lbllm.errors import CheckpointError, LbllmError, ModelError
from lbllm.models.catalogue import model_title
from lbllm.share.export import export
from tests.helpers.ports import free_port
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_showcase import tiny_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


def test_what_is_opened(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm.chat.showcase.home", lambda: tmp_path)
    teacher, checkpoint = folders
    with pytest.raises(ModelError, match="--teacher"):  # a path in a checkpoint is not followed
        open_showcase(str(checkpoint))
    showcase = open_showcase(str(checkpoint), str(teacher))
    assert showcase.names == ("teacher", "teacher binarized")
    showcase.wait()
    assert showcase.ready
    assert not showcase.completes
    base = open_showcase(str(checkpoint), str(save_tiny(tmp_path / "base", "gpt2")))
    base.wait()
    assert base.completes
    assert base.names[0] == "base"
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        open_showcase(str(teacher))
    with pytest.raises(ModelError, match="missing does not exist"):
        open_showcase(str(checkpoint), str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="already quantized"):
        open_showcase(str(checkpoint), str(checkpoint))
    (tmp_path / "empty").mkdir()
    empty = open_showcase(str(checkpoint), str(tmp_path / "empty"))
    with pytest.raises(LbllmError, match=r"empty has no config\.json"):
        empty.wait()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("smollm2-135m-instruct", "SmolLM2-135M-Instruct"),
        ("qwen3-0.6b", "Qwen3-0.6B"),
        ("somebody/their-model", "their-model"),
        ("/home/anna/mine.gguf", "mine"),
        ("C:\\anna\\mine\\", "mine"),
        (".", "."),
    ],
)
def test_a_model_is_titled_by_its_name(name: str, shown: str) -> None:
    assert model_title(name) == shown


def test_a_teacher_that_is_not_here_is_asked_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given = export(find_checkpoint(str(folders[1])), "packed", tmp_path / "given").path
    with pytest.raises(ModelError, match=r"given was made from teacher.*--teacher"):
        open_showcase(str(given))


def test_the_command_names_what_is_wrong(
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lbllm.chat.showcase.home", lambda: tmp_path)
    assert main(["showcase", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a packed checkpoint" in capsys.readouterr().err
    assert main(["showcase", "--port", "70000"]) == 2
    # What shows only while it loads ends the server.
    (tmp_path / "empty").mkdir()
    empty = ["showcase", str(folders[1]), "--teacher", str(tmp_path / "empty"), "--port", str(free_port())]
    assert main(empty) == 1
    shown = capsys.readouterr().err
    assert "LBLLM Showcase: http://127.0.0.1:" in shown
    assert str(tmp_path / "empty") in shown
