"""The lens: the expectations of two models for each token of a text, and their divergence. Also: where answers differ.

    for token in lens(teacher.model, student.model, tokenizer, "The sky is blue.", messages=question).tokens: ...

KL(teacher || student) = sum over the vocabulary of p (log p - log q), in nats: it is 0 if both models have the same
distribution. Both models read the same tokens; the expectations for a token depend on all tokens before it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.chat.stream import Messages, answer_ids, prompt_ids, room_for
from lbllm.errors import ModelError
from lbllm.json_input import replaced
from lbllm.models.tokens import check_ids

TOP = 5
TOKENS = 512
ROWS = 128
# Bounds between the lens's colours, in nats per token; few enough that people can tell the colours apart.
STEPS: tuple[float, ...] = (0.1, 0.3, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Candidate:
    """A token that a model expected next, as text, and its probability. ``special``: it is no text, but ends an answer
    or has another meaning of its own, or is a part of a character."""

    text: str
    probability: float
    special: bool = False


@dataclass(frozen=True)
class LensToken:
    """One token of the text. ``kl``: in nats; None, without candidates, if no token comes before it.

    ``text``: the text that the token adds; empty if it is the first part of a character that a later token completes.
    ``teacher_probability`` and ``student_probability``: the probability of this token.
    """

    text: str
    kl: float | None
    teacher: tuple[Candidate, ...]
    student: tuple[Candidate, ...]
    teacher_probability: float
    student_probability: float

    @property
    def step(self) -> int:
        """The number of the token's colour: how many of ``STEPS`` its divergence reaches, 0 to len(STEPS)."""
        return sum(self.kl >= bound for bound in STEPS) if self.kl is not None else 0

    @property
    def agreed(self) -> bool:
        """Whether both models' most likely token is the same."""
        return not self.teacher or self.teacher[0].text == self.student[0].text


@dataclass(frozen=True)
class Lens:
    """The tokens of a text; ``left_out``: the number of tokens at its end that were not analysed."""

    tokens: tuple[LensToken, ...]
    left_out: int

    def begun(self, number: int, text: str) -> str:
        """The text before a token, with ``text`` in the token's place."""
        return "".join(token.text for token in self.tokens[:number]) + text

    @property
    def mean_kl(self) -> float:
        """The mean divergence in nats per token, over the tokens that have one; 0 if no token has one."""
        known = [token.kl for token in self.tokens if token.kl is not None]
        return sum(known) / len(known) if known else 0.0

    @property
    def agreement(self) -> float:
        """How often both models' most likely token is the same, 0 to 1, over the tokens with expectations."""
        known = [token.agreed for token in self.tokens if token.kl is not None]
        return sum(known) / len(known) if known else 1.0


