"""Notes and tags of runs: kept, checked, in stores of every version, and after damage."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from lbllm.config import RunConfig
from lbllm.errors import RunError
from lbllm.runs.deleted import remove, restore
from lbllm.runs.notes import (
    LONGEST_NOTE,
    LONGEST_TAG,
    MOST_TAGS,
    Note,
    all_tags,
    note_of,
    notes,
    write_note,
    write_tags,
)
from lbllm.runs.store import RunStore
from tests.chat.test_votes import FIRST_VERSION
from tests.helpers.cases import cases


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "store")
    yield store
    store.close()


def test_note_and_tags_are_kept_apart(store: RunStore) -> None:
    run, other = store.create(RunConfig()), store.create(RunConfig())
    assert notes(store) == {}
    assert write_note(store, run.id, "  the first\nwith small groups ") == Note("the first\nwith small groups")
    write_tags(store, run.id, ["paper", "  g 16 ", "Paper"])
    again = RunStore(store.root)
    assert notes(again) == {run.id: Note("the first\nwith small groups", ("g 16", "paper"))}
    assert note_of(again, other.id) == Note()
    write_note(store, run.id, "")
    assert note_of(again, run.id) == Note("", ("g 16", "paper"))
    write_tags(store, run.id, [])
    assert note_of(again, run.id) == Note()
    assert all_tags([Note("", ("b", "a")), Note("x", ("B", "a"))]) == ["a", "b"]


@cases(10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=50), tags=st.lists(st.text(max_size=10), max_size=4))
def test_any_text_is_kept_or_refused_as_a_whole(store: RunStore, text: str, tags: list[str]) -> None:
    run = store.create(RunConfig())
    assert write_note(store, run.id, text).text == text.strip()
    if all(tag.split() and "," not in tag for tag in tags):
        kept = write_tags(store, run.id, tags).tags
        assert {tag.casefold() for tag in kept} == {" ".join(tag.split()).casefold() for tag in tags}
    else:
        with pytest.raises(RunError, match="tag"):
            write_tags(store, run.id, tags)
        assert note_of(store, run.id).tags == ()


def test_what_is_too_long_or_of_no_run_is_named(store: RunStore) -> None:
    run = store.create(RunConfig())
    with pytest.raises(RunError, match="at most 2,000 characters, and this one has 2,001"):
        write_note(store, run.id, "x" * (LONGEST_NOTE + 1))
    with pytest.raises(RunError, match="longer than 40 characters"):
        write_tags(store, run.id, ["x" * (LONGEST_TAG + 1)])
    with pytest.raises(RunError, match="has a comma"):
        write_tags(store, run.id, ["a,b"])
    with pytest.raises(RunError, match="at most 20 tags"):
        write_tags(store, run.id, [str(number) for number in range(MOST_TAGS + 1)])
    for write in (lambda: write_note(store, "nowhere", "a"), lambda: write_tags(store, "nowhere", ["a"])):
        with pytest.raises(RunError, match="no run 'nowhere'"):
            write()
    assert notes(store) == {}


def test_a_deleted_run_keeps_its_note_until_it_is_removed(store: RunStore) -> None:
    run = store.create(RunConfig())
    write_note(store, run.id, "kept")
    store.delete(run.id)
    restore(store, run.id)
    assert note_of(store, run.id).text == "kept"
    store.delete(run.id)
    remove(store, run.id)
    assert notes(store) == {}


def test_a_store_of_the_first_version_takes_notes(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "runs.db") as db:
        for statement in FIRST_VERSION:
            db.execute(statement)
    store = RunStore(tmp_path)
    write_tags(store, "20260101-000000-abcdef", ["old"])
    assert note_of(RunStore(tmp_path), "20260101-000000-abcdef").tags == ("old",)


def test_a_damaged_note_hides_no_other(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = store.create(RunConfig()), store.create(RunConfig())
    for run in (good, bad):
        write_note(store, run.id, "mine")
    with sqlite3.connect(store.database.path) as db:
        db.execute("UPDATE notes SET tags = '[1' WHERE run_id = ?", (bad.id,))
    assert notes(store) == {good.id: Note("mine"), bad.id: Note("mine")}
    assert "damaged" in caplog.text
    # A damaged file is made anew with the notes that can be read.
    store.close()
    path = store.database.path
    with sqlite3.connect(path) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'votes'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    data[size * (page - 1) : size * (page - 1) + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))
    again = RunStore(store.root)
    assert len(again.all()) == 2
    again.database.query("SELECT * FROM votes")
    assert again.database.repaired
    assert notes(again)[good.id] == Note("mine")
