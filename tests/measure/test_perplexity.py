"""Evaluation against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.baselines.rtn import round_to_nearest
from lbllm.measure.perplexity import ROWS, divergence, divergences, perplexity
from tests.helpers.tiny_models import VOCABULARY, tiny


def windows(count: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(count * length))


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    """(T - 1, vocabulary) in float64: the straightforward way, one window at a time."""
    return torch.log_softmax(model(input_ids=window[None]).logits[0, :-1].double(), -1)


@pytest.mark.parametrize(("count", "length"), [(1, 2), (5, 7), (3, ROWS + 11), (40, 120)])
def test_perplexity_equals_brute_force(count: int, length: int) -> None:
    model, _ = tiny("llama", max_position_embeddings=1024)
    sequences = windows(count, length)
    nll = [-log_probabilities(model, window).gather(1, window[1:, None]).sum().item() for window in sequences]
    calls: list[tuple[int, int]] = []
    result = perplexity(model, sequences, on_progress=lambda done, total: calls.append((done, total)))
    assert result.tokens == count * (length - 1)
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / result.tokens), rel=1e-5)
    assert calls[-1] == (count, count)
    assert result.seconds > 0


def test_divergence_equals_brute_force() -> None:
    teacher, _ = tiny("llama")
    student = round_to_nearest(teacher, bits=3, group_size=16)
    sequences = windows(3, 50)
    kl = agreed = 0.0
    for window in sequences:
        log_p, log_q = log_probabilities(teacher, window), log_probabilities(student, window)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    result = divergence(teacher, student, sequences)
    assert result.tokens == 3 * 49
    assert result.kl == pytest.approx(kl / result.tokens, rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreed / result.tokens)
    assert result.teacher_perplexity == pytest.approx(perplexity(teacher, sequences).perplexity)
    assert result.student_perplexity == pytest.approx(perplexity(student, sequences).perplexity)


def test_several_students_at_once() -> None:
    teacher, _ = tiny("llama")
    students = [round_to_nearest(teacher, bits, group_size=16) for bits in (1, 2, 4)]
    sequences = windows(3, 40)
    together = divergences(teacher, students, sequences)
    assert together == [divergence(teacher, student, sequences) for student in students]
    assert [result.kl for result in together] == sorted((result.kl for result in together), reverse=True)


def test_a_model_does_not_diverge_from_itself() -> None:
    model, _ = tiny("qwen3")
    result = divergence(model, model, windows(2, 20))
    assert result.kl == 0
    assert result.top1_agreement == 1


def test_broken_models_give_no_number_or_infinity() -> None:
    model, _ = tiny("llama_bias")
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(1e7)
    assert perplexity(model, windows(1, 30)).perplexity == math.inf
    with torch.no_grad():
        head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, windows(1, 30)).perplexity)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_too_little_text_is_refused(shape: tuple[int, ...]) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="windows of shape"):
        perplexity(model, torch.zeros(shape, dtype=torch.long))
