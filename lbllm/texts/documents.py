"""Read documents from .txt and .jsonl files, gzipped or not, and from folders of them.

A document is a text or a conversation. A .jsonl row is {"text": ...} or {"messages": [{"role", "content"}, ...]}.
A .txt file is one text. Long texts are cut at paragraph or line ends into sections of at most ``SECTION`` characters.
Each section is a document, so even one long file has enough documents for all parts. A row without text becomes an
empty document, so that whoever reads can count the rows that are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lbllm.errors import CorpusError
from lbllm.json_input import replaced
from lbllm.texts.reading import json_rows, lines, pieces, suffix_of

Part = Literal["train", "tune", "heldout"]
SHARES: dict[Part, float] = {"train": 0.90, "tune": 0.05, "heldout": 0.05}

SECTION = 16_000
TEXT_SUFFIXES = (".txt", ".raw", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text, or a conversation if ``messages`` is not empty; a row without text has neither.

    ``place`` is the source, for error messages. ``templated`` marks a text that already contains the chat markup of its
    tokenizer, so that no separator is added after it.
    """

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    place: str = ""
    templated: bool = False

    @property
    def empty(self) -> bool:
        """Whether this stands for a row without text."""
        return not self.text and not self.messages

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


def sections(text: str | Iterable[str], place: str = "", limit: int = SECTION) -> Iterator[Document]:
    """Cut a text into documents of at most ``limit`` characters, at paragraph ends, or line ends, or anywhere. The text
    can come in pieces; each is looked at once, so the time grows with the length of the text."""
    rest = ""
    for piece in (text,) if isinstance(text, str) else text:
        rest += piece
        start = 0
        while len(rest) - start > limit:
            end = rest.rfind("\n\n", start + 1, start + limit - 1) + 2
            if end < start + limit // 2:
                end = max(end, rest.rfind("\n", start + 1, start + limit) + 1)
            if end < start + limit // 2:
                end = start + limit
            yield Document(rest[start:end], place=place)
            start = end
        rest = rest[start:]
    if rest.strip():
        yield Document(rest, place=place)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file, or of all files under a folder in the order of their names. Raises CorpusError.

    Files of other formats in a folder are left out, and so are hidden ones, which file managers and editors write.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_visible_text(file, path))
        if not files:
            raise CorpusError(
                f"folder {path} contains no text: no file ends in {', '.join(SUFFIXES)} (or these with .gz)"
            )
        for file in files:
            yield from read_documents(file)
    elif _text_suffix(path) == ".jsonl":
        for place, row in json_rows(path):
            yield from parse_row(row, place)
    else:
        yield from sections(pieces(path), str(path))


@dataclass(frozen=True)
class Beginning:
    """The beginning of a file: its text, whether that is all, and how many rows without text were left out."""

    text: str
    whole: bool
    left_out: int


def read_beginning(path: Path, characters: int) -> Beginning:
    """Read at least ``characters`` of a file of any format that ``read_documents`` takes, or all; the texts of rows are
    joined by blank lines. Raises CorpusError."""
    found: list[str] = []
    left_out = size = 0
    joint = ""
    if _text_suffix(path) == ".jsonl":
        joint = "\n\n"
        source: Iterable[Document] = read_documents(path)
    else:
        source = (Document(piece) for piece in pieces(path))
    for document in source:
        if document.empty:
            left_out += 1
            continue
        if size >= characters:
            return Beginning(joint.join(found), False, left_out)
        found.append(document.text or "\n\n".join(content for _, content in document.messages))
        size += document.size
    return Beginning(joint.join(found), True, left_out)


def check_format(path: Path) -> None:
    """Raise CorpusError unless the name of a file is that of a format that can be read."""
    _text_suffix(path)


def parse_row(row: object, place: str) -> Iterator[Document]:
    """Yield the documents of one decoded .jsonl row, an empty one for a row without text. Raises CorpusError."""
    text, messages = (row.get("text"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if isinstance(text, str):
        cut = list(sections(text.removeprefix("\ufeff"), place))
        yield from cut or [Document(place=place)]
    elif isinstance(messages, list) and text is None:
        yield _conversation(messages, place)
    elif isinstance(row, dict) and text is None and messages is None and row.keys() & {"text", "messages"}:
        yield Document(place=place)
    else:
        raise CorpusError(f'{place}: expected {{"text": ...}} or {{"messages": [...]}}, found {_found(row)}')


def _conversation(messages: list[Any], place: str) -> Document:
    """The document of a row's messages; an empty one where a message has no content, as calls of tools have none."""
    turns = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(role, str) and content is None and message.keys() & {"content", "tool_calls", "function_call"}:
            return Document(place=place)
        if not isinstance(role, str) or not isinstance(content, str):
            raise CorpusError(f'{place}: every message needs "role" and "content" as strings')
        turns.append((role, content))
    if not any(content.strip() for _, content in turns):
        return Document(place=place)
    return Document(messages=tuple(turns), place=place)


def _found(row: object) -> str:
    """What a row that can't be read is, in a few words."""
    if not isinstance(row, dict):
        return _JSON_NAMES.get(type(row), type(row).__name__)
    for key, wanted in (("text", str), ("messages", list)):
        if row.get(key) is not None and not isinstance(row[key], wanted):
            return f'"{key}" as {_JSON_NAMES.get(type(row[key]), "another type")}'
    keys = replaced(", ".join(sorted(map(str, row))))
    return (keys if len(keys) <= 80 else f"{keys[:80]}...") or "an empty object"


_JSON_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "true or false",
    type(None): "null",
}


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
    return list(lines(path))


def _text_suffix(path: Path) -> str:
    """The suffix of a file's format. Raises CorpusError for a format that can't be read."""
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        kind = f"{path.suffix} file" if path.suffix else "file without a suffix"
        raise CorpusError(f"{path}: can't read text from a {kind}; use one of {', '.join(SUFFIXES)}")
    return suffix


def _is_visible_text(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and suffix_of(file) in SUFFIXES and file.is_file()
