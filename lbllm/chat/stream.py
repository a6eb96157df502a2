"""Stream a model's answers token by token, with measurements; an answer can be stopped between two tokens.

Generation runs in its own thread; the iterator yields the new text. Each call has its own random generator for sampling
(the Gumbel-max trick on top of greedy decoding). So the same seed gives the same answer on one machine, and the global
random state does not change.
"""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from lbllm.chat.generation import chat_generation
from lbllm.chat.settings import REPETITION_PENALTY, TEMPERATURE, TOP_P
from lbllm.errors import ModelError
from lbllm.json_input import replaced
from lbllm.models.blocks import context_length
from lbllm.models.chat_template import render
from lbllm.models.tokens import check_ids

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Chance:
    """What the model found likely at the place of one token: the token's id, its log-probability (natural logarithm),
    and (id, log-probability) of the likeliest tokens, the likeliest first."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChatPiece:
    """New text and the measurements so far.

    ``first_token_seconds``: from the call to the first token; this includes reading the prompt. ``tokens_per_second``:
    the rate after the first token; 0 before the second token. ``tokens``: all new tokens so far. ``cut``: the limit of
    tokens was reached before the model had ended its answer. ``chances``: of the tokens since the last piece, if they
    were asked for.
    """

    text: str
    tokens_per_second: float
    first_token_seconds: float
    tokens: int
    cut: bool = False
    chances: tuple[Chance, ...] = ()


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, template: bool = True) -> str:
    """Return the prompt for a model: the messages in its chat template, or joined by blank lines.

    ``messages``: {"role": "system" | "user" | "assistant", "content": str} in order. Without a chat template, or with
    ``template`` off, the model continues the text. Raises ModelError if the template refuses the messages or fails.
    """
    if tokenizer.chat_template is None or not template:
        return "\n\n".join(message["content"] for message in messages)
    return render(tokenizer, messages, add_generation_prompt=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, template: bool = True) -> Tensor:
    """Return the token ids (1, T), int64, of ``prompt_text``. Raises ModelError if there are no tokens."""
    text = prompt_text(tokenizer, messages, template=template)
    text = replaced(text)  # as in the texts of a run
    # A chat template already contains the special tokens.
    plain = tokenizer.chat_template is None or not template
    encoded: Any = tokenizer(text, add_special_tokens=plain, return_tensors="pt")
    ids: Tensor = encoded["input_ids"].long()
    if ids.shape[1] == 0:
        raise ModelError("the prompt is empty: it needs at least one token")
    return ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, begun: str, *, template: bool = True) -> Tensor:
    """Return the token ids (1, T), int64, of ``prompt_text`` and of ``begun``, the beginning of the answer to it.
    Raises ModelError if the prompt has no tokens."""
    return torch.cat([prompt_ids(tokenizer, messages, template=template), _begun_ids(tokenizer, begun)], dim=1)


def _begun_ids(tokenizer: PreTrainedTokenizerBase, begun: str) -> Tensor:
    given = tokenizer(replaced(begun), add_special_tokens=False)["input_ids"] if begun else []
    return torch.tensor([given], dtype=torch.long)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    repetition_penalty: float = REPETITION_PENALTY,
    seed: int = 0,
    template: bool = True,
    begun: str = "",
    stop: threading.Event | None = None,
) -> Iterator[ChatPiece]:
    """Yield the model's answer to ``messages`` in pieces; the last piece has the final measurements and maybe no text.

    ``temperature`` 0 is greedy decoding. ``repetition_penalty`` above 1 makes tokens less likely that the answer (not
    the prompt) already contains. ``begun``: the beginning of the answer, which the model goes on from; it is in none of
    the pieces and counts for none of the measurements. With ``template`` off, a chat model continues the plain text.
    Setting ``stop``, or closing the iterator, ends generation after the current token. An answer ends at the context
    length at the latest. The model's own generation settings count where they fit a chat (``chat_generation``). Raises
    ModelError if the prompt fills the context.
    """
    yield from stream_ids(
        model,
        tokenizer,
        prompt_ids(tokenizer, messages, template=template),
        _begun_ids(tokenizer, begun),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )


def stream_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    given: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    chances: int | None = None,
    stop: threading.Event | None = None,
) -> Iterator[ChatPiece]:
    """``stream`` for token ids (1, T), int64: ``prompt`` as of ``prompt_ids``, and ``given``, the beginning of the
    answer.

    ``chances``: the pieces carry the log-probability of each token and of so many likeliest ones. They are those of
    the model itself, before temperature, top-p and penalty; what its own generation settings forbid has none.
    """
    given = torch.empty(1, 0, dtype=torch.long) if given is None else given
    ids = torch.cat([prompt, given], dim=1)
    check_ids(model, tokenizer, ids)
    ids = ids.to(model.device)
    room = room_for(model, ids.shape[1])
    if room <= 0:
        raise ModelError(
            f"the conversation has {ids.shape[1]} tokens, but the model's context holds {context_length(model)}; "
            "start a new conversation or shorten it"
        )
    stop = stop or threading.Event()
    closed = threading.Event()
    pieces: queue.SimpleQueue[ChatPiece | BaseException | None] = queue.SimpleQueue()
    processors = LogitsProcessorList()
    expected = None if chances is None else _Expected(chances)
    if expected is not None:
        processors.append(expected)
    if repetition_penalty > 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty, prompt_ignore_length=prompt.shape[1]))
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(_Gumbel(seed))

    settings = chat_generation(model, tokenizer, min(max_new_tokens, room))
    # generate() fills what the given settings leave open from those of the model: a second view of the same model,
    # with its own attributes, has these alone, and the model keeps its settings for whoever saves it.
    generator: Any = copy.copy(model)
    generator.generation_config = copy.deepcopy(settings)

    def generate() -> None:
        try:
            generator.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                tokenizer=tokenizer,  # for stop strings
                streamer=_Pieces(tokenizer, pieces, settings, given[0].tolist(), expected),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([_Stop(stop, closed)]),
                generation_config=settings,
            )
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=generate, name="lbllm-chat", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        thread.join()


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to log-probabilities, so that their argmax is a sample of the distribution."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return torch.log_softmax(scores.float(), dim=-1) - noise.log()


class _Expected(LogitsProcessor):
    """Keeps what the model expects at the place of the next token."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.row = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.row = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def chance(self, token: int) -> Chance:
        """What was expected where ``token`` was chosen."""
        values, ids = self.row.topk(min(self.count, len(self.row)))
        likeliest = zip(ids.tolist(), values.tolist(), strict=True)
        return Chance(token, float(self.row[token]), tuple(pair for pair in likeliest if pair[1] > -math.inf))


