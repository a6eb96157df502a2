"""Write down what the program does at its public boundary, and compare two such records.

    python -m tests.frozen.record --out before.json          write the record of this code
    python -m tests.frozen.record --against before.json      make it again and name every difference
    python -m tests.frozen.record --files tests/frozen/v0_2  also keep the files, for later versions to read

The record holds the SHA-256 of every checkpoint file of four runs of a tiny model (all stages in one go, the same run
stopped and resumed, a run from a checkpoint, and one from a checkpoint to 4-bit activations), every option of the
command line, exit codes, the keys of every ``--json`` document, and the greedy answers of the shipped checkpoint.
Hashes and answers are those of one thread on one kind of processor: compare records of one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import typer

from benchmarks.answers import PROMPTS
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import stream
from lbllm.chat.votes import Vote, VoteStore
from lbllm.checkpoints.find import open_model
from lbllm.commands.main import build, main
from lbllm.config import RunConfig, parse_config
from lbllm.events import BlockDone, RunLoading, RunQueued
from lbllm.pipeline import run as pipeline
from lbllm.runs.store import RunStore
from lbllm.sections import STAGES
from tests.helpers.tiny_models import SENTENCES, save_tiny

ANSWER_TOKENS = 48
SMALL = {"tokens": 512, "epochs": 1, "batch_tokens": 64}
SETTINGS: dict[str, Any] = {
    "model": "teacher",
    "corpus": "text.jsonl",
    "seq_len": 32,
    "device": "cpu",
    "stages": list(STAGES),
    "quant": {"group_size": 16, "param_bits": 4, "act_group_size": 16},
    "ptq": {"tokens": 512, "em_steps": 3, "sweeps": 1},
    "wat": SMALL,
    "aar": SMALL | {"search_tokens": 64},
    "e2e": SMALL | {"seq_len": 32, "lr_weight": 1e-3},
}
WEIGHTS_ALONE = {"act_bits": 16, "kv_bits": 16, "act_group_size": -1}
# Command lines that end early, with what makes each end.
BAD_USAGE: dict[str, list[str]] = {
    "no command": [],
    "unknown command": ["nonsense"],
    "help": ["--help"],
    "quantize without --out": ["quantize"],
    "out is a folder with files": ["quantize", "--out", "teacher"],
    "unknown preset": ["estimate", "--preset", "nonsense"],
    "assignment without a value": ["estimate", "--set", "wat.epochs"],
    "unknown setting": ["estimate", "--set", "wat.nonsense=1"],
    "value out of bounds": ["estimate", "--model", "teacher", "--group-size", "0"],
    "group longer than a row": ["estimate", "--model", "teacher", "--group-size", "4096"],
    "unknown model": ["estimate", "--model", "nonsense"],
    "unknown run": ["runs", "show", "nonsense"],
    "unknown run to resume": ["runs", "resume", "nonsense"],
    "unknown checkpoint": ["export", "nonsense", "--to", "packed", "--out", "exported-nonsense"],
    "unknown export": ["export", "teacher", "--to", "nonsense", "--out", "exported-nonsense"],
    "conversation as JSON": ["chat", "--model", "teacher", "--json"],
    "three models": ["chat", "--model", "a", "--model", "b", "--model", "c", "--prompt", "x"],
    "unknown text": ["evaluate", "--model", "teacher", "--text", "nonsense"],
    "unknown task": ["evaluate", "--model", "teacher", "--tasks", "nonsense"],
    "table of an unknown run": ["table", "nonsense"],
    "from no checkpoint": ["quantize", "--from", "teacher", "--out", "quantized-nonsense"],
}


def prepare(folder: Path) -> None:
    """Write the teacher and the text that all runs read, and make ``folder`` the working directory."""
    os.chdir(folder)
    save_tiny(Path("teacher"), "llama", max_position_embeddings=512)
    lines = [json.dumps({"text": " ".join(f"{number} {line}" for line in SENTENCES)}) for number in range(100)]
    Path("text.jsonl").write_text("\n".join(lines) + "\n")
    Path("prompt.txt").write_text(" ".join(SENTENCES) * 20)


def train(config: RunConfig, folder: Path, *, stop_after: int | None = None) -> None:
    """Run the pipeline in ``folder``; with ``stop_after`` it is stopped after so many blocks and then resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "precision").write_text("no")
    done = 0

    def request() -> Literal["stop"] | None:
        return "stop" if stop_after is not None and done >= stop_after else None

    for event in pipeline.run(config, folder, request=request):
        done += isinstance(event, BlockDone)
    if stop_after is not None:
        train(config, folder)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in ``folder``, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _settings(document: dict[str, Any]) -> RunConfig:
    """These settings, under the name that the records have."""
    return parse_config({"preset": "preview"} | document)


