"""The server: OpenAI's chat completions, whole or as a stream, and its list of models, for one model.

A request is checked before it takes a place in the line, so its refusal has a status of its own; what fails later in a
stream is an event ``error``. If the client goes away, its answer ends after the current token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from lbllm.chat.generation import chat_generation
from lbllm.chat.stream import Chance
from lbllm.errors import LbllmError
from lbllm.json_input import LARGEST, decode_object
from lbllm.serving.documents import Completion, error_document, logprobs_of, model_document, usage_of
from lbllm.serving.line import RETRY_SECONDS, Answer, Line
from lbllm.serving.question import RequestError, read_question
from lbllm.serving.text import Part, StoppedText
from lbllm.web import Gate, harmless

_log = logging.getLogger(__name__)


def build(line: Line, name: str, names: frozenset[str]) -> Starlette:
    """Return the application. ``name``: of the model, as requests give it; ``names``: of the host (``names_of``)."""
    server = _Server(line, name)
    routes = [
        Route("/v1/chat/completions", server.complete, methods=["POST"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.model, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, names=names)],
        exception_handlers={RequestError: _refuse, HTTPException: _not_served},
    )


class _Server:
    def __init__(self, line: Line, name: str) -> None:
        self.line = line
        self.name = name
        self.document = model_document(name, int(time.time()))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.document]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self.document)

    async def complete(self, request: Request) -> Response:
        question = read_question(await _body(request))
        self._check_name(question.model)
        prompt = await asyncio.to_thread(self.line.prompt, question)
        answer = self.line.enter(question, prompt)
        if question.stream:
            return _Events(self._events(answer))
        return await _while_connected(request, self._whole(answer), answer)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise RequestError(
                f"model is {name[:100]!r}, which is not served here; give {self.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def _whole(self, answer: Answer) -> Response:
        told, text = _Told(), ""
        chances: list[Chance] = []
        try:
            async for part in self._parts(answer, told):
                text += part.text
                chances += part.chances
        except LbllmError as error:
            raise _failed(error) from None
        return JSONResponse(
            Completion(self.name).whole(
                text,
                logprobs=None if answer.question.chances is None else logprobs_of(self._tokenizer, chances),
                reason=told.reason,
                usage=usage_of(answer.prompt.shape[1], told.tokens),
            )
        )

    async def _events(self, answer: Answer) -> AsyncGenerator[str]:
        told, documents = _Told(), Completion(self.name)
        try:
            yield _event(documents.chunk({"role": "assistant", "content": ""}))
            async for part in self._parts(answer, told):
                if part.text or part.chances:
                    asked = answer.question.chances is not None
                    logprobs = logprobs_of(self._tokenizer, part.chances) if asked else None
                    yield _event(documents.chunk({"content": part.text}, logprobs=logprobs))
            yield _event(documents.chunk({}, reason=told.reason))
            if answer.question.usage_at_end:
                yield _event(documents.usage_chunk(usage_of(answer.prompt.shape[1], told.tokens)))
            yield "data: [DONE]\n\n"
        except LbllmError as error:
            yield _event(error_document(_failed(error)))
        finally:
            answer.stop()

    @property
    def _tokenizer(self) -> Any:
        return self.line.loaded.tokenizer

    async def _parts(self, answer: Answer, told: _Told) -> AsyncIterator[Part]:
        """Yield the parts of an answer; its end is in ``told`` afterwards."""
        own = chat_generation(self.line.loaded.model, self._tokenizer, 1).stop_strings or ()
        text = StoppedText([*answer.question.stop, *([own] if isinstance(own, str) else own)])
        async for piece in answer.pieces():
            told.tokens = piece.tokens
            told.reason = "length" if piece.cut else "stop"
            yield text.add(piece.text, piece.chances)
            if text.stopped:
                answer.stop()
                told.reason = "stop"
                return
        yield text.end()


class _Told:
    """What is known of an answer at its end."""

    def __init__(self) -> None:
        self.reason = "stop"
        self.tokens = 0


class _Events(StreamingResponse):
    """Server-sent events whose source is closed as soon as the client is gone."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response], answer: Answer) -> Response:
    """Return the response of ``work``; if the client goes away before, the answer ends."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        answer.stop()
        for task in tasks:
            task.cancel()


async def _body(request: Request) -> Mapping[str, Any]:
    """The JSON object of a request. What is too large is read all the same, and dropped: most clients look for an
    answer only when they have sent everything."""
    body, size = b"", 0
    async for part in request.stream():
        size += len(part)
        body = body + part if size <= LARGEST else b""
    if size > LARGEST:
        raise RequestError(f"the request has {size:,} bytes; {LARGEST:,} are allowed. Shorten its messages", status=413)
    try:
        return decode_object(body)
    except ValueError as error:
        raise RequestError(f"the body {error}; send a JSON object with model and messages") from None


def _failed(error: LbllmError) -> RequestError:
    _log.warning("an answer failed: %s", harmless(str(error)))
    return RequestError(str(error), status=500)


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"retry-after": str(RETRY_SECONDS)} if error.status == 503 else None
    return JSONResponse(error_document(error), status_code=error.status, headers=headers)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {harmless(request.url.path)} is not served here; use POST /v1/chat/completions, "
        "GET /v1/models or GET /health"
    )
    return JSONResponse(error_document(RequestError(message)), status_code=error.status_code, headers=error.headers)
