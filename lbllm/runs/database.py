"""The SQLite file of a run store: names, dates and events of runs, and votes on pairs of answers.

Many processes use it at once. A newer version of the file is refused; an older one is brought to this version.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from lbllm.errors import ResourceError, RunError

LIFECYCLE = ("run_queued", "run_loading", "run_started", "run_done", "run_stopped", "run_failed")
IS_LIFECYCLE = f"kind IN {LIFECYCLE}"
# Statements that lead from each version of the file to the next; a new file goes through all of them.
_MIGRATIONS = (
    (
        "CREATE TABLE runs (id TEXT PRIMARY KEY, name TEXT NOT NULL, created REAL NOT NULL, cwd TEXT NOT NULL)",
        "CREATE TABLE events (run_id TEXT NOT NULL REFERENCES runs (id), seq INTEGER NOT NULL, time REAL NOT NULL, "
        "body TEXT NOT NULL, kind TEXT AS (json_extract(body, '$.kind')), PRIMARY KEY (run_id, seq)) WITHOUT ROWID",
        f"CREATE INDEX lifecycle ON events (run_id, seq) WHERE {IS_LIFECYCLE}",
    ),
    ("CREATE TABLE votes (exchange TEXT PRIMARY KEY, time REAL NOT NULL, body TEXT NOT NULL)",),
    # Steps may have ``probe``, which earlier versions refuse.
    (),
)
VERSION = len(_MIGRATIONS)


class Database:
    """``root``/runs.db. Threads may share it; each process opens its own.

    Raises RunError where the file is damaged or of another version; ResourceError, from every method that writes,
    where it can't be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mutex = threading.RLock()
        path = root / "runs.db"
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            # A commit needs no fsync: it survives a killed process, and the file stays sound after a power cut.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            with self.transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                for statements in _MIGRATIONS[version:]:
                    for statement in statements:
                        db.execute(statement)
                if version < VERSION:
                    db.execute(f"PRAGMA user_version = {VERSION}")
        except (OSError, sqlite3.OperationalError) as error:
            raise self._unwritable(error) from error
        except sqlite3.DatabaseError as error:
            raise RunError(f"{path} is no run store ({error}); move it away, or set LBLLM_HOME elsewhere") from error
        if version > VERSION:
            raise RunError(f"{path} is a run store of version {version}; this program reads up to version {VERSION}")

    def close(self) -> None:
        """Close the file; the database can't be used afterwards."""
        self._db.close()

    def query(self, query: str, *values: object) -> list[tuple]:
        """The rows that a SELECT gives."""
        with self._mutex:
            return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do what is inside as a whole or not at all; other writers wait."""
        with self._mutex:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                # After some errors SQLite has rolled back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, OSError | sqlite3.OperationalError):
                    raise self._unwritable(error) from error
                raise

    def _unwritable(self, error: Exception) -> ResourceError:
        return ResourceError(
            f"the run store {self.root} can't be written ({error}); free some space there, or set LBLLM_HOME elsewhere"
        )
