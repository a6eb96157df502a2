"""Votes on pairs of answers: which of two models answered a prompt better. The run store's file keeps them.

A vote belongs to one exchange, a prompt with two answers. A tally counts models, not sides: it includes the votes on
the same pair with exchanged sides.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lbllm.chat.settings import ChatSettings
from lbllm.runs.database import Database

Choice = Literal["left", "right", "tie", "both bad"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both bad")
_CSV = ("time", "left", "right", "choice", "prompt", "left_answer", "right_answer", "left_settings", "right_settings")


class Vote(BaseModel):
    """A vote. ``exchange``: a unique id; ``time``: seconds since the epoch; ``left``, ``right``: the models' names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    exchange: str
    time: float
    left: str
    right: str
    choice: Choice
    prompt: str
    left_answer: str
    right_answer: str
    left_settings: ChatSettings
    right_settings: ChatSettings


@dataclass(frozen=True)
class Tally:
    """The numbers of votes on one pair of models: for the left, for the right, tie, and both bad."""

    left: int = 0
    right: int = 0
    tie: int = 0
    both_bad: int = 0

    @property
    def total(self) -> int:
        """The number of all votes on the pair."""
        return self.left + self.right + self.tie + self.both_bad


class VoteStore:
    """The votes in a run store's file. Raises ResourceError if the file can't be written."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, vote: Vote) -> None:
        """Store a vote; it replaces an earlier vote on the same exchange."""
        with self._database.transaction() as db:
            values = (vote.exchange, vote.time, vote.model_dump_json())
            db.execute("INSERT OR REPLACE INTO votes VALUES (?, ?, ?)", values)

    def withdraw(self, exchange: str) -> None:
        """Delete the vote on an exchange, if there is one."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM votes WHERE exchange = ?", (exchange,))

    def all(self) -> list[Vote]:
        """Return all votes, the oldest first. One that can't be read is left out, with a warning."""
        votes = []
        for (body,) in self._database.query("SELECT body FROM votes ORDER BY time, exchange"):
            try:
                votes.append(Vote.model_validate_json(body))
            except (ValidationError, TypeError):
                self._database.warn_once(
                    f"{self._database.path}: some votes are left out, because they are damaged or from a later version"
                )
        return votes


def tally(votes: Iterable[Vote], left: str, right: str) -> Tally:
    """Count the votes on the pair ``left`` and ``right``, with those where their sides were exchanged."""
    counts = dict.fromkeys(CHOICES, 0)
    for vote in votes:
        if (vote.left, vote.right) == (left, right):
            counts[vote.choice] += 1
        elif (vote.left, vote.right) == (right, left):
            swapped: dict[Choice, Choice] = {"left": "right", "right": "left"}
            counts[swapped.get(vote.choice, vote.choice)] += 1
    return Tally(counts["left"], counts["right"], counts["tie"], counts["both bad"])


def votes_json(votes: Iterable[Vote]) -> str:
    """Return all votes as a JSON array."""
    return json.dumps([vote.model_dump(mode="json") for vote in votes], indent=2, ensure_ascii=False) + "\n"


def votes_csv(votes: Iterable[Vote]) -> str:
    """Return all votes as CSV for a spreadsheet: a cell that looks like a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_CSV)
    for vote in votes:
        row = vote.model_dump(mode="json")
        cells = (row[key] for key in _CSV)
        writer.writerow([harmless(cell if isinstance(cell, str) else json.dumps(cell)) for cell in cells])
    return out.getvalue()


def harmless(cell: str) -> str:
    """A cell of CSV that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
