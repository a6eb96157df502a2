"""The line before a served model: one answer is written at a time, a stated number of requests wait, and whoever goes
away leaves the line or ends their answer."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

from torch import Tensor

from lbllm.chat.pool import Loaded
from lbllm.chat.stream import ChatPiece, prompt_ids, room_for, stream_ids
from lbllm.errors import LbllmError, ModelError
from lbllm.models.blocks import context_length
from lbllm.models.tokens import check_ids
from lbllm.serving.question import Question, RequestError

RETRY_SECONDS = 5


class Line:
    """A model, and who waits for it; used from one event loop.

    ``waiting``: how many requests may wait beside the one that is answered. ``answer_tokens``: the longest answer for a
    request that does not say.
    """

    def __init__(self, loaded: Loaded, *, waiting: int, answer_tokens: int) -> None:
        self.loaded = loaded
        self.waiting = waiting
        self.answer_tokens = answer_tokens
        self.turn = asyncio.Lock()
        self._answers: set[Answer] = set()

    def prompt(self, question: Question) -> Tensor:
        """Return the token ids (1, T), int64, of a question's messages in the model's chat template. Raises
        RequestError if the template refuses them, or if they leave no room for an answer."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        try:
            ids = prompt_ids(tokenizer, question.messages)
            check_ids(model, tokenizer, ids)
        except ModelError as error:
            raise RequestError(str(error), param="messages") from None
        if room_for(model, ids.shape[1]) <= 0:
            raise RequestError(
                f"messages has {ids.shape[1]} tokens, but the model's context holds {context_length(model)} with the "
                "answer; shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        return ids

    def enter(self, question: Question, prompt: Tensor) -> Answer:
        """Take a place in the line; the answer begins when its turn comes. Raises RequestError if the line is full."""
        if len(self._answers) > self.waiting:
            raise RequestError(
                f"one answer is being written and the line is full, with {self.waiting} waiting; ask again in some "
                "seconds",
                code="line_full",
                status=503,
            )
        answer = Answer(self, question, prompt)
        self._answers.add(answer)
        answer.task.add_done_callback(lambda _: self._answers.discard(answer))
        return answer


class Answer:
    """One answer: its pieces as they are written."""

    def __init__(self, line: Line, question: Question, prompt: Tensor) -> None:
        self.question = question
        self.prompt = prompt
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[ChatPiece | Exception | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._begun = False
        self.task = asyncio.create_task(self._work())

    async def pieces(self) -> AsyncIterator[ChatPiece]:
        """Yield the pieces. Raises LbllmError if the model fails."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, LbllmError):
                raise piece
            if isinstance(piece, Exception):
                raise ModelError(f"the model failed ({type(piece).__name__}: {piece})") from piece
            yield piece

    def stop(self) -> None:
        """Leave the line, or end the answer after the current token. The next one begins when this one has ended."""
        self._stop.set()
        if not self._begun:
            self.task.cancel()

    async def _work(self) -> None:
        async with self._line.turn:
            self._begun = True
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        question, loaded = self.question, self._line.loaded
        try:
            for piece in stream_ids(
                loaded.model,
                loaded.tokenizer,
                self.prompt,
                max_new_tokens=question.max_tokens or self._line.answer_tokens,
                temperature=question.temperature,
                top_p=question.top_p,
                repetition_penalty=question.repetition_penalty,
                seed=secrets.randbelow(2**31) if question.seed is None else question.seed,
                chances=question.chances,
                stop=self._stop,
            ):
                self._put(piece)
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, piece: ChatPiece | Exception | None) -> None:
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
