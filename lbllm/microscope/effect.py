"""What a change does to a text: the divergence from the teacher, the perplexity, the next token, an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lbllm.chat.lens import TOKENS, Candidate
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import ChatPiece, Messages
from lbllm.microscope.hybrid import Choice
from lbllm.microscope.pair import Pair


@dataclass(frozen=True)
class Reading:
    """What one model makes of a text of T tokens.

    ``kl``: mean KL(teacher || model) over tokens 2 to T, nats per token, and ``token_kl`` (T - 1) of each of them; 0
    for the teacher. ``perplexity``: of these tokens. ``next``: the likeliest tokens after the text, the first the
    likeliest.
    """

    kl: float
    token_kl: tuple[float, ...]
    perplexity: float
    next: tuple[Candidate, ...]


@dataclass(frozen=True)
class Effect:
    """What a choice does to a text. ``pieces`` (T): the text of each token. ``left_out``: tokens at the end of the text
    that were not read. ``seconds``: from the call to the result."""

    choice: Choice
    pieces: tuple[str, ...]
    left_out: int
    teacher: Reading
    student: Reading
    hybrid: Reading
    seconds: float

    @property
    def returned(self) -> float:
        """The share of the student's KL that the choice takes away: 1 all of it, 0 none, negative: it adds to it."""
        return 1 - self.hybrid.kl / self.student.kl if self.student.kl else 0.0


def effect(pair: Pair, choice: Choice, text: str | Sequence[int] | Tensor, *, limit: int = TOKENS) -> Effect:
    """Return what a choice does to a text (or its token ids). Keys and values are quantized as ``hybrid`` says.

    Raises ModelError for a text with fewer than two tokens, ConfigError for a choice that can't be.
    """
    raise NotImplementedError


def answer(
    pair: Pair,
    choice: Choice,
    messages: Messages,
    settings: ChatSettings | None = None,
    *,
    stop: threading.Event | None = None,
) -> Iterator[ChatPiece]:
    """Yield the hybrid's answer to ``messages`` in pieces, as ``lbllm.chat.stream``; ``settings`` as in the chat."""
    raise NotImplementedError
