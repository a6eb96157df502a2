"""What stage 1 computes from a layer's inputs: the Hessian, its factor, and the correction of the inputs' drift.

These are matrices (in, in), and the largest tensors of a wide layer. Each function says which of them it overwrites,
so that no more than three are in memory at any time (``MATRICES``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lbllm import ranks
from lbllm.sections import PtqConfig

# Matrices (in, in) at the same time. While inputs are added up: Hessian, drift, product of one batch. While the drift
# is solved: Hessian, its LU factors, drift. After that: damped Hessian, its factor U, correction.
MATRICES = 3

# Tokens whose squares are in memory at the same time.
_TOKENS = 512


def bounded(energy: Tensor) -> Tensor:
    """How much tokens of these squared norms (tokens,) count: 1, or less for those above ten times the median."""
    return (10 * energy.median() / energy.clamp_min(1e-30)).clamp_max(1)


@torch.no_grad()
def input_statistics(seen: Iterable[Tensor], meant: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """H = X^T X / tokens of the inputs (tokens, in) that a layer sees, and the drift D = (X_teacher - X)^T X /
    tokens; float32, on the device of ``seen``. ``meant`` may be on another one. On several ranks, each gives its own
    batches, and the result is that of all.

    Without a limit, tokens of massive activation would dominate H: a token with more than ten times the median energy
    counts as if it had ten times the median.
    """
    hessian = drift = product = torch.zeros(0)
    tokens = 0
    for x, target in zip(seen, meant, strict=True):
        x = x.float()
        if not tokens:
            hessian, drift, product = (x.new_zeros(x.shape[1], x.shape[1]) for _ in range(3))
        weighted = x * bounded(torch.cat([part.square().sum(1) for part in x.split(_TOKENS)]))[:, None]
        hessian.add_(torch.mm(weighted.t(), x, out=product))
        missing = target.to(x.device).to(torch.float32, copy=True).sub_(x)
        drift.add_(torch.mm(missing.t(), weighted, out=product))
        tokens += len(x)
    number = torch.tensor(tokens)
    ranks.sum_(hessian, drift, number)
    tokens = int(number)
    return hessian.div_(tokens), drift.div_(tokens)


def damp_(hessian: Tensor, damping: float) -> Tensor:
    """Add ``damping`` times the mean of its diagonal to H, in place; inputs that are always zero get a diagonal of
    their own."""
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * torch.where(mean == 0, torch.ones_like(mean), mean))
    return hessian


def _by_column(matrix: Tensor) -> Tensor:
    """A copy of a square matrix in the layout of LAPACK, which can then work in place."""
    return matrix.new_empty(matrix.shape).t().copy_(matrix)


@torch.no_grad()
def factorize_(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damp H (in, in) in place. Return it with U, the upper Cholesky factor of its inverse, whose rows carry a column's
    error to the columns after it."""
    factor = _by_column(damp_(hessian, damping))
    torch.linalg.cholesky(factor, out=factor)
    torch.cholesky_inverse(factor, out=factor)
    torch.linalg.cholesky(factor, upper=True, out=factor)
    return hessian, factor


def factorize(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return ``factorize_`` of a copy of H."""
    return factorize_(hessian.clone(), damping)


@torch.no_grad()
def correction_(hessian: Tensor, drift: Tensor, config: PtqConfig) -> Tensor | None:
    """Return D H^-1 (in, in) for ``align``, with H damped by ``config.align_damping``; None if nothing is corrected.

    The result takes the place of ``drift``; ``hessian`` does not change.
    """
    if not config.align:
        return None
    factors = _by_column(hessian)
    damp_(factors, config.align_damping)
    pivots = torch.empty(0, dtype=torch.int32, device=hessian.device)
    torch.linalg.lu_factor(factors, out=(factors, pivots))
    solution = drift.t()
    torch.linalg.lu_solve(factors, pivots, solution, out=solution)
    return drift


def align(weight: Tensor, correction: Tensor | None, config: PtqConfig) -> Tensor:
    """The dense weight (out, in) that comes nearest to the teacher's outputs on the student's inputs: W + W D H^-1.

    It is the least-squares solution of X W'^T = X_teacher W^T (the asymmetric calibration of GPTAQ, Li et al. 2025,
    in closed form), damped towards W, so that a layer also corrects the drift of earlier layers.
    """
    return weight if correction is None else (weight @ correction).mul_(config.align).add_(weight)
