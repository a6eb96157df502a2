"""Which kind of token a loss belongs to, and where in its window: the two ways in which a perplexity is taken apart."""

from __future__ import annotations

import unicodedata
from typing import Literal, get_args

Kind = Literal["word start", "inside a word", "number", "punctuation", "space or line end", "part of a character"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def kind_of(text: str, before: str) -> Kind:
    """Return the kind of a token by the text that it adds and the text just ``before`` it.

    In this order: no text, or a replacement character: part of a character (or a special token). Blank: a space or line
    end. A letter in it: a word, which this token begins unless it begins with a letter and follows one directly. A
    digit: a number. Otherwise punctuation, which includes symbols. Marks that combine with a letter count as letters.
    """
    if not text or "\ufffd" in text:
        return "part of a character"
    if text.isspace():
        return "space or line end"
    if any(map(_is_letter, text)):
        return "inside a word" if _is_letter(text[0]) and _is_letter(before[-1:]) else "word start"
    return "number" if any(character.isnumeric() for character in text) else "punctuation"


def _is_letter(character: str) -> bool:
    """Whether one character, or none, is a letter or a mark that combines with one, as in Hindi."""
    return bool(character) and (character.isalpha() or unicodedata.category(character).startswith("M"))


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Return ranges (first, last) of positions in a window of ``length`` tokens, both included and counted from 1.

    A position is the number of tokens that the model has read when it predicts: 1 to length - 1. Each range is four
    times as long as the one before: 1 to 3, 4 to 15, 16 to 63 and so on. Raises ValueError for less than two tokens.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens predicts none; it needs at least 2")
    found, first = [], 1
    while first < length:
        found.append((first, min(4 * first, length) - 1))
        first *= 4
    return found
