"""Every kind of write, killed by the system at its steps: what is there is the old or the new, whole, and the next
write works and leaves nothing behind.

Killed elsewhere: block states and a run's checkpoint (tests/pipeline/test_worker.py), a run's events
(tests/runs/test_store.py), compiled kernels (tests/kernels/test_library.py), the writers themselves
(tests/test_files.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lbllm.chat.votes import VoteStore
from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.hf import load, save_packed_parts
from lbllm.checkpoints.shipped import assemble, strip
from lbllm.commands.attend import deliver
from lbllm.config import RunConfig
from lbllm.events import RunQueued
from lbllm.files import new_folder
from lbllm.models.gguf import convert, converted_folder
from lbllm.models.teacher import Teacher
from lbllm.runs.store import Run, RunStore
from lbllm.share.export import ExportKind, export
from lbllm.share.space import write_space
from lbllm.texts.sampling import sample_corpus
from tests.chat.test_votes import FIRST_VERSION, vote
from tests.helpers.cases import FACTOR
from tests.helpers.finished_run import finished_run
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import tiny
from tests.helpers.tiny_runs import bfloat_teacher, run_config, run_tiny

# Python reports these before it does them.
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
MOMENTS = 2  # in `make test`; `make soak` tries all
TEMPORARY = (".lock", "-wal", "-shm")  # files that may stay


@dataclass(frozen=True)
class Given:
    """What the writers write from: a store with a finished run, a teacher and its checkpoint, a GGUF file."""

    store: RunStore
    run: Run
    teacher: Teacher
    checkpoint: Path
    stripped: Path
    gguf: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("given")
    store = RunStore(folder / "runs")
    teacher = bfloat_teacher()
    run_tiny(run_config(), folder / "tiny", teacher)
    checkpoint, gguf = folder / "tiny" / "checkpoint", folder / "tiny.gguf"
    strip(checkpoint, folder / "stripped")
    write_gguf(gguf)
    yield Given(store, finished_run(store, folder), teacher, checkpoint, folder / "stripped", gguf)
    store.close()


def to(kind: ExportKind) -> Callable[[Given, Path], object]:
    return lambda given, folder: export(find_checkpoint(given.run.id, given.store), kind, folder / "out")


def sample(given: Given, folder: Path) -> None:
    model, tokenizer = tiny("llama")
    list(sample_corpus(model, tokenizer, folder / "out.jsonl.gz", tokens=64, length=16, batch=2))


def several_files(given: Given, folder: Path) -> None:
    model, tokenizer = load(given.checkpoint, dtype=torch.bfloat16)
    with new_folder(folder / "out") as checkpoint:
        tokenizer.save_pretrained(checkpoint)
        save_packed_parts(model, iter(model.state_dict().items()), checkpoint, largest=20_000)


# Kinds of a file or folder: a function that writes it into a folder.
WRITES: dict[str, Callable[[Given, Path], object]] = {
    "packed export": to("packed"),
    "dense export": to("dense"),
    "GGUF export": to("gguf"),
    "Space": lambda given, folder: write_space(
        given.run.folder / "checkpoint", folder / "out", teacher=given.run.config.model
    ),
    "converted GGUF": lambda given, folder: convert(given.gguf, folder),
    "shipped checkpoint": lambda given, folder: assemble(given.stripped, given.teacher, folder / "out"),
    "asset of the checkpoint": lambda given, folder: strip(given.checkpoint, folder / "out"),
    "copy of a finished checkpoint": lambda given, folder: deliver(given.checkpoint, folder / "out"),
    "checkpoint in several files": several_files,
    "sampled corpus": sample,
}


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that is not temporary, by its path in the folder. Drafts of writers are left out."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not name.endswith(TEMPORARY) and not (name.startswith(".") and ".new/" in name)
    }


def in_child(work: Callable[[], object], folder: Path, killed_at: int = 0) -> int:
    """Work in a child process that is killed before the given step in ``folder``; 0: never.

    Returns the number of steps it took.
    """
    taken = folder.with_name(f"{folder.name}.steps")
    child = os.fork()
    if child == 0:
        try:
            count, descriptor = 0, os.open(taken, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            one_at_a_time = threading.Lock()  # several threads read the files of a checkpoint

            def step(event: str, arguments: Any) -> None:
                nonlocal count
                if event in STEPS and str(arguments[0]).startswith(str(folder)):
                    with one_at_a_time:
                        count += 1
                        os.pwrite(descriptor, b"%d" % count, 0)
                        if count == killed_at:
                            os.kill(os.getpid(), signal.SIGKILL)

            torch.set_num_threads(1)
            sys.addaudithook(step)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == (signal.SIGKILL if killed_at else 0)
    return int(taken.read_text())


def moments(steps: int) -> Iterator[int]:
    """Some steps, the last one among them; in `make soak` all."""
    yield from range(steps, 0, -1 if FACTOR > 1 else -max(1, steps // MOMENTS))


@pytest.mark.parametrize("kind", WRITES)
def test_a_killed_write_leaves_the_old_or_the_new(given: Given, tmp_path: Path, kind: str) -> None:
    write, folder = WRITES[kind], tmp_path / "folder"
    for _ in range(2):  # what the first one finds missing elsewhere, such as compiled kernels, would count as its steps
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        steps = in_child(lambda: write(given, folder), folder)
    whole = contents(folder)
    assert whole
    for moment in moments(steps):
        shutil.rmtree(folder)
        folder.mkdir()
        in_child(lambda: write(given, folder), folder, moment)
        left = contents(folder)
        parts = {name for name in left if ".part" in name}  # finished batches of a sampled corpus
        assert {name: digest for name, digest in left.items() if name not in parts} in ({}, whole)
    if not left.keys() - parts:
        write(given, folder)
    assert contents(folder) == whole
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".new")]


def test_drafts_of_earlier_versions_are_removed(given: Given, tmp_path: Path) -> None:
    folder = converted_folder(given.gguf, tmp_path)
    for name in (f".{folder.name}.unfinished", f".{folder.name}.part", f".{folder.name}.01234567.new"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / ".other.unfinished").mkdir()
    convert(given.gguf, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f".{folder.name}.lock", ".other.unfinished"}


# Kinds of a change of the run store: a function that makes it, and what of it shows whether it was made.
CHANGES: dict[str, tuple[Callable[[RunStore], object], Callable[[RunStore], object]]] = {
    "a new run": (lambda store: store.create(RunConfig()), lambda store: [run.config for run in store.all()]),
    "an event": (
        lambda store: store.append(store.all()[0].id, RunQueued()) if store.all() else None,
        lambda store: [len(store.events(run.id)) for run in store.all()],
    ),
    "a vote": (
        lambda store: VoteStore(store.database).put(vote()),
        lambda store: VoteStore(store.database).all(),
    ),
    "a request": (
        lambda store: store.request(store.all()[0].id, "stop"),
        lambda store: [path.read_text() for path in store.root.glob("*/request")],
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_killed_change_of_the_run_store_is_made_or_not(tmp_path: Path, kind: str) -> None:
    change, seen = CHANGES[kind]
    root, steps, moment = tmp_path / "runs", 0, 0
    while moment == 0 or moment <= steps:
        shutil.rmtree(root, ignore_errors=True)
        store = RunStore(root)
        if kind in ("an event", "a request"):
            run = store.create(RunConfig())
        if kind == "a request":
            lock = (run.folder / "alive.lock").open("ab")
            fcntl.flock(lock, fcntl.LOCK_EX)
            store.append(run.id, RunQueued())
        before = seen(store)
        store.close()

        def work() -> None:
            child = RunStore(root)
            child.database._db.set_trace_callback(lambda statement: sys.audit("open", str(root), "", 0))
            change(child)

        taken = in_child(work, root, moment)
        store = RunStore(root)
        if moment == 0:
            steps, after = taken, seen(store)
            assert after != before
        else:
            assert seen(store) in (before, after)
            if seen(store) == before or kind == "a request":
                change(store)
            assert seen(store) == after
        assert kind != "a request" or not [*root.rglob("*.new")]
        store.close()
        moment += 1 if FACTOR > 1 or moment == 0 else max(1, steps // MOMENTS)


def test_a_store_of_the_first_version_survives_a_killed_update(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    steps = 12
    for moment in range(1, steps, 1 if FACTOR > 1 else 4):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        with sqlite3.connect(root / "runs.db") as db:
            for statement in FIRST_VERSION:
                db.execute(statement)
        db.close()

        def update() -> None:
            connect = sqlite3.connect

            def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
                made: sqlite3.Connection = connect(*arguments, **options)
                made.set_trace_callback(lambda statement: sys.audit("open", str(root), "", 0))
                return made

            sqlite3.connect = traced  # type: ignore[assignment]
            RunStore(root)
            os.kill(os.getpid(), signal.SIGKILL)

        in_child(update, root, moment)
        store = RunStore(root)
        assert [run.name for run in store.all()] == ["old"]
        VoteStore(store.database).put(vote())
        assert len(VoteStore(store.database).all()) == 1
        store.close()
