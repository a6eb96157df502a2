"""The text of an answer while it is written: it ends before the first of its stop sequences, and what may be the
beginning of one is held back until that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbllm.chat.stream import Chance


@dataclass(frozen=True)
class Part:
    """Text that is ready to be sent, and the chances of the tokens that begin in it."""

    text: str
    chances: tuple[Chance, ...] = ()


class StoppedText:
    """Takes an answer piece by piece and gives its parts back.

    ``stops``: texts that are not empty; without any each piece is a part. ``stopped``: one of them was found, and
    nothing follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""
        self._pieces: list[tuple[int, tuple[Chance, ...]]] = []  # where each begins in what is held

    def add(self, text: str, chances: tuple[Chance, ...] = ()) -> Part:
        """Return what is ready after this piece, maybe nothing."""
        self._pieces.append((len(self._held), chances))
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self.stops]
        found = [(place + len(stop), place) for place, stop in places if place >= 0]
        if found:
            self.stopped = True
            # The one that was complete first, however the text is cut into pieces.
            self._held = self._held[: min(found)[1]]
            return self.end()
        return self._take(len(self._held) - max(map(self._begun, self.stops), default=0))

    def end(self) -> Part:
        """Return what is left at the end. Tokens without text there, as the one that ends an answer, are no part."""
        return self._take(len(self._held))

    def _begun(self, stop: str) -> int:
        """How many characters at the end of what is held are the beginning of a stop sequence."""
        longest = min(len(stop) - 1, len(self._held))
        return next((count for count in range(longest, 0, -1) if self._held.endswith(stop[:count])), 0)

    def _take(self, length: int) -> Part:
        chances = tuple(one for place, of_piece in self._pieces if place < length for one in of_piece)
        self._pieces = [(place - length, of_piece) for place, of_piece in self._pieces if place >= length]
        part = Part(self._held[:length], chances)
        self._held = self._held[length:]
        return part
