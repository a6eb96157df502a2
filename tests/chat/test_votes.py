"""Votes in the run store: kept, replaced, taken back, counted for models, exported; a store of the first version."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lbllm.chat.settings import ChatSettings
from lbllm.chat.votes import Tally, Vote, VoteStore, tally, votes_csv, votes_json
from lbllm.config import make_config
from lbllm.runs.database import Database
from lbllm.runs.store import RunStore

# The tables as the first version of the store made them.
FIRST_VERSION = (
    "CREATE TABLE runs (id TEXT PRIMARY KEY, name TEXT NOT NULL, created REAL NOT NULL, cwd TEXT NOT NULL)",
    "CREATE TABLE events (run_id TEXT NOT NULL REFERENCES runs (id), seq INTEGER NOT NULL, time REAL NOT NULL, "
    "body TEXT NOT NULL, kind TEXT AS (json_extract(body, '$.kind')), PRIMARY KEY (run_id, seq)) WITHOUT ROWID",
    "CREATE INDEX lifecycle ON events (run_id, seq) WHERE kind IN ('run_queued', 'run_loading', 'run_started', "
    "'run_done', 'run_stopped', 'run_failed')",
    "INSERT INTO runs VALUES ('20260101-000000-abcdef', 'old', 1.0, '/')",
    "INSERT INTO events (run_id, seq, time, body) VALUES "
    '(\'20260101-000000-abcdef\', 1, 2.0, \'{"kind": "run_stopped", "request": "stop"}\')',
    "PRAGMA user_version = 1",
)


def vote(exchange: str = "one", choice: str = "left", **changes: Any) -> Vote:
    values: dict[str, Any] = {
        "exchange": exchange,
        "time": 1.0,
        "left": "teacher",
        "right": "student",
        "choice": choice,
        "prompt": "Why?",
        "left_answer": "Because.",
        "right_answer": "So.",
        "left_settings": ChatSettings(),
        "right_settings": ChatSettings(temperature=0),
    }
    return Vote.model_validate(values | changes)


def test_votes_are_kept_in_order(tmp_path: Path) -> None:
    database = Database(tmp_path)
    store = VoteStore(database)
    later, earlier = vote("b", time=2.0), vote("a", "tie", time=1.0, prompt="Zwei\nZeilen, “quoted” 🙂")
    store.put(later)
    store.put(earlier)
    database.close()
    assert VoteStore(Database(tmp_path)).all() == [earlier, later]


def test_a_second_vote_on_an_exchange_takes_the_place_of_the_first(tmp_path: Path) -> None:
    store = VoteStore(Database(tmp_path))
    store.put(vote(choice="left"))
    store.put(vote(choice="both bad"))
    assert [kept.choice for kept in store.all()] == ["both bad"]
    store.withdraw("one")
    store.withdraw("one")
    assert store.all() == []


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "runs.db") as db:
        for statement in FIRST_VERSION:
            db.execute(statement)
    store = RunStore(tmp_path)
    assert store.get("20260101-000000-abcdef").state == "stopped"
    VoteStore(store.database).put(vote())
    run = store.create(make_config())
    again = RunStore(tmp_path)
    assert len(VoteStore(again.database).all()) == 1
    assert [kept.id for kept in again.all()] == ["20260101-000000-abcdef", run.id]


def test_tallies_follow_the_models_when_sides_change() -> None:
    votes = [
        vote("1", "left"),
        vote("2", "left", left="student", right="teacher"),
        vote("3", "right", left="student", right="teacher"),
        vote("4", "tie"),
        vote("5", "both bad", left="student", right="teacher"),
        vote("6", "left", right="another"),
    ]
    assert tally(votes, "teacher", "student") == Tally(left=2, right=1, tie=1, both_bad=1)
    assert tally(votes, "student", "teacher") == Tally(left=1, right=2, tie=1, both_bad=1)
    assert tally(votes, "teacher", "student").total == 5
    assert tally([], "teacher", "student").total == 0


def test_exports_hold_every_vote_in_full() -> None:
    votes = [vote("1", prompt='A "quoted", long\nprompt'), vote("2", "tie")]
    assert [Vote.model_validate(entry) for entry in json.loads(votes_json(votes))] == votes
    rows = list(csv.DictReader(io.StringIO(votes_csv(votes))))
    assert [row["prompt"] for row in rows] == ['A "quoted", long\nprompt', "Why?"]
    assert [row["choice"] for row in rows] == ["left", "tie"]
    assert json.loads(rows[0]["right_settings"])["temperature"] == 0
    assert json.loads(votes_json([])) == []


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_a_spreadsheet_takes_no_cell_for_a_formula(text: str) -> None:
    row = next(csv.DictReader(io.StringIO(votes_csv([vote(prompt=text, left_answer=text)]), newline="")))
    assert row["prompt"] == f"'{text}"
    assert row["left_answer"] == f"'{text}"


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValidationError, match="choice"):
        vote(choice="maybe")
