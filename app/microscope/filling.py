"""Maps that fill block by block in the background, as long as somebody looks.

Each map is computed once in this process and kept; sessions that look at the same one share it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import streamlit as st

from lbllm.errors import LbllmError

# Seconds after the last look until the work ends.
PATIENCE = 5.0
Cell = tuple[int, str]
# (block, layer), and for each colour that the work knows its value there.
Step = tuple[Cell, dict[str, float | None]]
# The steps of a block.
Work = Callable[[int], Iterator[Step]]
# One step of one map at a time.
_TURN = threading.Lock()


class _Clicks:
    """How many clicks are being answered: maps wait for them, since they would share the cores."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._open = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._mutex:
            self._open += 1
        try:
            yield
        finally:
            with self._mutex:
                self._open -= 1

    def wait(self, seconds: float) -> None:
        """Wait until none is open, at most so long: a busy server's maps must fill, too."""
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            time.sleep(0.02)


_CLICKS = _Clicks()


def click() -> AbstractContextManager[None]:
    """A context in which the maps wait: for what the user waits for."""
    return _CLICKS.one()


class Filling:
    """One map, or several that come from the same work. ``values[colour][block, layer]``: None where a layer has none.

    ``error``: why the work ended early.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[Cell, float | None]] = {}
        self.blocks: set[int] = set()
        self.done = False
        self.error = ""
        self._seen = 0.0
        self._first: int | None = None
        self._thread: threading.Thread | None = None
        self._mutex = threading.Lock()

    def look(self, work: Work, blocks: int, first: int | None = None) -> None:
        """Say that somebody looks: begins or continues the work on a map of so many ``blocks``, of which ``first`` is
        looked at most."""
        with self._mutex:
            self._seen, self._first = time.monotonic(), first
            if self.done or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._fill, args=(work, blocks), name="lbllm-map", daemon=True)
            self._thread.start()

    def again(self) -> None:
        """Forget an error, so that the next look tries the rest once more."""
        self.error, self.done = "", False

    def _next(self, blocks: int) -> int | None:
        """The block to compute now: the one that is looked at, or the first that is not known."""
        if self._first is not None and self._first not in self.blocks:
            return self._first
        return next((block for block in range(blocks) if block not in self.blocks), None)

    def _fill(self, work: Work, blocks: int) -> None:
        try:
            while (block := self._next(blocks)) is not None:
                steps, found = work(block), True
                while found:
                    if time.monotonic() - self._seen > PATIENCE:
                        return
                    with _TURN:
                        _CLICKS.wait(PATIENCE)
                        found = self._step(steps)
                self.blocks = self.blocks | {block}
            self.done = True
        except LbllmError as error:
            self.error, self.done = str(error), True
        except Exception as error:
            # No caller of this thread could catch it.
            self.error, self.done = f"the map can't be computed ({type(error).__name__}: {error})", True

    def _step(self, steps: Iterator[Step]) -> bool:
        """Take one step of the work on a block; whether there was one."""
        for cell, values in steps:
            for colour, value in values.items():
                self.values.setdefault(colour, {})[cell] = value
            return True
        return False


@st.cache_resource(max_entries=24, show_spinner=False)
def filling(*key: str) -> Filling:
    """The map of this key: of a checkpoint and its teacher, of a colour, of a text."""
    return Filling()
