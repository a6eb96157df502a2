"""Damaged files of the run store: one damaged row, page or run hides nothing else, and what can be made anew is."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lbllm.chat.votes import VoteStore
from lbllm.commands.attend import line, render
from lbllm.commands.main import main
from lbllm.config import RunConfig, make_config
from lbllm.errors import LbllmError, RunError
from lbllm.events import EVENT, Evaluated, RunFailed, RunLoading, RunQueued, RunStarted, StepMetric
from lbllm.runs.store import Run, RunStore
from lbllm.runs.view import RunView
from tests.chat.test_votes import vote
from tests.helpers.run_events import feed, started, whole_run

CONFIG = make_config("preview", {"model": "some/model"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def store(home: Path) -> Iterator[RunStore]:
    store = RunStore()
    yield store
    store.close()


def finished(store: RunStore) -> Run:
    """A run with all its events and a checkpoint."""
    run = store.create(CONFIG)
    for event in whole_run():
        store.append(run.id, event)
    checkpoint = run.folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(bytes(100))
    measured = Evaluated(what="teacher", text="a text", perplexity=20.0, tokens=100).model_dump(mode="json")
    (checkpoint / "lbllm_run.json").write_text(json.dumps({"bpw": 3.25, "evaluations": [measured, {"what": 1}]}))
    return store.get(run.id)


def change(store: RunStore, statement: str, *values: object) -> None:
    """Change the file as another program would."""
    with sqlite3.connect(store.database.path) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute(statement, values)


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the file itself, everywhere."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    "body",
    [
        '{"kind": "run_paused"}',
        '{"kind": "run_started"}',
        '{"kind": "run_done", "path": 5}',
        "{}",
        "[]",
        '"x"',
        b"\xff\xfe",
        '{"kind": ' + "[" * 500 + "]" * 500 + "}",
    ],
)
def test_an_event_that_cannot_be_read_hides_no_other(
    store: RunStore, body: object, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = finished(store), finished(store)
    number = len(whole_run())
    try:
        change(store, "UPDATE events SET body = ? WHERE run_id = ? AND seq = ?", body, bad.id, number)
    except sqlite3.OperationalError:  # SQLite itself refuses what isn't JSON
        return
    assert [run.id for run in store.all()] == [good.id, bad.id]
    # Without its last event the run has not ended: it can be resumed.
    assert [run.state for run in store.all()] == ["done", "interrupted"]
    assert [stored.seq for stored in store.events(bad.id)] == list(range(1, number))
    assert len(store.events(bad.id, kinds=("run_started",))) == 2
    assert caplog.text.count("are left out") == 1
    assert bad.id in caplog.text
    assert main(["runs", "list"]) == 0
    assert main(["runs", "show", bad.id]) == 0


def test_bytes_of_events_changed_in_the_file_itself(store: RunStore) -> None:
    good, bad = finished(store), finished(store)
    store.append(bad.id, RunFailed(message="TEXTOFTHEBADRUN"))
    overwrite(store.database.path, b'{"kind":"run_failed","message":"TEXT', b'\xff"kind":"run_failed","message":"TEX\0')
    store = RunStore()
    assert [run.id for run in store.all()] == [good.id, bad.id]
    assert len(store.events(bad.id)) == len(whole_run())
    assert len(store.events(bad.id, kinds=("run_started", "run_failed"))) == 2
    assert store.get(bad.id).state == "done"
    store.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [("name", b"\xff\xfe"), ("name", 5), ("created", "never"), ("created", 1e300), ("cwd", 7), ("cwd", b"\xff")],
)
def test_a_damaged_row_of_a_run_is_still_listed(home: Path, store: RunStore, column: str, value: object) -> None:
    runs = [finished(store), finished(store)]
    change(store, f"UPDATE runs SET {column} = ? WHERE id = ?", value, runs[0].id)
    assert {run.id for run in store.all()} == {run.id for run in runs}
    assert {run.state for run in store.all()} == {"done"}
    assert main(["runs", "list"]) == 0
    assert main(["runs", "show", runs[0].id, "--json"]) == 0


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "", ".", "a/b"])
def test_no_row_leads_to_another_folder(store: RunStore, name: str) -> None:
    good = store.create(CONFIG)
    change(store, "INSERT INTO runs (id, name, created, cwd) VALUES (?, 'x', 0, '')", name)
    assert [run.id for run in store.all()] == [good.id]


def test_fields_and_kinds_of_a_later_version_are_left_aside(store: RunStore) -> None:
    run = store.create(CONFIG)
    store.append(run.id, RunQueued())
    later = RunStarted.model_validate(started().model_dump() | {"colour": "red"})
    assert later == started()
    change(store, "INSERT INTO events VALUES (?, 2, 0, ?)", run.id, '{"kind": "run_loading", "place": {"x": 1}}')
    change(store, "INSERT INTO events VALUES (?, 3, 0, ?)", run.id, '{"kind": "weather", "wind": 3}')
    assert [stored.event for stored in store.events(run.id)] == [RunQueued(), RunLoading()]
    assert store.append(run.id, RunLoading()).seq == 4


def test_a_vote_that_cannot_be_read_hides_no_other(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    votes = VoteStore(store.database)
    votes.put(vote("one"))
    for number, body in enumerate(['{"exchange": 1}', "no json", b"\xff", '{"choice": "none"}']):
        change(store, "INSERT INTO votes VALUES (?, ?, ?)", f"bad {number}", 0.0, body)
    later = vote("two").model_dump(mode="json") | {"weight": 2}
    change(store, "INSERT INTO votes VALUES ('two', 1e12, ?)", json.dumps(later))
    assert votes.all() == [vote("one"), vote("two")]
    assert caplog.text.count("some votes are left out") == 1


def test_any_missing_events_leave_a_view_that_can_be_shown() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        view = RunView("run")
        for number, event in enumerate(whole_run()):
            if rng.random() < 0.8:
                feed(view, (float(number), event))
                line(view, event, {})
            if rng.random() < 0.1:
                render(view, float(number), {"wat": 10.0})
                left = view.seconds_left(number, {"wat": 10.0, "aar": 1.0})
                assert left is None or left >= 0
                assert len(view.finished) >= len(view.diverged)
                assert view.perplexities == {}
                assert view.news


def damage(path: Path, how: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    size = 4096
    pages = len(data) // size
    match how:
        case "header":
            data[:100] = random.Random(0).randbytes(100)
        case "every fourth page":
            for page in range(2, pages, 4):
                data[page * size : page * size + size] = random.Random(page).randbytes(size)
        case "zeroed pages":
            data[size : 6 * size] = bytes(5 * size)
        case "cut":
            del data[len(data) // 2 :]
        case "schema":
            data[100:size] = random.Random(1).randbytes(size - 100)
        case "all":
            data[:] = random.Random(2).randbytes(len(data))
        case "empty":
            data.clear()
    path.write_bytes(data)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


@pytest.mark.parametrize(
    "how", ["header", "every fourth page", "zeroed pages", "cut", "schema", "all", "empty", "missing"]
)
def test_a_damaged_store_is_made_anew(home: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore()
    step = StepMetric(stage="wat", block=0, step=1, loss=1.0, lr=1.0, tokens_per_second=1.0)
    runs = [finished(store) for _ in range(6)]
    for run in runs:
        with store.database.transaction() as db:
            values = [(run.id, 1000 + number, 0.0, step.model_dump_json()) for number in range(150)]
            db.executemany("INSERT INTO events (run_id, seq, time, body) VALUES (?, ?, ?, ?)", values)
    begun = store.create(CONFIG)
    store.append(begun.id, RunQueued())
    path = store.database.path
    store.close()
    if how == "missing":
        path.unlink()
    else:
        damage(path, how)
    damaged = path.read_bytes() if path.exists() else b""

    capsys.readouterr()
    # Whoever first reads a damaged page makes the file anew.
    said = ""
    for arguments in [["list"], *(["show", run.id] for run in [*runs, begun])]:
        assert main(["runs", *arguments]) == 0
        said += capsys.readouterr().err
    assert main(["runs", "list", "--json"]) == 0
    listed = {run["id"]: run["state"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert listed == {run.id: "done" for run in runs} | {begun.id: "interrupted"}
    assert said.count("made anew") == 1
    assert str(path) in said
    aside = list(path.parent.glob("runs.db.damaged-*"))
    assert [file.read_bytes() for file in aside] == ([damaged] if how not in ("missing", "empty") else [])
    assert main(["runs", "list"]) == 0
    assert "made anew" not in capsys.readouterr().err

    store = RunStore()
    for run in runs:
        found = store.get(run.id)
        assert found.config == CONFIG
        view = RunView(run.id)
        with view.caught_up(store):
            assert view.phase == "done"
            assert view.result is not None
            assert view.result.bpw == 3.25
        assert main(["runs", "show", run.id]) == 0
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    store.append(begun.id, RunLoading())
    store.close()


def test_an_open_store_goes_on_after_its_file_was_damaged(store: RunStore) -> None:
    runs = [finished(store) for _ in range(6)]
    damage(store.database.path, "zeroed pages")
    other = RunStore()
    assert {run.id for run in other.all()} == {run.id for run in runs}
    other.close()


def test_a_damaged_store_waits_for_the_run_that_uses_it(store: RunStore) -> None:
    runs = [finished(store) for _ in range(6)]
    begun = store.create(CONFIG)
    lock = store.enqueue(begun.id, "run", ("queued",))
    path = store.database.path
    store.close()
    damage(path, "all")
    before = path.read_bytes()
    with pytest.raises(RunError, match=rf"runs\.db is damaged .* while run {begun.id} uses it"):
        RunStore()
    assert path.read_bytes() == before
    lock.close()
    store = RunStore()
    assert {run.id for run in store.all()} == {run.id for run in runs} | {begun.id}
    store.close()


def without_folder(run: Run) -> None:
    shutil.rmtree(run.folder)


def without_settings(run: Run) -> None:
    (run.folder / "config.json").unlink()


def with_a_file_as_folder(run: Run) -> None:
    shutil.rmtree(run.folder)
    run.folder.write_text("")


@pytest.mark.parametrize("spoil", [without_folder, with_a_file_as_folder, without_settings])
def test_a_run_whose_files_are_gone_is_listed_and_refused(
    store: RunStore, spoil: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = store.create(CONFIG), store.create(CONFIG)
    store.append(bad.id, RunFailed(message="no"))
    spoil(bad)
    assert [run.id for run in store.all()] == [good.id, bad.id]
    assert main(["runs", "list"]) == 0
    for command in ("show", "cancel", "resume"):
        if (command, spoil) == ("cancel", without_settings):
            continue
        capsys.readouterr()
        assert main(["runs", command, bad.id]) == 1
        message = capsys.readouterr().err
        assert bad.id in message
        assert str(bad.folder) in message.replace("\n", "")
        assert "Traceback" not in message


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"5",
        b"",
        b"\xff\xfe",
        b'{"preset": []}',
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b"[" * 200_000,
        b'{"quant": {"overrides": {%s}}}' % b",".join(b'"*.%d": {"group_size": 16}' % k for k in range(30_000)),
        b'{"wat": {"tokens": %s}}' % (b"9" * 5_000),
        b'{"schema_version": 2}',
    ],
)
def test_damaged_settings_are_one_message_with_file_and_run(store: RunStore, content: bytes) -> None:
    run = store.create(CONFIG)
    (run.folder / "config.json").write_bytes(content)
    with pytest.raises(LbllmError) as raised:
        _ = store.get(run.id).config
    assert run.id in str(raised.value)
    assert str(run.folder / "config.json") in str(raised.value)
    assert len(str(raised.value)) < 3_000


def test_a_queued_run_whose_starter_died_can_be_resumed(store: RunStore) -> None:
    run = store.create(CONFIG.model_copy(update={"model": "/nowhere/model"}))
    assert store.get(run.id).state == "queued"
    assert store.get(run.id).can_be_resumed
    assert store.resume(run.id).wait(120) == 1
    assert store.get(run.id).state == "failed"
    last = store.events(run.id)[-1].event
    assert isinstance(last, RunFailed)
    assert "/nowhere/model" in last.message
    again = store.create(RunConfig())
    with store.enqueue(again.id, "run", ("queued",)):
        assert not store.get(again.id).can_be_resumed
        with pytest.raises(RunError, match="is queued and can't be resumed"):
            store.resume(again.id)


def test_the_settings_of_a_run_damaged_before_its_start_are_its_failure(store: RunStore) -> None:
    run = store.create(CONFIG)
    (run.folder / "config.json").write_bytes(b"[1]")
    assert store.start(run.id).wait(120) == 1
    assert store.get(run.id).state == "failed"
    last = store.events(run.id)[-1].event
    assert isinstance(last, RunFailed)
    assert str(run.folder / "config.json") in last.message
    assert "holds a list" in last.message


def test_every_kind_of_event_is_read_as_it_was_written() -> None:
    for event in whole_run():
        assert EVENT.validate_json(event.model_dump_json()) == event
