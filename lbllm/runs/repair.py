"""Make a run store's damaged file anew, from what can still be read of it and from the folders of the runs.

A run's folder tells its settings and, of a finished one, its checkpoint with what was measured of it. Of the file,
every row before and after a damaged page is read. The damaged file stays beside the new one.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lbllm.config import read_config
from lbllm.errors import ConfigError
from lbllm.events import EVENT, Evaluated, Event, RunDone, RunQueued
from lbllm.json_input import decode_object

DELETED = "deleted"  # the folder in a run store with those of deleted runs
RUN_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_CORRUPT, _NOT_A_DATABASE = 11, 26  # SQLite's SQLITE_CORRUPT and SQLITE_NOTADB
_LARGEST_RECORD = 10_000_000  # bytes of a checkpoint's record


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is damaged, or no SQLite file at all."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (_CORRUPT, _NOT_A_DATABASE)


def is_damaged(path: Path) -> bool:
    """Check the whole file."""
    try:
        with closing(sqlite3.connect(path, timeout=30)) as db:
            return bool(db.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",))
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return True
        raise


def run_folders(root: Path) -> list[Path]:
    """The folders of runs under ``root``, also of deleted ones, the oldest first."""
    found = [path for place in (root, root / DELETED) if place.is_dir() for path in place.iterdir()]
    runs = [path for path in found if RUN_ID.fullmatch(path.name) and (path / "config.json").is_file()]
    return sorted(runs, key=lambda path: path.name)


def lenient_text(data: bytes) -> str:
    """For a connection's ``text_factory``: one damaged text must not hide all other rows."""
    return data.decode("utf-8", "replace")


def make_anew(path: Path, make_tables: Callable[[sqlite3.Connection], None]) -> str:
    """Put a new file in the place of the damaged one and return a message that says so. Raises OSError and
    sqlite3.Error. No worker may use the file."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with closing(sqlite3.connect(fresh, isolation_level=None)) as db:
        db.execute("BEGIN")
        make_tables(db)
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as damaged:
            damaged.text_factory = lenient_text
            _salvage(damaged, db, [folder.name for folder in run_folders(path.parent)])
        restore(db, path.parent)
        (runs,) = db.execute("SELECT COUNT(*) FROM runs").fetchone()
        (events,) = db.execute("SELECT COUNT(*) FROM events").fetchone()
        db.execute("COMMIT")
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    os.link(path, aside)
    # SQLite would add the old file's log to the new file.
    for ending in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(f"{aside}{ending}")
    fresh.replace(path)
    return (
        f"{path} was damaged. It was made anew from what could be read of it and from the folders of the runs: {runs} "
        f"runs with {events:,} events. The damaged file is kept as {aside.name}"
    )


def _salvage(damaged: sqlite3.Connection, db: sqlite3.Connection, folders: list[str]) -> None:
    """Copy every row that can be read, from both ends of each table, and of each run's events."""
    _copy(damaged, db, "runs", "", "rowid")
    _copy(damaged, db, "notes", "", "rowid")
    _copy(damaged, db, "votes", "", "rowid")
    known = {run_id for (run_id,) in db.execute("SELECT id FROM runs").fetchall()}
    for run_id in sorted({*known, *folders}, key=str):
        _copy(damaged, db, "events", "WHERE run_id = ?", "seq", run_id)


def _copy(damaged: sqlite3.Connection, db: sqlite3.Connection, table: str, where: str, key: str, *values: str) -> None:
    columns = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")]
    listed, marks = ", ".join(columns), ", ".join("?" * len(columns))
    for direction in ("ASC", "DESC"):
        with suppress(sqlite3.DatabaseError):
            for row in damaged.execute(f"SELECT {listed} FROM {table} {where} ORDER BY {key} {direction}", values):
                if "body" not in columns or _is_json(row[columns.index("body")]):
                    db.execute(f"INSERT OR IGNORE INTO {table} ({listed}) VALUES ({marks})", row)


def _is_json(body: object) -> bool:
    try:
        return isinstance(body, str) and isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def restore(db: sqlite3.Connection, root: Path) -> int:
    """Add the runs whose folders the file doesn't know, and the end of those that are finished; return how many runs
    were added."""
    known = {run_id for (run_id,) in db.execute("SELECT id FROM runs").fetchall()}
    added = 0
    for folder in run_folders(root):
        changed = folder.stat().st_mtime
        if folder.name not in known:
            try:
                name = read_config(folder / "config.json").run_name
            except (OSError, ConfigError):
                name = "settings can't be read"
            created = _created(folder.name, changed)
            db.execute("INSERT INTO runs (id, name, created, cwd) VALUES (?, ?, ?, '')", (folder.name, name, created))
            added += 1
        query = 'SELECT MAX(seq), SUM(body LIKE \'{"kind":"run_done"%\') FROM events WHERE run_id = ?'
        last, done = db.execute(query, (folder.name,)).fetchone()
        end = [] if done else _end(folder / "checkpoint")
        for seq, event in enumerate(end if last or end else [RunQueued()], (last or 0) + 1):
            values = (folder.name, seq, changed, event.model_dump_json())
            db.execute("INSERT INTO events (run_id, seq, time, body) VALUES (?, ?, ?, ?)", values)
    return added


def _created(run_id: str, otherwise: float) -> float:
    try:
        return time.mktime(time.strptime(run_id[:15], "%Y%m%d-%H%M%S"))
    except (ValueError, OverflowError):
        return otherwise


def _end(checkpoint: Path) -> list[Event]:
    """The last events of a run with this checkpoint; no event if it isn't there."""
    weights = list(checkpoint.glob("model*.safetensors"))
    if not weights or not (checkpoint / "config.json").is_file():
        return []
    record: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        record = decode_object((checkpoint / "lbllm_run.json").read_bytes(), largest=_LARGEST_RECORD, deepest=20)
    events: list[Event] = []
    measured = record.get("evaluations")
    for evaluation in measured if isinstance(measured, list) else ():
        with suppress(ValidationError):
            events.append(Evaluated.model_validate(evaluation))
    bpw = record.get("bpw")
    stated = float(bpw) if isinstance(bpw, int | float) else float("nan")
    size = sum(file.stat().st_size for file in weights)
    done = RunDone(path=str(checkpoint), bpw=stated, disk_bytes=size, seconds=0.0)
    return [*events, EVENT.validate_python(done)]
