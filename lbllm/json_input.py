"""JSON that comes from outside: decoded within limits, and shown in messages without flooding them."""

from __future__ import annotations

import json
import reprlib
from typing import Any

LARGEST = 1_000_000  # bytes
DEEPEST = 8  # levels of objects and lists


def decode_object(data: str | bytes, *, largest: int = LARGEST, deepest: int = DEEPEST) -> dict[str, Any]:
    """The JSON object in ``data``. Raises ValueError for anything else, and for an object that is larger or nested more
    deeply than is allowed; its message continues a sentence that begins with the source."""
    if len(data) > largest:
        raise ValueError(f"has more than {largest / 1e6:.0f} MB")
    try:
        document = json.loads(data.removeprefix("\ufeff") if isinstance(data, str) else data)
    except RecursionError:
        raise ValueError(_too_deep(deepest)) from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({str(error).partition(';')[0]})") from None
    if not isinstance(document, dict):
        raise ValueError(f"holds a {type(document).__name__}; a JSON object is needed")
    check_depth(document, deepest)
    return document


def check_depth(document: object, deepest: int = DEEPEST) -> None:
    """Raise ValueError for a document that is nested more than ``deepest`` levels deep. It needs no recursion."""
    level = [document]
    for _ in range(deepest):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(_too_deep(deepest))


def _too_deep(deepest: int) -> str:
    return f"is nested more than {deepest} levels deep"


def shown(value: object) -> str:
    """A value as messages show it; a long one is cut."""
    try:
        return shortened(reprlib.repr(value) if isinstance(value, dict | list | tuple) else repr(value))
    except ValueError:
        return "an integer of thousands of digits"


def replaced(text: str) -> str:
    """The text with a question mark for each lone surrogate, which no tokenizer takes and no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def shortened(text: str, limit: int = 200) -> str:
    """The text without lone surrogates, which can be neither printed nor stored; a long one is cut."""
    text = replaced(text[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."
