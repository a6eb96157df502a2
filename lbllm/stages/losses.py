"""Distillation losses for the end-to-end stage: functions of student and teacher logits.

Logits are (tokens, vocabulary); p_S and p_T are their softmaxes. Every loss is a scalar, the mean over the tokens. It
is zero if the student has the teacher's distribution, and differentiable in the student's logits.

- ``forward_kl``: KL(p_T || p_S), mass-covering.
- ``reverse_kl``: KL(p_S || p_T), mode-seeking.
- ``cakld``: both, weighted by the teacher's confidence in the text (BitDistiller, Du et al. 2024).
- ``eakld``: both, weighted by the teacher's entropy, which needs no text (EdgeRazor, Zhang et al. 2026).
- ``concrete_score``: logit differences of all pairs of the vocabulary (Concrete Score Distillation, Kim et al. 2026).

``feature_error`` compares the outputs of blocks instead of logits. It selects the blocks again at each call
(EdgeRazor's idea). ``gram_error`` compares how similar the tokens of a text are to each other in both models
(MedAlign).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lbllm import kernels
from lbllm.sections import LogitLoss
from lbllm.stages.distill import token_error


class _ForwardKL(torch.autograd.Function):
    """KL(p_T || p_S) as one operator, which computes the loss and its gradient in one pass over the logits."""

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
    """Return KL(p_T || p_S), a scalar; ``tokens`` is not used."""
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
    """Return logits in float32; float64 logits stay as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def reverse_kl(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Return KL(p_S || p_T), a scalar; ``tokens`` is not used."""
    return _forward_kl(teacher, student)


def cakld(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Return gamma KL(p_S || p_T) + (1 - gamma) KL(p_T || p_S), a scalar.

    gamma is the teacher's mean probability of the text's next ``tokens``, int64 (tokens,).
    """
    gamma = _wide(teacher.detach()).softmax(-1).gather(-1, tokens[:, None]).mean()
    return _mixture(student, teacher, tokens, gamma)


def eakld(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Return ``cakld`` with gamma = clip(1 - mean entropy of p_T / log k, 0, 1), where k is the size of the vocabulary;
    ``tokens`` is not used."""
    log_teacher = _log_softmax(teacher.detach())
    entropy = -(log_teacher.exp() * log_teacher).sum(-1).mean()
    return _mixture(student, teacher, tokens, (1 - entropy / math.log(teacher.shape[-1])).clamp(0, 1))


def concrete_score(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Return 1/2 sum_xy p_T(x) p_T(y) (f_S[x] - f_S[y] - f_T[x] + f_T[y])^2, where f are the logits.

    This is the variance of f_S - f_T under p_T. ``tokens`` is not used.
    """
    student, teacher = _wide(student), _wide(teacher)
    weight, difference = teacher.detach().softmax(-1), student - teacher
    mean = (weight * difference).sum(-1, keepdim=True)
    return (weight * (difference - mean).square()).sum(-1).mean()


def feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean ``token_error`` of the quarter of the blocks whose error grows most over the previous block.

    ``student`` and ``teacher``: the outputs (..., hidden) of all blocks in order. A block that only passes on the error
    of its input is not selected.
    """
    errors = torch.stack([token_error(output, target) for output, target in zip(student, teacher, strict=True)])
    growth = errors.detach().diff(prepend=errors.new_zeros(1))
    return errors[growth.topk(-(-len(errors) // 4)).indices].mean()


def gram_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference between both models' Gram matrices, which hold the cosine similarities of all
    pairs of a text's tokens: a scalar, the mean over all blocks (MedAlign's feature loss).

    ``student`` and ``teacher``: the outputs (..., T, hidden) of all blocks in order. Outputs that are turned or scaled
    as a whole have no error.
    """
    errors = []
    for output, target in zip(student, teacher, strict=True):
        ours, theirs = (functional.normalize(one.float(), dim=-1) for one in (output, target))
        errors.append((ours @ ours.mT - theirs @ theirs.mT).square().mean())
    return torch.stack(errors).mean()


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