def checkpoints() -> dict[str, dict[str, str]]:
    """The files of the checkpoints of four runs."""
    whole = _settings(SETTINGS)
    train(whole, Path("whole"))
    train(whole, Path("resumed"), stop_after=3)
    dense = SETTINGS | {"stages": ["ptq", "wat"], "quant": SETTINGS["quant"] | WEIGHTS_ALONE}
    train(_settings(dense), Path("weights"))
    further = SETTINGS | {"stages": ["e2e"], "start": "whole/checkpoint"}
    train(_settings(further), Path("further"))
    lower = SETTINGS | {"stages": ["aar", "e2e"], "start": "weights/checkpoint"}
    train(_settings(lower), Path("lower"))
    return {name: hashes(Path(name, "checkpoint")) for name in ("whole", "resumed", "weights", "further", "lower")}


def options() -> dict[str, Any]:
    """Every command's parameters: names, types and defaults."""
    found: dict[str, Any] = {}

    def walk(command: Any, path: str) -> None:
        found[path] = {
            str(parameter.name): {
                "names": sorted([*parameter.opts, *parameter.secondary_opts]),
                "type": str(parameter.type_descriptor.annotation),
                "bounds": [parameter.min, parameter.max],
                "default": str(parameter.default) if parameter.default is not None else None,
                "required": parameter.required,
                "multiple": parameter.multiple,
            }
            for parameter in command.params
            if parameter.name != "help"
        }
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}")

    walk(typer.main.get_command(build()), "lbllm")
    return found


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it printed to stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(arguments)
    return code, out.getvalue()


