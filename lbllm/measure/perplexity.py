"""Measure perplexity, and the divergence of a student from its teacher.

The protocol is the usual one for perplexity with window length T. The text is cut into consecutive windows of T tokens
without overlap, and each window is scored separately: its tokens 2 to T are predicted from the tokens before them in
the window. The perplexity is exp of the mean negative log-likelihood (in nats) over all predicted tokens.

The logits of one window are the largest tensor here (2,048 x 49,152 in float32: 400 MB). Each model's logits exist
once; derived values are computed for a few rows at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.machine import float32_products
from lbllm.models.streamed import BlockModel

ROWS = 256
BATCH_TOKENS = 2048
# The perplexities that show a run's progress use few tokens, because they take time from the run.
HELD_OUT_TOKENS = 2_048

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, the number of predicted ``tokens``, n (T - 1), and the time in seconds."""

    perplexity: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Divergence:
    """``kl``: mean KL(teacher || student), nats per token; ``top1_agreement``: how often both models' most likely next
    token is the same, 0 to 1."""

    kl: float
    top1_agreement: float
    teacher_perplexity: float
    student_perplexity: float
    tokens: int


@dataclass(frozen=True)
class TokenLosses:
    """Of each predicted token of windows (n, T): float32 tensors (n, T - 1) on the CPU.

    ``nll``: in nats; ``kl``: KL(teacher || model), in nats, and ``agreed``: 1 where both models' most likely next token
    is the same, else 0. Without a teacher the last two are None.
    """

    nll: Tensor
    kl: Tensor | None = None
    agreed: Tensor | None = None


def token_losses(
    model: PreTrainedModel, batch: Tensor, teacher_logits: Tensor | None = None
) -> tuple[TokenLosses, Tensor]:
    """Return the losses of ``model`` on windows of token ids (n, T), T at least 2, and its logits (n (T - 1), V).

    ``teacher_logits``: what this function gave for the teacher and the same windows. Pass ``windows_at_once`` windows.
    """
    _check(batch)
    logits, targets = _predictions(model, batch)
    nll, kl, agreed = [], [], []
    for start in range(0, len(logits), ROWS):
        part = slice(start, start + ROWS)
        log_q = _log_softmax(logits[part])
        nll.append(-log_q.gather(1, targets[part, None])[:, 0].cpu())
        if teacher_logits is not None:
            log_p = _log_softmax(teacher_logits[part])
            log_q = log_q.to(log_p.device)
            agreed.append((log_p.argmax(-1) == log_q.argmax(-1)).float().cpu())
            kl.append(log_q.sub_(log_p).neg_().mul_(log_p.exp_()).sum(-1).cpu())
    shape = (batch.shape[0], batch.shape[1] - 1)
    if teacher_logits is None:
        return TokenLosses(torch.cat(nll).view(shape)), logits
    return TokenLosses(torch.cat(nll).view(shape), torch.cat(kl).view(shape), torch.cat(agreed).view(shape)), logits


def perplexity(model: PreTrainedModel, sequences: Tensor, *, on_progress: Progress | None = None) -> Perplexity:
    """Return the perplexity of ``model`` on windows of token ids (n, T), T at least 2.

    ``on_progress(done, total)`` is called after each batch, in windows. If the model's logits are NaN, so is the
    perplexity. Raises ValueError for another shape.
    """
    _check(sequences)
    started = time.monotonic()
    total = 0.0
    done = 0
    for batch in sequences.split(windows_at_once(sequences)):
        logits, targets = _predictions(model, batch)
        for rows, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
            total += _nll(_log_softmax(rows), wanted)
        del logits, rows
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(sequences))
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    return Perplexity(_exp(total / tokens), tokens, time.monotonic() - started)


