"""How llama.cpp splits a text with a SentencePiece vocabulary, and the scores it needs to split as a tokenizer.json.

A tokenizer.json of type BPE has a list of merges; a GGUF file has one score for each token instead. llama.cpp merges
those two neighbours first whose union is the token with the highest score, the leftmost ones if several are equal.
``scores`` makes scores of the merges. Both rules split alike where the merges that make a token follow each other in
the list, which is so in every list that was made from a SentencePiece model.

``Splitter`` splits by llama.cpp's rule, so an export can compare before it writes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SPACE = "\u2581"  # what stands for a space in a token
# Tokens that no merge makes are merged last.
_LAST = -1e9


def scores(merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The scores of the tokens that merges make: the earlier, the higher."""
    found: dict[str, float] = {}
    for left, right in merges:
        found.setdefault(left + right, -float(len(found) + 1))
    return found


@dataclass(frozen=True)
class Splitter:
    """``ids``: the numbers of all tokens; ``score``: as ``scores`` returns them; ``added``: the tokens that are found
    in a text before it is split, ``stripped`` those of them that take the white space after them; ``prefix``: whether a
    space is put before a text and after each added token."""

    ids: Mapping[str, int]
    score: Mapping[str, float]
    added: Sequence[str]
    stripped: frozenset[str] = frozenset()
    prefix: bool = False
    _pattern: re.Pattern[str] | None = field(init=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.added, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        object.__setattr__(self, "_pattern", pattern)

    def split(self, text: str) -> list[int]:
        """The numbers of a text's tokens. Raises KeyError if the vocabulary lacks a byte."""
        found: list[int] = []
        place = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if match.start() < place:  # white space that was taken
                continue
            found += self._raw(text[place : match.start()])
            found.append(self.ids[match.group()])
            place = match.end()
            if match.group() in self.stripped:
                place += len(text[place:]) - len(text[place:].lstrip())
        return found + self._raw(text[place:])

    def _raw(self, text: str) -> list[int]:
        """The tokens of a text without added ones."""
        if not text:
            return []
        symbols: list[str] = list(((" " if self.prefix else "") + text).replace(" ", SPACE))
        following = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        waiting: list[tuple[float, int, str, int]] = []

        def look(left: int) -> None:
            right = following[left] if left >= 0 else len(symbols)
            if right < len(symbols) and (union := symbols[left] + symbols[right]) in self.ids:
                heapq.heappush(waiting, (-self.score.get(union, _LAST), left, union, right))

        for left in range(len(symbols)):
            look(left)
        while waiting:
            _, left, union, right = heapq.heappop(waiting)
            if following[left] != right or symbols[left] + symbols[right] != union:
                continue  # one of both has been merged meanwhile
            symbols[left], symbols[right] = union, ""
            following[left] = following[right]
            if following[left] < len(symbols):
                before[following[left]] = left
            look(before[left])
            look(left)
        found: list[int] = []
        for symbol in filter(None, symbols):
            number = self.ids.get(symbol)
            found += [number] if number is not None else [self.ids[byte_token(one)] for one in symbol.encode()]
        return found


def byte_token(byte: int) -> str:
    """The token of a single byte."""
    return f"<0x{byte:02X}>"
