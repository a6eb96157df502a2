"""The Space: what lies in its folder, and that it runs from there."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from gradio_client import Client

from lbllm.commands.main import main
from lbllm.errors import CheckpointError, ConfigError, LbllmError, ModelError, ResourceError
from lbllm.models.source import embedded_file
from lbllm.share.space import write_space
from tests.helpers import ROOT
from tests.helpers.homes import own_home
from tests.helpers.ports import free_port
from tests.helpers.tiny_showcase import tiny_pair

# In requirements.txt of this project, and not in a Space's.
LEFT_OUT = {"streamlit", "lm_eval", "datasets", "plotly"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


def settings(space: Path) -> dict[str, Any]:
    """The Space's settings in front of its README.md: "key: JSON value" a line."""
    _, front, _ = (space / "README.md").read_text().split("---\n", 2)
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}


@pytest.mark.soak
def test_it_runs_from_its_folder_and_answers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, checkpoint = pair
    space = tmp_path / "space"
    write_space(checkpoint, space, teacher=str(teacher))
    assert {path.name for path in space.iterdir()} == {
        *("README.md", "app.py", "requirements.txt", "packages.txt", ".gitattributes"),
        *("lbllm", "app", "assets", "checkpoint", "teacher", "LICENSE", "NOTICE"),
    }
    assert (space / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (space / "teacher" / "teacher" / "model.safetensors").read_bytes() == (
        teacher / "model.safetensors"
    ).read_bytes()
    assert not list(space.rglob("__pycache__"))
    own = set((ROOT / "requirements.txt").read_text().split())
    needed = (space / "requirements.txt").read_text().split()
    assert set(needed) < own
    front = settings(space)
    assert f"gradio=={front['sdk_version']}" in needed
    assert (front["sdk"], front["app_file"], front["python_version"]) == ("gradio", "app.py", "3.11")
    # What a folder says of its licence is not one that the hub knows.
    assert (front["license"], front["license_name"], front["models"]) == ("other", "none", [])

    home = own_home(tmp_path / "home", "kernels")
    port = free_port()
    variables = os.environ | {"LBLLM_HOME": str(home), "GRADIO_SERVER_PORT": str(port)}
    variables.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-X", "importtime", "app.py"]
        server = subprocess.Popen(command, cwd=space, env=variables, stdout=log, stderr=log)
    try:
        client = reached(f"http://127.0.0.1:{port}", server, tmp_path / "log")
        answered = client.predict("What is the capital of France?", False, 0, api_name="/ask")
        client.close()
    finally:
        server.kill()
        server.wait()
    assert answered["names"] == ["teacher", "teacher binarized"]
    assert all(answer["state"] == "done" and answer["tokens"] > 0 for answer in answered["answers"])
    lines = (tmp_path / "log").read_text().splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert {"gradio", "torch", "lbllm"} < imported
    assert not imported & LEFT_OUT


def reached(url: str, server: subprocess.Popen[bytes], log: Path) -> Client:
    """A client of the server once it listens."""
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline
        try:
            return Client(url, verbose=False, analytics_enabled=False)
        except Exception:
            time.sleep(0.2)


def test_a_checkpoint_and_a_teacher_of_the_hub_are_named_instead_of_copied(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(pair[1], tmp_path / "checkpoint")
    document = json.loads((checkpoint / "config.json").read_text())
    document["quantization_config"]["provenance"]["licence"] = "Apache-2.0"
    (checkpoint / "config.json").write_text(json.dumps(document))
    write_space(
        checkpoint, tmp_path / "space", teacher="qwen3-0.6b", hub_id="somebody/qwen3-binarized", title='A "title"'
    )
    assert not (tmp_path / "space" / "checkpoint").exists()
    assert not (tmp_path / "space" / "teacher").exists()
    app = (tmp_path / "space" / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert 'snapshot_download("somebody/qwen3-binarized"), "qwen3-0.6b"' in app
    front = settings(tmp_path / "space")
    assert front["title"] == 'A "title"'
    assert front["models"] == ["Qwen/Qwen3-0.6B", "somebody/qwen3-binarized"]
    assert front["license"] == "apache-2.0"
    assert "license_name" not in front


def test_no_name_breaks_out_of_the_files_of_a_space(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = shutil.copytree(pair[0], tmp_path / 'x"), evil(), ("\u2028\'\\ 🎉')
    checkpoint = shutil.copytree(pair[1], tmp_path / "checkpoint")
    document = json.loads((checkpoint / "config.json").read_text())
    licence = "MIT\n---\nsdk: docker\x85# <script>"
    document["quantization_config"]["provenance"]["licence"] = licence
    (checkpoint / "config.json").write_text(json.dumps(document))
    title = "My\n---\n# model <b> `x` [y](z)"
    write_space(checkpoint, tmp_path / "space", teacher=str(teacher), title=title)
    tree = ast.parse((tmp_path / "space" / "app.py").read_text())
    assert f"teacher/{teacher.name}" in {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert "evil" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    readme = (tmp_path / "space" / "README.md").read_text()
    _, front, text = re.split("^---\n", readme, maxsplit=2, flags=re.MULTILINE)
    found = yaml.safe_load(front)
    assert (found["title"], found["license_name"], found["sdk"]) == (title, licence, "gradio")
    assert r"# My --- \# model \<b\> \`x\` \[y\](z)" in text.splitlines()


def test_the_embedded_teacher_comes_as_its_gguf_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_space(pair[1], tmp_path / "space", teacher="smollm2-135m-instruct", hub_id="somebody/smollm2")
    (file,) = (tmp_path / "space" / "teacher").iterdir()
    assert file.name == "SmolLM2-135M-Instruct.gguf"
    assert "SmolLM2-135M-Instruct and its binarized copy answer" in (tmp_path / "space" / "README.md").read_text()
    assert file.stat().st_size == embedded_file().stat().st_size
    assert f'HERE / "teacher/{file.name}"' in (tmp_path / "space" / "app.py").read_text()
    assert settings(tmp_path / "space")["models"][0] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_command_writes_it(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "space"
    command = ["export", str(pair[1]), "--to", "space", "--teacher", str(pair[0]), "--out", str(out), "--json"]
    assert main(command) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert out / "app.py" in files
    assert json.loads(capsys.readouterr().out) == {
        "path": str(out),
        "kind": "space",
        "disk_bytes": sum(path.stat().st_size for path in files),
    }


def stating(checkpoint: Path, folder: Path, model: str) -> Path:
    """A copy of the checkpoint that says it was made from ``model``."""
    shutil.copytree(checkpoint, folder)
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"]["provenance"]["model"] = model
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_a_path_in_a_foreign_checkpoint_is_not_followed(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private" / "notes"
    private.mkdir(parents=True)
    (private / "README.md").write_text("a secret")
    (private / "config.json").write_text('{"key": "a secret"}')
    monkeypatch.chdir(tmp_path)
    # The second one looks like a name on the hub, and is a folder of this machine.
    for number, named in enumerate((str(private), "private/notes", "../" + tmp_path.name + "/private/notes")):
        foreign = stating(pair[1], tmp_path / f"foreign{number}", named)
        with pytest.raises(ModelError, match="--teacher"):
            write_space(foreign, tmp_path / "space")
        assert main(["export", str(foreign), "--to", "space", "--out", str(tmp_path / "space")]) == 1
        assert not (tmp_path / "space").exists()
    write_space(stating(pair[1], tmp_path / "public", "qwen3-0.6b"), tmp_path / "space")
    assert 'str(HERE / "checkpoint"), "qwen3-0.6b"' in (tmp_path / "space" / "app.py").read_text()


def test_links_out_of_the_teacher_s_folder_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = shutil.copytree(pair[0], tmp_path / "teacher")
    (tmp_path / "secret.txt").write_text("a secret")
    (teacher / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ResourceError, match=r"notes\.txt is a link to .*secret\.txt"):
        write_space(pair[1], tmp_path / "space", teacher=str(teacher))
    assert not (tmp_path / "space").exists()


def test_what_can_not_become_a_space_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, checkpoint = pair
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused: list[tuple[type[LbllmError], Path, Path, dict[str, str], str]] = [
        (CheckpointError, teacher, tmp_path / "a", {}, str(teacher)),
        (ResourceError, checkpoint, tmp_path / "full", {}, "exists already"),
        (ResourceError, checkpoint, tmp_path / "full" / "file" / "b", {"teacher": str(teacher)}, "full/file"),
        (ModelError, checkpoint, tmp_path / "c", {"teacher": "/nowhere/at/all"}, "/nowhere/at/all"),
        (ConfigError, checkpoint, tmp_path / "d", {"hub_id": "no-owner"}, "no-owner"),
    ]
    for error, source, out, options, named in refused:
        with pytest.raises(error, match=named):
            write_space(source, out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
