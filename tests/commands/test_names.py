"""Every command takes every kind of name that makes sense for it, and refuses the others in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbllm.chat.showcase import Showcase
from lbllm.commands.attend import Outcome
from lbllm.commands.main import main
from lbllm.config import RunConfig
from lbllm.runs.store import Run
from tests.helpers.named_models import PACKED, TEACHERS, NamedModels, named_models
from tests.helpers.ports import free_port

Kinds = tuple[str, ...]
SHORT = ["--set", "seq_len=32", "--set", "e2e.seq_len=32"]
# The command's words before and after the name, and the kinds of names that it takes.
COMMANDS: dict[str, tuple[list[str], list[str], Kinds]] = {
    "chat": (["chat", "--model"], ["--prompt", "Hello", "--max-new-tokens", "2"], TEACHERS + PACKED),
    "evaluate": (["evaluate", "--model"], ["--text", "TEXT", "--seq-len", "32", "--limit", "1"], TEACHERS + PACKED),
    "estimate": (["estimate", "--model"], ["--group-size", "16", *SHORT], TEACHERS),
    "estimate from": (["estimate", "--from"], SHORT, PACKED),
    "quantize": (["quantize", "--out", "OUT", "--model"], ["--group-size", "16", *SHORT], TEACHERS),
    "quantize from": (["quantize", "--out", "OUT", "--from"], SHORT, PACKED),
    "corpora sample": (
        ["corpora", "sample", "--tokens", "32", "--length", "16", "--batch", "2", "--out", "OUT.jsonl.gz", "--model"],
        [],
        TEACHERS,
    ),
    "export": (["export", "--to", "packed", "--out", "OUT"], [], PACKED),
    "export a Space": (["export", "--to", "space", "--out", "OUT"], [], PACKED),
    "repack": (["repack", "--embedding-bits", "8", "--out", "OUT"], [], PACKED),
    "showcase": (["showcase"], [], PACKED),
    "showcase beside": (["showcase", "packed", "--teacher"], [], TEACHERS),
    "serve": (["serve", "--port", str(free_port())], [], TEACHERS + PACKED),
}
ACCEPTED = {TEACHERS + PACKED: "give a catalogue id", TEACHERS: "give a catalogue id", PACKED: "give 'shipped'"}
BAD = ("shiped", "no such model", "no/such/folder", "lost.gguf")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamedModels]:
    with named_models(tmp_path_factory.mktemp("names")) as made:
        yield made


@pytest.fixture
def call(
    models: NamedModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Runs a command to the point where a worker or a server would be started; its exit code and what it printed."""

    def attend(store: object, run: Run, console: object, out: Path, *_: object) -> Outcome:
        return Outcome(run.id, out, 0.0, 0, 0.0)

    def serve(showcase: Showcase, **_: object) -> None:
        showcase.wait()

    monkeypatch.setattr("lbllm.commands.training.attend", attend)
    monkeypatch.setattr("app.showcase.page.run", serve)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    monkeypatch.setattr("lbllm.models.hub.ask", lambda *_: "unreachable")

    def run(command: str, name: str) -> tuple[int, str, str]:
        before, after, _ = COMMANDS[command]
        words = [*before, name, *after]
        words = [word.replace("OUT", str(tmp_path / "out")).replace("TEXT", models.text) for word in words]
        capsys.readouterr()
        code = main(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("command", "kind"), [(command, kind) for command, (_, _, kinds) in COMMANDS.items() for kind in kinds]
)
def test_every_command_takes_every_kind_of_name(models: NamedModels, call: Any, command: str, kind: str) -> None:
    code, _, errors = call(command, models.names[kind])
    assert code == 0, errors


@pytest.mark.parametrize("command", COMMANDS)
def test_other_names_are_refused_in_one_line(models: NamedModels, call: Any, command: str) -> None:
    kinds = COMMANDS[command][2]
    other = [models.names[kind] for kind in TEACHERS + PACKED if kind not in kinds]
    for name in (*other, *BAD, models.waiting.id):
        code, printed, errors = call(command, name)
        assert (code, printed) == (1, ""), name
        assert errors.count("\n") == 1, errors
        assert errors.startswith("Error: ")
        assert name in errors
        if name in other or name in BAD[:2]:
            assert ACCEPTED[kinds] in errors


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_id_is_a_teachers(call: Any, command: str) -> None:
    code, _, errors = call(command, "Qwen/Qwen3-0.6B")
    if TEACHERS[0] in COMMANDS[command][2]:
        assert "Qwen/Qwen3-0.6B can't be downloaded" in errors
    else:
        assert "Qwen/Qwen3-0.6B is not a packed checkpoint" in errors
    assert code == 1


@pytest.mark.parametrize("name", ["shipped", "copied", "./qwen3-0.6b", "shiped"])
def test_evaluate_beside_another_model(models: NamedModels, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", "packed", "--teacher", name, "--text", models.text, "--seq-len", "32"]
    code = main([*words, "--limit", "1", "--json"])
    document = json.loads(capsys.readouterr().out)
    if name == "shiped":
        assert (code, document["error"].startswith("model 'shiped' is not known")) == (1, True)
    else:
        assert (code, document["teacher"]) == (0, name)


@pytest.mark.parametrize("kind", PACKED)
def test_a_run_keeps_a_name_of_its_start_that_leads_there_again(
    models: NamedModels, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr("lbllm.commands.training._quantize", lambda _, config, *__, **___: seen.append(config))
    monkeypatch.setattr("lbllm.commands.training.print_outcome", lambda *_, **__: None)
    assert main(["quantize", "--from", models.names[kind], "--out", "out"]) == 0
    (config,) = seen
    assert config.start is not None
    assert config.model == models.run.config.model
    again = ["estimate", "--from", config.start, *SHORT, "--json"]
    capsys.readouterr()
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 2


def test_table_takes_a_runs_id(models: NamedModels, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text", models.text, "--seq-len", "32", "--limit", "1"]
    assert main(["table", models.run.id, *words]) == 0
    for name in ("shipped", "no-such-run", models.waiting.id):
        capsys.readouterr()
        assert main(["table", name, *words]) == 1
        assert capsys.readouterr().err.count("\n") == 1
