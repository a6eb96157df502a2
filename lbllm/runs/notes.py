"""Notes and tags of runs: what people write about them. The run store's file keeps them.

write_note(store, run_id, "the first with small groups")
write_tags(store, run_id, ["paper", "g16"])
notes(store)[run_id].tags
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lbllm.errors import RunError
from lbllm.json_input import replaced
from lbllm.runs.store import RunStore

LONGEST_NOTE = 2_000  # characters
LONGEST_TAG = 40
MOST_TAGS = 20  # of one run


@dataclass(frozen=True)
class Note:
    """What is written about a run; ``tags`` in alphabetical order."""

    text: str = ""
    tags: tuple[str, ...] = ()


def notes(store: RunStore) -> dict[str, Note]:
    """The notes by the ids of their runs; runs without one are left out."""
    return {run_id: _note(store, *row) for run_id, *row in store.database.query("SELECT run_id, note, tags FROM notes")}


def note_of(store: RunStore, run_id: str) -> Note:
    """The note of a run; an empty one if it has none."""
    rows = store.database.query("SELECT note, tags FROM notes WHERE run_id = ?", run_id)
    return _note(store, *rows[0]) if rows else Note()


def write_note(store: RunStore, run_id: str, text: str) -> Note:
    """Replace a run's note; an empty text removes it. Raises RunError for an unknown run or a note that is too long."""
    text = replaced(text).strip()
    if len(text) > LONGEST_NOTE:
        raise RunError(f"run {run_id}: a note has at most {LONGEST_NOTE:,} characters, and this one has {len(text):,}")
    return _put(store, run_id, "note", text)


def write_tags(store: RunStore, run_id: str, tags: Iterable[str]) -> Note:
    """Replace a run's tags; of tags that differ in capital letters only, the first is kept.

    Raises RunError for an unknown run, and for a tag that is empty, too long or has a comma.
    """
    kept: dict[str, str] = {}
    for tag in (_checked(run_id, tag) for tag in tags):
        kept.setdefault(tag.casefold(), tag)
    if len(kept) > MOST_TAGS:
        raise RunError(f"run {run_id}: a run has at most {MOST_TAGS} tags, and these are {len(kept)}")
    return _put(store, run_id, "tags", json.dumps([kept[tag] for tag in sorted(kept)], ensure_ascii=False))


def all_tags(written: Iterable[Note]) -> list[str]:
    """Every tag in use, in alphabetical order; of those that differ in capital letters only, one."""
    used = {tag.casefold(): tag for tag in sorted({tag for note in written for tag in note.tags})}
    return [used[tag] for tag in sorted(used)]


def _checked(run_id: str, tag: str) -> str:
    tag = " ".join(replaced(tag).split())
    if not tag:
        raise RunError(f"run {run_id}: a tag needs at least one letter or digit")
    if "," in tag:
        raise RunError(f"run {run_id}: tag {tag[:LONGEST_TAG]!r} has a comma, which separates tags; write two tags")
    if len(tag) > LONGEST_TAG:
        raise RunError(f"run {run_id}: tag {tag[:LONGEST_TAG]!r}... is longer than {LONGEST_TAG} characters")
    return tag


def _put(store: RunStore, run_id: str, column: Literal["note", "tags"], value: str) -> Note:
    store.get(run_id)
    with store.database.transaction() as db:
        db.execute("INSERT OR IGNORE INTO notes (run_id, note, tags) VALUES (?, '', '[]')", (run_id,))
        db.execute(f"UPDATE notes SET {column} = ? WHERE run_id = ?", (value, run_id))
    return note_of(store, run_id)


def _note(store: RunStore, text: object, tags: object) -> Note:
    """The note of a row; what is damaged in it is left out, with a warning."""
    try:
        listed = json.loads(tags) if isinstance(tags, str) else None
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(text, str) or not isinstance(listed, list) or not all(isinstance(tag, str) for tag in listed):
        store.database.warn_once(f"{store.database.path}: some notes of runs are left out, because they are damaged")
        return Note(text if isinstance(text, str) else "")
    return Note(text, tuple(listed))
