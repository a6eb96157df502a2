"""Read documents from .txt and .jsonl files, gzipped or not, and from folders of them.

A document is a text or a conversation. A .jsonl row is {"text": ...} or {"messages": [{"role", "content"}, ...]}.
A .txt file is one text. Long texts are cut at paragraph or line ends into sections of at most ``SECTION`` characters.
Each section is a document, so even one long file has enough documents for all parts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbllm.errors import CorpusError

Part = Literal["train", "tune", "heldout"]
SHARES: dict[Part, float] = {"train": 0.90, "tune": 0.05, "heldout": 0.05}

SECTION = 16_000
TEXT_SUFFIXES = (".txt", ".raw", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text, or a conversation if ``messages`` is not empty.

    ``place`` is the source, for error messages. ``templated`` marks a text that already contains the chat markup of its
    tokenizer, so that no separator is added after it.
    """

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    place: str = ""
    templated: bool = False

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the content only; white space around a text is ignored."""
        content = json.dumps(self.messages) if self.messages else self.text.strip()
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()

    @property
    def part(self) -> Part:
        """The part, derived from the digest in the proportions ``SHARES``: equal contents are always in one part."""
        place = int.from_bytes(self.digest[:8], "big") / 2**64
        if place < SHARES["train"]:
            return "train"
        return "tune" if place < SHARES["train"] + SHARES["tune"] else "heldout"

    @property
    def size(self) -> int:
        """The number of characters."""
        return len(self.text) + sum(len(content) for _, content in self.messages)


def sections(text: str, place: str = "", limit: int = SECTION) -> Iterator[Document]:
    """Cut a text into documents of at most ``limit`` characters, at paragraph ends, or line ends, or anywhere."""
    while len(text) > limit:
        end = text.rfind("\n\n", 1, limit - 1) + 2
        if end < limit // 2:
            end = max(end, text.rfind("\n", 1, limit) + 1)
        if end < limit // 2:
            end = limit
        yield Document(text[:end], place=place)
        text = text[end:]
    if text.strip():
        yield Document(text, place=place)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file, or of all files under a folder in the order of their names. Raises CorpusError."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
        if not files:
            raise CorpusError(
                f"folder {path} contains no text: no file ends in {', '.join(SUFFIXES)} (or these with .gz)"
            )
        for file in files:
            yield from read_documents(file)
        return
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        kind = f"{path.suffix} file" if path.suffix else "file without a suffix"
        raise CorpusError(f"{path}: can't read text from a {kind}; use one of {', '.join(SUFFIXES)}")
    if suffix == ".jsonl":
        yield from _rows(path)
    else:
        yield from sections(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return a whole text file, unzipped, or the texts of a .jsonl file, joined by blank lines. Raises CorpusError."""
    if _suffix(path) == ".jsonl":
        documents = _rows(path)
        return "\n\n".join(row.text or "\n\n".join(content for _, content in row.messages) for row in documents)
    return "".join(_lines(path))


def parse_row(row: object, place: str) -> Iterator[Document]:
    """Yield the documents of one decoded .jsonl row. Raises CorpusError."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        yield from sections(row["text"], place)
        return
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f'{place}: expected {{"text": ...}} or {{"messages": [...]}}, found {keys}')
    turns = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise CorpusError(f'{place}: every message needs "role" and "content" as strings')
        turns.append((role, content))
    if turns:
        yield Document(messages=tuple(turns), place=place)


def wikitext_rows(lines: Iterable[str]) -> list[str]:
    """Return the rows of the hub's dataset Salesforce/wikitext for a file's lines: blank lines become empty rows."""
    return [line if line.strip() else "" for line in lines]


def wikitext_articles(rows: Iterable[str], place: str = "") -> Iterator[Document]:
    """Yield the articles of WikiText rows (lines with their line ends), without empty rows; long ones in sections."""
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=\n]+ = \n?", row) and article:
            yield from sections("".join(article), place)
            article = []
        if row.strip():
            article.append(row if row.endswith("\n") else row + "\n")
    yield from sections("".join(article), place)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file with their line ends. Raises CorpusError."""
    return list(_lines(path))


def _rows(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        yield from parse_row(row, place)


def _lines(path: Path) -> Iterator[str]:
    """Yield lines with their \\n; other Unicode line breaks do not end a line."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: byte {error.start} of a block can't be decoded") from None
    except (OSError, EOFError) as error:
        raise CorpusError(f"{path} can't be read: {error}") from None


def _suffix(path: Path) -> str:
    """Return the suffix of the format, without .gz, in lower case."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