@torch.no_grad()
@float32_products()
def block_perplexity(model: BlockModel, sequences: Tensor, *, between: Callable[[], None] = lambda: None) -> float:
    """Return the perplexity of a model that is computed block by block on windows of token ids (n, T), T at least 2.

    Of a window's logits only a part of the vocabulary exists at a time. ``between`` is called before each window.
    """
    _check(sequences)
    total = 0.0
    for batch in sequences.split(windows_at_once(sequences)):
        between()
        for window, hidden in zip(batch.split(1), model.last_hidden(batch).split(1), strict=True):
            between()
            targets = window[0, 1:].to(hidden.device)
            mass = hidden.new_full(targets.shape, -torch.inf)
            chosen = torch.zeros_like(mass)
            for start, logits in model.logits(window, hidden):
                rows = logits[0, :-1].float()
                mass = torch.logaddexp(mass, rows.logsumexp(-1))
                here = (targets >= start) & (targets < start + rows.shape[-1])
                column = (targets - start).clamp(0, rows.shape[-1] - 1)
                chosen = torch.where(here, rows.gather(-1, column[:, None])[:, 0], chosen)
            total += float((mass - chosen).sum(dtype=torch.float64))
    return _exp(total / (sequences.shape[0] * (sequences.shape[1] - 1)))


def divergence(
    teacher_model: PreTrainedModel,
    student_model: PreTrainedModel,
    sequences: Tensor,
    *,
    on_progress: Progress | None = None,
) -> Divergence:
    """Return both perplexities, KL(teacher || student) and top-1 agreement over the predicted tokens of windows (n, T).

    The models may be on different devices; they must share a vocabulary.
    """
    return divergences(teacher_model, [student_model], sequences, on_progress=on_progress)[0]


def divergences(
    teacher_model: PreTrainedModel,
    student_models: Sequence[PreTrainedModel],
    sequences: Tensor,
    *,
    on_progress: Progress | None = None,
) -> list[Divergence]:
    """Return ``divergence`` for several students; the teacher's predictions are computed once for all of them."""
    _check(sequences)
    teacher_nll, done = 0.0, 0
    sums = [_Sums() for _ in student_models]
    for batch in sequences.split(windows_at_once(sequences)):
        teacher_logits, targets = _predictions(teacher_model, batch)
        for rows, wanted in zip(teacher_logits.split(ROWS), targets.split(ROWS), strict=True):
            teacher_nll += _nll(_log_softmax(rows), wanted)
        for student, total in zip(student_models, sums, strict=True):
            total.add(teacher_logits, _predictions(student, batch)[0], targets)
        del teacher_logits, rows
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(sequences))
    tokens = sequences.shape[0] * (sequences.shape[1] - 1)
    teacher_perplexity = _exp(teacher_nll / tokens)
    return [
        Divergence(
            kl=total.kl / tokens,
            top1_agreement=total.agreed / tokens,
            teacher_perplexity=teacher_perplexity,
            student_perplexity=_exp(total.nll / tokens),
            tokens=tokens,
        )
        for total in sums
    ]


@dataclass
class _Sums:
    """One student's sums over all predicted tokens so far."""

    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, teacher_logits: Tensor, student_logits: Tensor, targets: Tensor) -> None:
        """Add logits (rows, vocabulary) of both models and the rows' targets."""
        parts = zip(teacher_logits.split(ROWS), student_logits.split(ROWS), targets.split(ROWS), strict=True)
        for teacher_rows, student_rows, wanted in parts:
            log_p = _log_softmax(teacher_rows)
            log_q = _log_softmax(student_rows.to(teacher_rows.device))
            self.nll += _nll(log_q, wanted)
            self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self.kl += float(log_q.sub_(log_p).neg_().mul_(log_p.exp_()).sum(dtype=torch.float64))


def _check(sequences: Tensor) -> None:
    if sequences.ndim != 2 or sequences.shape[0] == 0 or sequences.shape[1] < 2:
        raise ValueError(f"windows of shape (n, T), T at least 2, are needed; got {tuple(sequences.shape)}")


def windows_at_once(sequences: Tensor) -> int:
    """Return the number of windows in one forward pass; short windows share it."""
    return max(1, BATCH_TOKENS // sequences.shape[1])


@torch.no_grad()
@float32_products()
def _predictions(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (b (T - 1), vocabulary) of the predicted positions, in the model's dtype, and targets
    (b (T - 1),)."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    logits = model(input_ids=batch).logits
    # For a batch of one, reshape returns a view; several short windows are copied once.
    predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
    return predicted, batch[:, 1:].reshape(-1).to(predicted.device)


def _log_softmax(rows: Tensor) -> Tensor:
    return torch.log_softmax(rows.float(), dim=-1)


def _nll(log_probabilities: Tensor, targets: Tensor) -> float:
    chosen = log_probabilities.gather(1, targets.to(log_probabilities.device)[:, None])
    return -float(chosen.sum(dtype=torch.float64))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
