"""Distillation losses on logits, for the end-to-end stage: each a function of student and teacher logits.

Logits are (tokens, vocabulary); p_S and p_T are their softmaxes. Every loss is the mean over the tokens, a
scalar, zero where the student gives the teacher's distribution, and differentiable in the student's logits.

- ``forward_kl``: KL(p_T || p_S), mass-covering.
- ``reverse_kl``: KL(p_S || p_T), mode-seeking.
- ``cakld``: the mixture of both by the teacher's confidence in the text (BitDistiller, Du et al. 2024).
- ``eakld``: the mixture by the teacher's entropy, which needs no text (EdgeRazor, Zhang et al. 2026).
- ``concrete_score``: logit differences of all pairs of the vocabulary (Concrete Score Distillation, Kim et al. 2026).

``feature_error`` compares what blocks give instead of logits, on layers chosen anew each time (EdgeRazor's idea).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lbllm import kernels
from lbllm.sections import LogitLoss
from lbllm.stages.distill import token_error


class _ForwardKL(torch.autograd.Function):
    """The same in one pass over the logits, its gradient with it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        loss, grad = torch.ops.lbllm.forward_kl(student.contiguous(), teacher.contiguous())
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None


def forward_kl(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """KL(p_T || p_S); ``tokens`` is not read."""
    fits = student.dtype in (torch.float32, torch.bfloat16) and student.dtype == teacher.dtype
    if fits and student.device.type == "cpu" and not teacher.requires_grad and kernels.ready():
        value: Tensor = _ForwardKL.apply(student, teacher)
        return value
    return _forward_kl(student, teacher)


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_student, log_teacher = _log_softmax(student), _log_softmax(teacher)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


def _log_softmax(logits: Tensor) -> Tensor:
    return _wide(logits).log_softmax(-1)


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, or the float64 that they have."""
    return logits if logits.dtype == torch.float64 else logits.float()


def reverse_kl(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """KL(p_S || p_T); ``tokens`` is not read."""
    return _forward_kl(teacher, student)


def cakld(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """gamma KL(p_S || p_T) + (1 - gamma) KL(p_T || p_S), gamma the teacher's mean probability of the text's next
    ``tokens`` (int64, one a row)."""
    gamma = _wide(teacher.detach()).softmax(-1).gather(-1, tokens[:, None]).mean()
    return _mixture(student, teacher, tokens, gamma)


def eakld(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """The same with gamma = clip(1 - mean entropy of p_T / log k, 0, 1), k the size of the vocabulary; ``tokens`` is
    not read."""
    log_teacher = _log_softmax(teacher.detach())
    entropy = -(log_teacher.exp() * log_teacher).sum(-1).mean()
    return _mixture(student, teacher, tokens, (1 - entropy / math.log(teacher.shape[-1])).clamp(0, 1))


def concrete_score(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """1/2 sum_xy p_T(x) p_T(y) (f_S[x] - f_S[y] - f_T[x] + f_T[y])^2 of logits f: the variance of f_S - f_T under
    p_T; ``tokens`` is not read."""
    student, teacher = _wide(student), _wide(teacher)
    weight, difference = teacher.detach().softmax(-1), student - teacher
    mean = (weight * difference).sum(-1, keepdim=True)
    return (weight * (difference - mean).square()).sum(-1).mean()


def feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean relative error (``token_error``) of the outputs (..., hidden) of some blocks, given of all in order.

    Chosen is the quarter of the blocks where the error grows most from one to the next: a block that merely hands on
    what it was given wrong is not pulled at.
    """
    errors = torch.stack([token_error(given, meant) for given, meant in zip(student, teacher, strict=True)])
    growth = errors.detach().diff(prepend=errors.new_zeros(1))
    return errors[growth.topk(-(-len(errors) // 4)).indices].mean()


def _mixture(student: Tensor, teacher: Tensor, tokens: Tensor, gamma: Tensor) -> Tensor:
    return gamma * reverse_kl(student, teacher, tokens) + (1 - gamma) * forward_kl(student, teacher, tokens)


LOSSES: dict[LogitLoss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "cakld": cakld,
    "eakld": eakld,
    "concrete_score": concrete_score,
}
assert set(LOSSES) == set(get_args(LogitLoss))