class _Stop(StoppingCriteria):
    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = any(event.is_set() for event in self.events)
        return torch.full((input_ids.shape[0],), stopped, dtype=torch.bool, device=input_ids.device)


class _Pieces(BaseStreamer):
    """Turns tokens into pieces of text. Bytes of an incomplete character wait until it is complete."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pieces: queue.SimpleQueue[ChatPiece | BaseException | None],
        settings: GenerationConfig,
        given: list[int],
        expected: _Expected | None,
    ) -> None:
        self.expected = expected
        self.chances: list[Chance] = []
        self.tokenizer = tokenizer
        self.pieces = pieces
        self.settings: Any = settings
        # Some tokenizers write a token without its space where no token stands before it.
        self.given = given[-4:]
        self.skipped = len(self._text(self.given))
        self.tokens: list[int] | None = None
        self.written = 0
        self.started = time.monotonic()
        self.first = self.latest = self.started

    def put(self, value: Tensor) -> None:
        if self.tokens is None:  # the first call passes the prompt
            self.tokens = []
            return
        self.latest = time.monotonic()
        if not self.tokens:
            self.first = self.latest
        new = value.reshape(-1).tolist()
        self.tokens.extend(new)
        if self.expected is not None:
            self.chances += map(self.expected.chance, new)
        text = self._text(self.given + self.tokens)[self.skipped :]
        complete = text.rstrip("\ufffd")
        if len(complete) > self.written:
            self._write(complete)

    def end(self) -> None:
        tokens = self.tokens or []
        text = self._text(self.given + tokens)[self.skipped :]
        ended = tokens[-1:] == [] or tokens[-1] in (self.settings.eos_token_id or ())
        ended = ended or any(string in text for string in self.settings.stop_strings or ())
        self._write(text, cut=not ended and len(tokens) >= self.settings.max_new_tokens)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _write(self, text: str, *, cut: bool = False) -> None:
        count = len(self.tokens or [])
        since = self.latest - self.first
        speed = (count - 1) / since if count > 1 and since > 0 else 0.0
        first, chances = self.first - self.started, tuple(self.chances)
        self.chances.clear()
        self.pieces.put(ChatPiece(text[self.written :], speed, first, count, cut, chances))
        self.written = max(self.written, len(text))


def room_for(model: PreTrainedModel, tokens: int) -> int:
    """Return how many tokens fit into the model's context after ``tokens``; 0 or less if the context is full.

    If the model's config has no context length, 2^20 tokens are assumed.
    """
    return (context_length(model) or 1 << 20) - tokens
