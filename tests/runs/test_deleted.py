"""Runs get other names, are moved aside, come back, and go for good only by a second act."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from lbllm.commands.main import main
from lbllm.config import make_config
from lbllm.errors import RunError
from lbllm.events import RunDone, RunQueued
from lbllm.runs.deleted import remove, restore
from lbllm.runs.store import Run, RunStore


def finished(store: RunStore, name: str = "one") -> Run:
    run = store.create(make_config("preview"), name)
    (run.folder / "checkpoint").mkdir()
    (run.folder / "checkpoint" / "model.safetensors").write_bytes(b"bits")
    store.append(run.id, RunDone(path="x", bpw=3, disk_bytes=4, seconds=1))
    return store.get(run.id)


def test_another_name(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = finished(store)
    assert store.rename(run.id, "  a\nbetter   name ").name == "a better name"
    assert RunStore(tmp_path).get(run.id).name == "a better name"
    for bad in ("", " \n "):
        with pytest.raises(RunError, match="a name needs"):
            store.rename(run.id, bad)
    with pytest.raises(RunError, match="no run 'nowhere'"):
        store.rename("nowhere", "x")


def test_a_deleted_run_comes_back_whole(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run, other = finished(store), finished(store, "other")
    store.delete(run.id)
    assert [found.id for found in store.all()] == [other.id]
    assert [found.id for found in store.deleted()] == [run.id]
    assert not run.folder.exists()
    for use in (store.get, store.start, store.resume, store.delete):
        with pytest.raises(RunError, match="was deleted"):
            use(run.id)
    # Another process, and then this one, sees it again.
    assert restore(RunStore(tmp_path), run.id) == run
    assert store.get(run.id) == run
    assert (run.folder / "checkpoint" / "model.safetensors").read_bytes() == b"bits"
    assert store.deleted() == []


def test_a_run_that_works_or_waits_is_not_deleted(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create(make_config("preview"))
    store.append(run.id, RunQueued())
    with (run.folder / "alive.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="queued"):
            store.delete(run.id)
        assert run.folder.is_dir()
    # Its worker is dead now.
    store.delete(run.id)
    assert store.all() == []


def test_it_goes_for_good_by_a_second_act_alone(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run, other = finished(store), finished(store, "other")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (run.folder / "link").symlink_to(outside)
    with pytest.raises(RunError, match="not among the deleted"):
        remove(store, run.id)
    store.delete(run.id)
    remove(store, run.id)
    assert not (store.root / "deleted" / run.id).exists()
    assert (outside / "kept").read_text() == "kept"
    assert store.database.query("SELECT COUNT(*) FROM events WHERE run_id = ?", run.id) == [(0,)]
    with pytest.raises(RunError, match="no run"):
        store.get(run.id)
    with pytest.raises(RunError, match="not among the deleted"):
        restore(store, run.id)
    assert [found.id for found in store.all()] == [other.id]
    # A folder that is a link: only the link goes.
    shutil.move(other.folder, outside / "moved")
    other.folder.symlink_to(outside / "moved")
    store.delete(other.id)
    remove(store, other.id)
    assert (outside / "moved" / "config.json").is_file()


def test_a_run_whose_folder_is_gone(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = finished(store)
    assert not run.is_missing
    shutil.rmtree(run.folder)
    assert store.get(run.id).is_missing
    store.delete(run.id)
    assert store.all() == []
    assert restore(store, run.id).is_missing
    store.delete(run.id)
    remove(store, run.id)
    assert store.deleted() == []


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    store = RunStore(tmp_path / "runs")
    run = finished(store)

    def told(*words: str, code: int = 0) -> dict[str, object]:
        assert main(["runs", *words, "--json"]) == code
        document: dict[str, object] = json.loads(capsys.readouterr().out)
        return document

    assert told("rename", run.id, "two") == {"run": run.id, "name": "two"}
    assert told("delete", run.id) == {"run": run.id, "for_good": False}
    assert told("list") == {"runs": []}
    assert [one["id"] for one in told("list", "--deleted")["runs"]] == [run.id]  # type: ignore[attr-defined]
    assert "runs restore" in str(told("show", run.id, code=1)["error"])
    assert told("restore", run.id) == {"run": run.id, "state": "done"}
    told("delete", run.id, "--for-good", code=1)
    told("delete", run.id)
    assert told("delete", run.id, "--for-good") == {"run": run.id, "for_good": True}
    assert told("list", "--deleted") == {"runs": []}


def test_a_deleted_run_comes_back_after_the_store_was_lost(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run, kept = finished(store), finished(store, "other")
    store.delete(run.id)
    store.close()
    (tmp_path / "runs.db").unlink()
    store = RunStore(tmp_path)
    assert [one.id for one in store.all()] == [kept.id]
    assert [one.id for one in store.deleted()] == [run.id]
    assert restore(store, run.id).config == run.config
