"""Prompts from what a user types, one a line, or from a file: .txt, one a line, or .jsonl, one a row.

A row of .jsonl is a JSON string, or an object with "prompt", or with "messages" whose last entry is the user's.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from lbllm.errors import CorpusError
from lbllm.evaluation.job import LONGEST_PROMPT, MOST_PROMPTS
from lbllm.json_input import replaced, shortened
from lbllm.units import size

LARGEST_FILE = 2_000_000  # bytes
FORMS = "give a .txt file with one prompt a line, or a .jsonl file"


def typed_prompts(text: str) -> tuple[str, ...]:
    """Return the lines that are not blank, without space around them."""
    return tuple(line.strip() for line in replaced(text).splitlines() if line.strip())


def read_prompts(name: str, data: bytes) -> tuple[str, ...]:
    """Return the prompts of a file with this name. Raises CorpusError, with the file, the line and the way out, for a
    file that is too large, not UTF-8 or of another kind, for a row without a prompt, and for a file without prompts."""
    name = shortened(PurePath(name).name, 80)
    suffix = PurePath(name).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise CorpusError(f"{name} is not a file of prompts by its name; {FORMS}")
    if len(data) > LARGEST_FILE:
        raise CorpusError(
            f"{name} has {size(len(data))}, and a file of prompts may have {size(LARGEST_FILE)}; split it, or give "
            "the text as one that perplexity is measured on"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CorpusError(f"{name}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        raise CorpusError(f"{name} has NUL bytes, so it is not text; save it as UTF-8 text")
    rows = text.split("\n")
    if suffix == ".txt":
        found = typed_prompts(text)
    else:
        found = tuple(_row(f"{name}, line {n}", row) for n, row in enumerate(rows, 1) if row.strip())
    if not found:
        raise CorpusError(f"{name} is empty; {FORMS}")
    if len(found) > MOST_PROMPTS:
        raise CorpusError(f"{name} has {len(found):,} prompts, and at most {MOST_PROMPTS:,} are taken; split the file")
    longest = max(found, key=len)
    if len(longest) > LONGEST_PROMPT:
        raise CorpusError(
            f"{name}: prompt {found.index(longest) + 1} has {len(longest):,} characters, and at most "
            f"{LONGEST_PROMPT:,} are allowed; shorten it"
        )
    return found


def _row(place: str, text: str) -> str:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise CorpusError(f"{place}: not JSON; write one JSON value a line, or give a .txt file") from None
    if isinstance(value, dict):
        messages = value.get("messages")
        if "prompt" in value:
            value = value["prompt"]
        elif isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            last = messages[-1]
            value = last.get("content") if last.get("role") == "user" else None
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(
            f'{place}: no prompt; a row is a string, or has "prompt", or "messages" that end with the user\'s'
        )
    return replaced(value.strip())
