"""Two models answer one prompt, at the same time or one after the other; the answers can be read while they grow.

    duel = Duel((Side(left_slot, messages, settings), Side(right_slot, messages, settings)))
    duel.answers[0].text ...            any thread, any time
    duel.stop()                         ends both after the current token

A duel does not depend on a reader: it waits for its models, writes in its own threads and ends by itself.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Literal

from lbllm.chat.pool import Loaded, Slot
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import Messages, stream
from lbllm.errors import LbllmError

AnswerState = Literal["waiting", "reading", "writing", "done", "stopped", "failed"]
_OVER: tuple[AnswerState, ...] = ("done", "stopped", "failed")


@dataclass(frozen=True)
class Answer:
    """The present state of an answer. ``error``: the message for the user if the state is "failed".

    ``tokens_per_second`` and ``first_token_seconds`` as in ``ChatPiece``; 0 until they are known. ``timed``: measured
    while the other side was not running. ``weight_bytes``, ``bpw``, ``packed``: those of the model, as in ``Loaded``.
    ``completes``: the model continues the prompt as plain text. ``cut``: the limit of tokens, if it cut the answer off
    before the model had ended it; else 0.
    """

    state: AnswerState = "waiting"
    text: str = ""
    tokens: int = 0
    tokens_per_second: float = 0.0
    first_token_seconds: float = 0.0
    timed: bool = False
    error: str = ""
    weight_bytes: int = 0
    bpw: float = 0.0
    packed: bool = False
    completes: bool = False
    cut: int = 0

    @property
    def over(self) -> bool:
        """Whether the answer has ended."""
        return self.state in _OVER


@dataclass(frozen=True)
class Side:
    """The model, the conversation so far (the prompt is last) and the settings of one side; ``begun``: the beginning of
    the answer, which the model goes on from."""

    slot: Slot
    messages: Messages
    settings: ChatSettings
    begun: str = ""


def visible_messages(loaded: Loaded, messages: Messages, settings: ChatSettings) -> Messages:
    """Return the messages that the model gets: all of them with a chat template, or only the prompt without one."""
    return messages if loaded.is_chat and settings.template else messages[-1:]


class Duel:
    """The two answers of an exchange. Both begin when both models are loaded; with ``timed``, the right one begins when
    the left one has ended."""

    def __init__(self, sides: tuple[Side, Side], *, timed: bool = False) -> None:
        self.answers: list[Answer] = [Answer(timed=timed), Answer(timed=timed)]
        self.started = time.monotonic()
        self._stop = threading.Event()
        order = [[0, 1]] if timed else [[0], [1]]
        self._threads = [
            threading.Thread(target=self._write, args=(sides, numbers), name="lbllm-duel", daemon=True)
            for numbers in order
        ]
        for thread in self._threads:
            thread.start()

    @property
    def over(self) -> bool:
        """Whether both answers have ended."""
        return all(answer.over for answer in self.answers)

    def stop(self) -> None:
        """End both answers after the current token; their text is kept."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds until both answers have ended; return whether they have."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self.over

    def _write(self, sides: tuple[Side, Side], numbers: list[int]) -> None:
        for number in numbers:
            try:
                self._answer(number, sides)
            except LbllmError as error:
                self._update(number, state="failed", error=str(error))
            except Exception as error:
                # Nobody can catch an exception of this thread, and the page must show a message.
                self._update(number, state="failed", error=f"the model failed ({type(error).__name__}: {error})")

    def _answer(self, number: int, sides: tuple[Side, Side]) -> None:
        side = sides[number]
        # Both begin together: loading the other model would slow down this answer.
        for slot in (side.slot, sides[1 - number].slot):
            while not slot.wait(0.05) and not self._stop.is_set():
                pass
        if self._stop.is_set():
            self._update(number, state="stopped")
            return
        loaded, settings = side.slot.loaded, side.settings
        self._update(
            number,
            state="reading",
            weight_bytes=loaded.weight_bytes,
            bpw=loaded.bpw,
            packed=loaded.packed,
            completes=not (loaded.is_chat and settings.template),
            text=side.begun,
        )
        pieces = stream(
            loaded.model,
            loaded.tokenizer,
            visible_messages(loaded, side.messages, settings),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
            template=settings.template,
            begun=side.begun,
            stop=self._stop,
        )
        for piece in pieces:
            self._update(
                number,
                state="writing",
                text=self.answers[number].text + piece.text,
                tokens=piece.tokens,
                tokens_per_second=piece.tokens_per_second,
                first_token_seconds=piece.first_token_seconds,
                cut=piece.tokens if piece.cut else 0,
            )
        self._update(number, state="stopped" if self._stop.is_set() else "done")

    def _update(self, number: int, **changes: object) -> None:
        # A single assignment replaces the whole answer, so a reader never sees a part of an update.
        self.answers[number] = replace(self.answers[number], **changes)  # type: ignore[arg-type]