def step_labels() -> list[str]:
    """Return the label of each colour, 0 to len(STEPS): its range in nats."""
    bounds = [f"{bound:g}" for bound in STEPS]
    return [f"below {bounds[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(bounds)), f"{bounds[-1]} and more"]


def same_vocabulary(left: PreTrainedTokenizerBase, right: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers have the same tokens with the same ids."""
    return left is right or left.get_vocab() == right.get_vocab()


@torch.inference_mode()
def lens(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    messages: Messages | None = None,
    template: bool = True,
    limit: int = TOKENS,
) -> Lens:
    """Return both models' expectations for the tokens of ``text``, as an answer to ``messages`` or without a context.

    The models share ``tokenizer``. At most ``limit`` tokens are analysed, and at most as many as both contexts hold.
    Raises ModelError if the vocabularies differ, the text has no token, or ``messages`` fill the context.
    """
    embeddings: list[Any] = [model.get_input_embeddings() for model in (teacher, student)]
    sizes = [embedding.weight.shape[0] for embedding in embeddings]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the lens compares models with the same vocabulary; these have {sizes[0]} and {sizes[1]} tokens. "
            "Choose a student and the teacher it was made from"
        )
    text = replaced(text)
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    own: Tensor = encoded["input_ids"].long()
    check_ids(teacher, tokenizer, own)
    if own.shape[1] == 0:
        raise ModelError("the text is empty: the lens needs at least one token")
    before = prompt_ids(tokenizer, messages, template=template) if messages else own[:, :0]
    room = min(limit, *(room_for(model, before.shape[1]) for model in (teacher, student)))
    if room <= 0:
        raise ModelError(
            f"the conversation before the text has {before.shape[1]} tokens and fills the models' context; "
            "look at the text without the conversation"
        )
    kept = own[:, :room]
    ids = torch.cat([before, kept], dim=1)
    first = max(1, before.shape[1])
    log_p, log_q = (_log_probabilities(model, ids, ids.shape[1] - first) for model in (teacher, student))
    pieces = pieces_of(tokenizer, kept[0].tolist())
    tokens = [LensToken(piece, None, (), (), 0.0, 0.0) for piece in pieces[: first - before.shape[1]]]
    for start in range(0, len(log_p), ROWS):
        p, q = log_p[start : start + ROWS], log_q[start : start + ROWS].to(log_p.device)
        # KL is never negative, but rounding of nearly equal distributions can give a negative value.
        divergences = (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
        for row, kl in enumerate(divergences):
            token = int(ids[0, first + start + row])
            tokens.append(
                LensToken(
                    text=pieces[len(tokens)],
                    kl=kl,
                    teacher=likeliest(tokenizer, p[row]),
                    student=likeliest(tokenizer, q[row]),
                    teacher_probability=float(p[row, token].exp()),
                    student_probability=float(q[row, token].exp()),
                )
            )
    return Lens(tuple(tokens), own.shape[1] - kept.shape[1])


@torch.inference_mode()
def next_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    begun: str = "",
    template: bool = True,
) -> tuple[Candidate, ...]:
    """Return the ``TOP`` tokens that a model finds likeliest next in its answer to ``messages``, of which ``begun`` is
    written already; the probabilities are those of the model itself, before temperature and penalty.

    Raises ModelError for an empty prompt, or one that fills the context.
    """
    ids = answer_ids(tokenizer, messages, begun, template=template)
    check_ids(model, tokenizer, ids)
    if room_for(model, ids.shape[1]) < 0:
        raise ModelError(f"the text has {ids.shape[1]} tokens, more than the model's context holds; shorten it")
    logits = model(input_ids=ids.to(model.device), logits_to_keep=1, use_cache=False).logits[0, -1]
    return likeliest(tokenizer, torch.log_softmax(logits.float(), dim=-1))


def first_difference(left: str, right: str) -> int | None:
    """Return the position, in both texts, at which the first different word begins; None if the texts are equal.

    If one text continues after the other's last word, the position is the length of the shorter text.
    """
    if left == right:
        return None
    shorter, longer = sorted((left, right), key=len)
    position = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(shorter))
    if position == len(shorter) and longer[position].isspace():
        return position
    while position > 0 and not left[position - 1].isspace():
        position -= 1
    return position


def _log_probabilities(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Return log-probabilities (count, vocabulary), float32, at the last ``count`` tokens of ``ids`` (1, T), each from
    the tokens before it."""
    if count == 0:
        return torch.empty(0, 0)
    # The last token is not an input: it has no next token to predict.
    logits = model(input_ids=ids[:, :-1].to(model.device), logits_to_keep=count, use_cache=False).logits[0, -count:]
    return torch.log_softmax(logits.float(), dim=-1)


def likeliest(tokenizer: PreTrainedTokenizerBase, row: Tensor) -> tuple[Candidate, ...]:
    """Return the ``TOP`` likeliest tokens of log-probabilities (vocabulary,), the likeliest first."""
    values, ids = row.topk(min(TOP, len(row)))
    texts = [str(tokenizer.decode([token])) for token in ids.tolist()]
    special = set(tokenizer.all_special_ids)
    return tuple(
        Candidate(text, probability, token in special or not text or "\ufffd" in text)
        for text, token, probability in zip(texts, ids.tolist(), values.exp().tolist(), strict=True)
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text that each token adds. A character of several tokens belongs to the token that completes it."""
    pieces = []
    start = 0
    for end in range(1, len(ids) + 1):
        # Decode only the tokens after the last complete character; decoding all tokens each time would be quadratic.
        text = str(tokenizer.decode(ids[max(0, start - 1) : end], clean_up_tokenization_spaces=False))
        before = str(tokenizer.decode(ids[max(0, start - 1) : start], clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start = end
    return pieces
