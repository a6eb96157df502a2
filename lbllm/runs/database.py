"""The SQLite file of a run store: names, dates, notes and events of runs, and votes on pairs of answers.

Many processes use it at once. A newer version of the file is refused; an older one is brought to this version.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from lbllm.errors import ResourceError, RunError
from lbllm.files import is_held, locked
from lbllm.runs.repair import is_damage, is_damaged, lenient_text, make_anew, restore, run_folders

_LOG = logging.getLogger(__name__)

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
    # Events may have ``probe`` and ``rows_left_out``, which earlier versions refuse.
    (),
    (
        "CREATE TABLE notes (run_id TEXT PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE, note TEXT NOT NULL, "
        "tags TEXT NOT NULL)",
    ),
)
# The kind of an event whose JSON may be damaged.
KIND = "CASE WHEN json_valid(body) THEN json_extract(body, '$.kind') END"
VERSION = len(_MIGRATIONS)


class Database:
    """``root``/runs.db. Threads may share it; each process opens its own. ``repaired``: a message, if the file was
    damaged and this object made it anew.

    Raises RunError where the file is of another version, or damaged while a worker uses it; ResourceError where it
    can't be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "runs.db"
        self.repaired: str | None = None
        self._mutex = threading.RLock()
        self._told: set[str] = set()
        try:
            root.mkdir(parents=True, exist_ok=True)
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                if not run_folders(root):
                    raise RunError(
                        f"{self.path} is no run store ({error}); move it away, or set LBLLM_HOME elsewhere"
                    ) from error
                self._repair(error)
        except (OSError, sqlite3.DatabaseError) as error:
            raise self._unwritable(error) from error

    def _open(self) -> sqlite3.Connection:
        """Open the file; a new one, and one of an earlier version, is brought to this version."""
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            db.text_factory = lenient_text
            db.execute("PRAGMA journal_mode = WAL")
            # A commit needs no fsync: it survives a killed process, and the file stays sound after a power cut.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise RunError(
                    f"{self.path} is a run store of version {version}; this program reads up to version {VERSION}"
                )
            _make_tables(db)
            added = restore(db, self.root) if version == 0 else 0
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        if added:
            self._say(f"{self.path} was missing or empty. It was made anew from the folders of {added} runs")
        return db

    def close(self) -> None:
        """Close the file; the database can't be used afterwards."""
        self._db.close()

    def query(self, query: str, *values: object) -> list[tuple]:
        """The rows that a SELECT gives. A damaged file is made anew first."""
        with self._mutex:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise ResourceError(f"the run store {self.path} can't be read ({error})") from error
                if not is_damage(error):
                    raise
                self._repair(error)
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
                if isinstance(error, sqlite3.DatabaseError) and is_damage(error):
                    self._repair(error)
                    raise RunError(f"{self.repaired or self.path}. Nothing was written: do it again") from error
                if isinstance(error, OSError | sqlite3.OperationalError):
                    raise self._unwritable(error) from error
                raise

    def warn_once(self, message: str) -> None:
        """Log a warning, unless this object has logged it before."""
        if message not in self._told:
            self._told.add(message)
            _LOG.warning("%s", message)

    def _repair(self, error: sqlite3.Error) -> None:
        """Make the damaged file anew and open it. Raises RunError while a worker uses it, OSError, sqlite3.Error."""
        with contextlib.suppress(AttributeError):  # not open yet
            self._db.close()
        with locked(self.root / "repair.lock"):
            if is_damaged(self.path):  # else another process has just repaired it
                active = [folder.name for folder in run_folders(self.root) if is_held(folder / "alive.lock")]
                if active:
                    self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                    raise RunError(
                        f"{self.path} is damaged ({error}) while run {active[0]} uses it. When that run has ended, the "
                        "next command makes the file anew"
                    )
                self._say(make_anew(self.path, _make_tables))
            self._db = self._open()

    def _say(self, message: str) -> None:
        self.repaired = message
        self.warn_once(message)

    def _unwritable(self, error: Exception) -> ResourceError:
        return ResourceError(
            f"the run store {self.root} can't be written ({error}); free some space there, or set LBLLM_HOME elsewhere"
        )


def _make_tables(db: sqlite3.Connection) -> None:
    """Bring a file, in an open transaction, from its version to this one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    for statements in _MIGRATIONS[version:]:
        for statement in statements:
            db.execute(statement)
    if version < VERSION:
        db.execute(f"PRAGMA user_version = {VERSION}")
