"""The named endpoints of the showcase, for gradio_client:

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    secret = secrets.token_urlsafe()                        # only for votes: whoever knows it can vote in your name
    job = client.submit("Why is the sky blue?", blind=True, secret=secret, api_name="/ask")
    for seen in job: ...                                    # every change: position in the queue, both answers so far
    client.predict("left", secret, api_name="/vote")        # left, right, tie, both bad; reveals which model was which
    client.predict("Why is the sky blue?", "The sky", api_name="/next")     # what each model expects after "The sky"
    client.predict(secret, api_name="/stop"); client.predict(api_name="/tally"); client.predict(api_name="/about")

A refusal (too long, too often, full queue) is raised there with the message that the page shows. Whoever asks with the
same secret is one visitor, and without a secret a client is one, with the same limits as on the page.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from typing import Any

import gradio as gr
from gradio.events import api

from lbllm.chat.showcase import Seen, Showcase, Visitor
from lbllm.errors import LbllmError
from lbllm.web import harmless

POLL_SECONDS = 0.1
_log = logging.getLogger("lbllm.showcase")


def visitor(request: gr.Request, secret: object) -> Visitor:
    """Return who asks: the session that Gradio gives to every loaded page and every client, and the secret that only
    this visitor has. Raises VisitorError for a secret of a wrong length."""
    return Visitor(str(request.session_hash), secret if isinstance(secret, str) else "")


async def follow(
    showcase: Showcase, request: gr.Request, prompt: str, secret: object, *, blind: bool, seed: int | None = None
) -> AsyncGenerator[Seen]:
    """Ask a question and yield its turn after each change, until it is over.

    If the caller stops reading, the question is stopped. Raises VisitorError.
    """
    address = request.client.host if request.client else ""
    turn = showcase.ask(visitor(request, secret), address, prompt, blind=blind, seed=seed)
    try:
        last = None
        while last is None or last.state != "over":
            seen = showcase.seen(turn)
            if seen != last:
                last = seen
                yield seen
            else:
                await asyncio.sleep(POLL_SECONDS)
    finally:
        showcase.stop(turn)


def add(showcase: Showcase) -> None:
    """Add the endpoints to the page that is being built."""

    async def ask(
        prompt: str, request: gr.Request, blind: bool = False, seed: int | None = None, secret: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """Ask both models. Yields updates until "state" is "over", with these keys: "state" (waiting, answering, over),
        "number" in the order of arrival, "position" in the queue (1 is next), "names" and "answers" of the left and the
        right side, "votable". In a blind turn names and figures are missing until the vote. The same seed gives the
        same answers again. "secret" is any random text of 16 to 200 characters; a vote needs the same one."""
        with _refusals():
            if not isinstance(prompt, str) or not (seed is None or (type(seed) is int and 0 <= seed < 2**31)):
                raise _error("prompt must be a text, and seed must be empty or a whole number from 0 to 2147483647.")
            async with aclosing(follow(showcase, request, prompt, secret, blind=bool(blind), seed=seed)) as turn:
                async for seen in turn:
                    yield _document(seen)

    def next_(prompt: str, request: gr.Request, begun: str = "", secret: str = "") -> list[dict[str, Any]]:
        """What both models find likeliest next in their answer to a question, of which "begun" is written already: for
        the teacher, then for the binarized model, "name" and "tokens", each with "text" and "probability". It counts as
        a question."""
        with _refusals():
            if not isinstance(prompt, str) or not isinstance(begun, str):
                raise _error("prompt and begun must be texts.")
            address = request.client.host if request.client else ""
            found = showcase.next(visitor(request, secret), address, prompt, begun)
            return [
                {"name": name, "tokens": [{"text": one.text, "probability": one.probability} for one in tokens]}
                for name, tokens in zip(showcase.names, found, strict=True)
            ]

    def stop(request: gr.Request, secret: str = "") -> bool:
        """Stop your answers, or leave the queue; return whether there was anything to stop. Give the secret that you
        asked with, if you did."""
        with _refusals():
            turn = showcase.current(visitor(request, secret))
            if turn is None or turn.over:
                return False
            showcase.stop(turn)
            return True

    def vote(choice: str, request: gr.Request, secret: str = "") -> dict[str, Any]:
        """Vote on your last blind question, with the secret that you asked it with: left, right, tie or both bad.
        Returns the turn with names and figures."""
        with _refusals():
            return _document(showcase.seen(showcase.vote(visitor(request, secret), choice)))

    def tally() -> dict[str, Any]:
        """Return the numbers of all blind votes on this pair of models."""
        counted = showcase.tally()
        first, second = showcase.names
        return {first: counted.left, second: counted.right, "tie": counted.tie, "both bad": counted.both_bad}

    def about() -> dict[str, Any]:
        """Return the two models, whether they are loaded, and the limits for one visitor."""
        return {
            "names": list(showcase.names),
            "ready": showcase.ready,
            "completes": showcase.completes,
            "limits": asdict(showcase.limits),
        }

    api(ask, api_name="ask", concurrency_limit=None)
    api(next_, api_name="next", queue=False)
    for endpoint in (stop, vote, tally, about):
        api(endpoint, api_name=endpoint.__name__, queue=False)


def _document(seen: Seen) -> dict[str, Any]:
    document = asdict(seen)
    return document | {"names": list(seen.names) if seen.names else None, "answers": list(document["answers"])}


def _error(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


@contextmanager
def _refusals() -> Iterator[None]:
    """Tell a client about every error in one message; Gradio would write a traceback to the log."""
    try:
        yield
    except gr.Error:
        raise
    except LbllmError as error:
        raise _error(str(error)) from None
    except Exception as error:
        raise unexpected(error) from None


def unexpected(error: Exception) -> gr.Error:
    """Write one line about an unexpected error to the log; return what the visitor sees."""
    _log.error("unexpected error: %s", harmless(f"{type(error).__name__}: {error}"))
    return _error("An unexpected error occurred. Ask again; if it happens again, tell whoever runs this showcase.")
