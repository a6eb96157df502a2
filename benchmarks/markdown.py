"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def head(columns: Sequence[str]) -> str:
    """The first two lines of a table, for one whose rows are printed as they come."""
    return f"{row(columns)}\n{row(['---'] * len(columns))}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A whole table."""
    return "\n".join([head(columns), *map(row, rows)])
