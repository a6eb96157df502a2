"""What a change does to a text: the divergence from the teacher, the perplexity, the next token, an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.chat.duel import visible_messages
from lbllm.chat.lens import TOKENS, Candidate, likeliest, pieces_of
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import ChatPiece, Messages, stream
from lbllm.microscope.hybrid import Choice, FirstBlocks, first_change, hybrid, started_from
from lbllm.microscope.pair import Pair, Side, Text
from lbllm.microscope.passes import KEPT, Passes, States, view
from lbllm.models.tokens import embedding_rows

ROWS = 16  # rows of logits that exist at the same time
SHORT = KEPT // 2  # bytes of a text's log-probabilities that are kept


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


def effect(pair: Pair, choice: Choice, text: Text, *, limit: int = TOKENS) -> Effect:
    """Return what a choice does to a text (or its token ids). Keys and values are quantized as ``hybrid`` says.

    The hidden states of both models on the text are kept for the next choice, which costs the blocks from its first
    change on. Raises ModelError for a text with fewer than two tokens, ConfigError for a choice that can't be.
    """
    started = time.monotonic()
    ids, left_out = pair.ids(text, limit)
    if isinstance(choice, FirstBlocks) and choice.count in (0, pair.blocks):
        changed = _loaded_reading(pair, "student" if choice.count else "teacher", ids)
    else:
        start, known = first_change(pair, choice), pair.states(started_from(choice), ids)
        passes = Passes(hybrid(pair, choice), pair.path)
        changed = _reading(pair, ids, passes, known, passes.last(ids, known, start, known.inputs[start]))
    return Effect(
        choice,
        tuple(pieces_of(pair.tokenizer, ids[0].tolist())),
        left_out,
        _loaded_reading(pair, "teacher", ids),
        _loaded_reading(pair, "student", ids),
        changed,
        time.monotonic() - started,
    )


def answer(
    pair: Pair,
    choice: Choice,
    messages: Messages,
    settings: ChatSettings | None = None,
    *,
    stop: threading.Event | None = None,
) -> Iterator[ChatPiece]:
    """Return the hybrid's answer to ``messages`` in pieces, as ``lbllm.chat.stream`` gives it; ``settings`` as in the
    chat. Raises as ``hybrid``, before the first piece."""
    chosen = settings or ChatSettings()
    return stream(
        hybrid(pair, choice),
        pair.tokenizer,
        visible_messages(pair.student, messages, chosen),
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        repetition_penalty=chosen.repetition_penalty,
        seed=chosen.seed,
        template=chosen.template,
        stop=stop,
    )


def _loaded_reading(pair: Pair, side: Side, ids: Tensor) -> Reading:
    def read() -> Reading:
        known = pair.states(side, ids)
        return _reading(pair, ids, Passes(view(pair.model(side)), pair.path), known, known.last)

    return pair.memo.get((side, "reading", *ids[0].tolist()), read, lambda reading: 8 * len(reading.token_kl))


def _reading(pair: Pair, ids: Tensor, passes: Passes, known: States, last: Tensor) -> Reading:
    """What a model makes of token ids (1, T) if its last block gives ``last`` (1, T, hidden)."""
    teacher = _of_teacher(pair, ids)
    kl: list[float] = []
    losses: list[Tensor] = []
    for rows in _parts(ids):
        log_q = torch.log_softmax(passes.logits(ids, known, last, rows), -1)
        kl += token_kl(teacher(rows), log_q)
        targets = ids[0, rows.start + 1 : rows.stop + 1].to(log_q.device)
        losses.append(-log_q[: len(targets)].gather(1, targets[:, None])[:, 0])
    kl = kl[: ids.shape[1] - 1]
    perplexity = float(torch.cat(losses).double().mean().exp())
    return Reading(sum(kl) / len(kl), tuple(kl), perplexity, likeliest(pair.tokenizer, log_q[-1]))


def _parts(ids: Tensor) -> list[slice]:
    """The rows of logits that are computed at once."""
    return [slice(start, min(start + ROWS, ids.shape[1])) for start in range(0, ids.shape[1], ROWS)]


def _of_teacher(pair: Pair, ids: Tensor) -> Callable[[slice], Tensor]:
    """The teacher's log-probabilities (rows, vocabulary) of the rows of token ids (1, T). Those of a short text are
    kept for the next choice."""
    known, passes = pair.states("teacher", ids), Passes(view(pair.teacher.model), pair.path)

    def computed(rows: slice) -> Tensor:
        return torch.log_softmax(passes.logits(ids, known, known.last, rows), -1)

    if 4 * ids.shape[1] * embedding_rows(pair.teacher.model) > SHORT:
        return computed
    kept = pair.memo.get(
        ("log-probabilities", *ids[0].tolist()),
        lambda: torch.cat([computed(rows) for rows in _parts(ids)]),
        lambda found: found.nbytes,
    )
    return lambda rows: kept[rows]


def token_kl(log_p: Tensor, log_q: Tensor) -> list[float]:
    """Return KL(p || q), in nats, of each row of log-probabilities (rows, vocabulary)."""
    # It is never negative, but rounding of nearly equal distributions can give a negative value.
    values: list[float] = (log_p.exp() * (log_p - log_q.to(log_p.device))).sum(-1).clamp_min(0).tolist()
    return values