def keys(value: Any) -> Any:
    """A JSON document with its values replaced by their types; of a list the first member stands for all."""
    if isinstance(value, dict):
        return {key: keys(member) for key, member in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return type(value).__name__


def documents() -> dict[str, Any]:
    """The keys of what every command prints with ``--json``."""
    settings = Path("settings.json")
    settings.write_text(json.dumps(SETTINGS))
    found: dict[str, Any] = {}

    def note(name: str, *arguments: str) -> Any:
        code, text = call([*arguments, "--json"])
        document = json.loads(text)
        found[name] = {"exit code": code, "document": keys(document)}
        return document

    note("models", "models")
    note("corpora", "corpora")
    rows = ["--tokens", "256", "--length", "32", "--batch", "4"]
    note("corpora sample", "corpora", "sample", "--model", "teacher", "--out", "sampled.jsonl.gz", *rows)
    note("estimate", "estimate", "--config", str(settings))
    run = note("quantize", "quantize", "--config", str(settings), "--out", "quantized")["run"]
    note("evaluate", "evaluate", "--model", "quantized", "--text", "prompt.txt", "--seq-len", "64")
    beside = ["--teacher", "teacher", "--limit", "2"]
    note("evaluate beside", "evaluate", "--model", "quantized", "--text", "prompt.txt", "--seq-len", "64", *beside)
    note("table", "table", run, "--text", "prompt.txt", "--seq-len", "64", "--limit", "1")
    note("chat", "chat", "--model", "teacher", "--model", "quantized", "--prompt", "Hello", "--max-new-tokens", "8")
    for kind in ("packed", "dense", "gguf", "space"):
        note(f"export {kind}", "export", "quantized", "--to", kind, "--out", f"exported-{kind}")
    note("runs list", "runs", "list")
    note("runs show", "runs", "show", run)
    note("runs stop", "runs", "stop", run)
    note("runs cancel", "runs", "cancel", run)
    note("runs resume", "runs", "resume", run)
    note("error", "runs", "show", "nonsense")
    return found


def answers() -> list[str]:
    """What the shipped checkpoint answers to ten prompts, taking the likeliest token each time."""
    model, tokenizer = open_model("shipped")
    found = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        pieces = stream(model, tokenizer, messages, max_new_tokens=ANSWER_TOKENS, temperature=0)
        found.append("".join(piece.text for piece in pieces))
    return found


def keep_files(target: Path) -> None:
    """Keep what a run leaves behind as test data: the run store, its settings, block states and checkpoint."""
    store = RunStore(Path("store"))
    run = store.create(_settings(SETTINGS), "a run of its time")
    for begun in (RunQueued(), RunLoading()):
        store.append(run.id, begun)
    (run.folder / "precision").write_text("no")
    for event in pipeline.run(run.config, run.folder, request=lambda: None):
        store.append(run.id, event)
    settings = ChatSettings()
    vote = Vote(
        exchange="first",
        time=1.0,
        left="teacher",
        right="quantized",
        choice="left",
        prompt="Why?",
        left_answer="So.",
        right_answer="No.",
        left_settings=settings,
        right_settings=settings,
    )
    VoteStore(store.database).put(vote)
    store.close()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree("store", target)
    shutil.copytree("teacher", target / "teacher")
    shutil.copyfile("text.jsonl", target / "text.jsonl")
    with contextlib.closing(sqlite3.connect(target / "runs.db")) as db:
        db.execute("UPDATE runs SET cwd = '/nowhere'")
        db.execute("UPDATE events SET body = replace(body, ?, '/nowhere')", (str(Path.cwd()),))
        db.commit()
        db.execute("PRAGMA journal_mode = DELETE")


@contextlib.contextmanager
def own_place() -> Iterator[Path]:
    """A temporary folder with a run store of its own; converted models and kernels are the usual ones."""
    before = Path.cwd()
    usual = Path(os.environ.get("LBLLM_HOME") or Path.home() / ".cache" / "lbllm").expanduser()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        for name in ("models", "kernels"):
            (usual / name).mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to(usual / name)
        kept = dict(os.environ)
        os.environ |= {"LBLLM_HOME": str(home), "PYTHONPATH": str(before)}
        try:
            yield Path(folder)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(kept)


def record(files: Path | None) -> dict[str, Any]:
    """The whole record of this code."""
    torch.set_num_threads(1)
    with own_place() as folder:
        prepare(folder)
        found = {
            "checkpoints": checkpoints(),
            "options": options(),
            "exit codes": {name: call(arguments)[0] for name, arguments in BAD_USAGE.items()},
            "json": documents(),
            "answers": answers(),
        }
        if files is not None:
            keep_files(files)
    return found


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Every place where two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            place = f"{path}/{key}"
            if key not in after:
                yield f"{place}: is gone"
            elif key not in before:
                yield f"{place}: is new"
            else:
                yield from differences(before[key], after[key], place)
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"


def run() -> None:
    """Record or compare, as the command line says; exits 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the record to")
    parser.add_argument("--against", type=Path, help="an earlier record to compare with")
    parser.add_argument("--files", type=Path, help="folder to keep the files of a run in")
    given = parser.parse_args()
    found = record(given.files.absolute() if given.files else None)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if given.against:
        different = list(differences(json.loads(given.against.read_text()), json.loads(json.dumps(found))))
        sys.stdout.write("\n".join([*different, f"{len(different)} differences", ""]))
        sys.exit(bool(different))


if __name__ == "__main__":
    run()
