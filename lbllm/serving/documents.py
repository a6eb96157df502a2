"""What the server answers, as OpenAI's documents: completions, their chunks, log-probabilities, models, errors."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from lbllm.chat.stream import Chance
from lbllm.serving.question import RequestError


class Completion:
    """The documents of one answer. ``chunk`` is for a streamed one, ``whole`` for one at once."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def chunk(
        self, delta: dict[str, str], *, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        """A part of the answer: what is new in its message."""
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last part, for ``stream_options``."""
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(
        self, text: str, *, logprobs: dict[str, Any] | None, reason: str, usage: dict[str, int]
    ) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": usage}


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """The numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def logprobs_of(tokenizer: PreTrainedTokenizerBase, chances: Iterable[Chance]) -> dict[str, Any]:
    """The log-probabilities of tokens, with the likeliest at each place."""
    entries = []
    for one in chances:
        likeliest = [_token(tokenizer, token, logprob) for token, logprob in one.likeliest]
        entries.append(_token(tokenizer, one.token, one.logprob) | {"top_logprobs": likeliest})
    return {"content": entries, "refusal": None}


def _token(tokenizer: PreTrainedTokenizerBase, token: int, logprob: float) -> dict[str, Any]:
    text = str(tokenizer.decode([token]))
    # Some tokenizers write a token without its space where no token stands before it.
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    # A part of a character has no text of its own, and so no bytes here.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def model_document(name: str, created: int) -> dict[str, Any]:
    """A model of the list of models; ``created``: when the server began, in seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lbllm"}


def error_document(error: RequestError) -> dict[str, Any]:
    """A refusal, or an error of the server."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
