"""The distillation losses against their formulas, written out in float64 with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.sections import LogitLoss
from lbllm.stages.losses import LOSSES, feature_error, gram_error
from tests.helpers.cases import cases


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def by_formula(kind: LogitLoss, student: np.ndarray, teacher: np.ndarray, tokens: np.ndarray) -> float:
    count, size = student.shape
    p_s, p_t = [softmax(row) for row in student], [softmax(row) for row in teacher]
    forward = np.mean([divergence(t, s) for s, t in zip(p_s, p_t, strict=True)])
    reverse = np.mean([divergence(s, t) for s, t in zip(p_s, p_t, strict=True)])
    if kind == "forward_kl":
        return float(forward)
    if kind == "reverse_kl":
        return float(reverse)
    if kind == "concrete_score":
        total = 0.0
        for row in range(count):
            for x in range(size):
                for y in range(size):
                    gap = student[row, x] - student[row, y] - teacher[row, x] + teacher[row, y]
                    total += 0.5 * p_t[row][x] * p_t[row][y] * gap**2
        return total / count
    if kind == "cakld":
        gamma = np.mean([p[token] for p, token in zip(p_t, tokens, strict=True)])
    else:
        entropy = np.mean([-sum(a * np.log(a) for a in p if a > 0) for p in p_t])
        gamma = min(1.0, max(0.0, 1 - entropy / np.log(size)))
    return float(gamma * reverse + (1 - gamma) * forward)


@pytest.mark.parametrize("kind", list(LOSSES))
@given(st.integers(1, 5), st.integers(2, 12), st.sampled_from([0.1, 1.0, 5.0]), st.integers(0, 2**32))
def test_a_loss_is_its_formula(kind: LogitLoss, count: int, size: int, scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    student, teacher = scale * random.standard_normal((2, count, size))
    tokens = random.integers(0, size, count)
    wanted = by_formula(kind, student, teacher, tokens)
    given_: tuple[Tensor, Tensor, Tensor] = tuple(map(torch.from_numpy, (student, teacher, tokens)))  # type: ignore[assignment]
    assert float(LOSSES[kind](*given_)) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_no_loss_where_both_say_the_same_and_none_for_a_shift_of_all_logits(kind: LogitLoss) -> None:
    teacher = torch.randn(4, 9, dtype=torch.float64)
    student = (teacher + 3.0).requires_grad_()
    loss = LOSSES[kind](student, teacher, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    assert float(student.grad.abs().max()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_the_gradient_is_that_of_finite_differences(kind: LogitLoss) -> None:
    teacher, tokens = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 5, 2])
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: LOSSES[kind](logits, teacher, tokens), student)


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(1, 5), st.integers(2, 300), st.sampled_from([0.1, 3.0, 30.0]), st.integers(0, 2**32))
@cases(30)
def test_logits_of_any_precision_are_taken_as_the_numbers_that_they_are(
    dtype: torch.dtype, kind: LogitLoss, count: int, size: int, scale: float, seed: int
) -> None:
    """On a CPU forward KL has an operator of its own; its gradient is held against float64's, too."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((scale * torch.randn(count, size, generator=generator)).to(dtype) for _ in range(2))
    tokens = torch.randint(0, size, (count,), generator=generator)
    found, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, wanted = LOSSES[kind](found, teacher, tokens), LOSSES[kind](exact, teacher.double(), tokens)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4, abs=1e-5 * scale)
    loss.backward()
    wanted.backward()
    assert found.grad is not None
    assert exact.grad is not None
    assert found.grad.dtype == dtype
    error = (found.grad.double() - exact.grad).norm()
    assert float(error) <= (0.01 if dtype == torch.bfloat16 else 1e-4) * float(exact.grad.norm()) + 1e-5 * scale


def relative_error(given: np.ndarray, meant: np.ndarray) -> float:
    squares = [((a - b) ** 2).sum() / max((a**2).sum(), (b**2).sum()) for a, b in zip(given, meant, strict=True)]
    return float(np.mean(squares))


@example(blocks=1, tokens=1, hidden=1, seed=41)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32))
def test_features_are_compared_where_their_error_grows_most(blocks: int, tokens: int, hidden: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    meant = random.standard_normal((blocks, tokens, hidden)) + 3
    student = meant + random.uniform(0.1, 2, (blocks, 1, 1)) * random.standard_normal(meant.shape)
    # Values that float32 has: rounding would change the difference of two that are nearly equal.
    meant, student = (values.astype(np.float32).astype(np.float64) for values in (meant, student))
    errors = [relative_error(a, b) for a, b in zip(student, meant, strict=True)]
    growth = [error - before for error, before in zip(errors, [0.0, *errors], strict=False)]
    chosen = sorted(range(blocks), key=lambda block: -growth[block])[: (blocks + 3) // 4]
    wanted = np.mean([errors[block] for block in chosen])
    found = feature_error(list(torch.from_numpy(student)), list(torch.from_numpy(meant)))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32))
@cases(40)
def test_the_gram_error_compares_the_cosines_of_all_pairs_of_tokens(
    blocks: int, tokens: int, hidden: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    student, meant = random.standard_normal((2, blocks, tokens, hidden))

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / np.sqrt(one @ one) / np.sqrt(other @ other))

    pairs = [(block, x, y) for block in range(blocks) for x in range(tokens) for y in range(tokens)]
    gaps = [cosine(student[b, x], student[b, y]) - cosine(meant[b, x], meant[b, y]) for b, x, y in pairs]
    found = gram_error(list(torch.from_numpy(student)[:, None]), list(torch.from_numpy(meant)[:, None]))
    assert float(found) == pytest.approx(np.mean(np.square(gaps)), rel=1e-4, abs=1e-7)


def test_the_gram_error_has_a_gradient_where_a_token_is_zero() -> None:
    student = torch.zeros(1, 3, 4)
    student[0, 1:] = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    gram_error([student], [torch.ones(1, 3, 4)]).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert float(student.grad.abs().sum()) > 0
