"""Read text files, gzipped or not: by lines, in pieces, or as rows of JSON.

A byte order mark is dropped, and every line end becomes \\n. What can't be read is one CorpusError that names the file
and, where there is one, the line: bytes that are not UTF-8, UTF-16, NUL bytes, damaged gzip data, a line without an
end. A pipe or a device is refused before it is opened.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lbllm.errors import CorpusError

LONGEST_LINE = 64_000_000  # characters
_PIECE = 1 << 20  # characters
_BYTE_ORDER_MARK = "\ufeff"
# The first bytes of files that are not UTF-8, the longer ones first.
_OTHER_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32 text",
    b"\0\0\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_GZIP = b"\x1f\x8b"


def suffix_of(path: Path) -> str:
    """Return the suffix of the format, without .gz, in lower case."""
    return Path(path.stem).suffix.lower() if _is_gzip(path) else path.suffix.lower()


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their \\n; other Unicode line breaks do not end a line. Raises
    CorpusError."""
    with _opened(path) as stream:
        for number in itertools.count(1):
            line = stream.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise CorpusError(
                    f"{path}, line {number}: more than {LONGEST_LINE:,} characters without a line end; cut it"
                )
            _check(path, line, number)
            yield line


def pieces(path: Path) -> Iterator[str]:
    """Yield a text file in pieces of about a million characters, which end anywhere. Raises CorpusError."""
    with _opened(path) as stream:
        number = 1
        while piece := stream.read(_PIECE):
            _check(path, piece, number)
            number += piece.count("\n")
            yield piece


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place, for messages, and the value of each line of a .jsonl file; blank lines are skipped. Raises
    CorpusError."""
    for number, line in enumerate(lines(path), 1):
        text = line.removeprefix(_BYTE_ORDER_MARK)  # of files that were joined
        if not text.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise CorpusError(f"{place}: nested too deeply to be read") from None
        except ValueError as error:  # an integer of thousands of digits
            raise CorpusError(f"{place}: {str(error).partition(';')[0]}") from None
        yield place, row


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorpusError(f"{path} is not a regular file; a pipe, a device or a folder can't be read as one text")
        with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as raw:
            head = raw.peek(4)[:4]
            for mark, name in _OTHER_ENCODINGS.items():
                if head.startswith(mark):
                    raise CorpusError(f"{path} is {name}, not UTF-8; save it as UTF-8")
            if head.startswith(_GZIP):
                raise CorpusError(f"{path} contains gzip data; give it a name that ends in .gz, or unpack it")
            # Undecodable bytes become lone surrogates, so that a message can name their line.
            with io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape") as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} can't be read: {error}. If it is damaged, copy it again") from None


def _check(path: Path, text: str, number: int) -> None:
    """Raise CorpusError for NUL bytes and undecodable bytes; ``number``: of the line where ``text`` begins."""
    if "\0" in text:
        line = number + text.count("\n", 0, text.index("\0"))
        raise CorpusError(
            f"{path}, line {line}: a NUL byte. The file is not text, or UTF-16 without its mark; save it as UTF-8"
        )
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = number + text.count("\n", 0, error.start)
        byte = ord(text[error.start]) - 0xDC00
        raise CorpusError(
            f"{path} is not UTF-8 text: line {line} has the byte 0x{byte:02x} where none can be; save it as UTF-8"
        ) from None


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"
