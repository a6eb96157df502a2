"""Quantize activations: the piecewise 4-bit quantizer of stage 3, and a uniform 8-bit quantizer.

Ranges are dynamic: they are computed from each token, or from each group of ``group_size`` inputs of a token. With
groups, an outlier widens the steps of its own group only. (The paper uses one range per token; group ranges come from
the MX formats, Rouhani et al. 2023.) The piecewise grid for one token or group x with knee rho and clips c-, c+:

    m = c- min(x, 0),  M = c+ max(x, 0)                  the clipped range, which contains zero
    n = 2^bits - 1 - 2 t steps in the body, t steps for each tail
    s = rho (M - m) / n,   z = round(-rho m / s)         body: the values s (q - z), q = 0..n; one of them is exactly 0
    L = -z s,  U = (n - z) s                             the body's edges
    s- = (L - m) / t,  s+ = (M - U) / t                  tails: L - s- j and U + s+ j, j = 1..t

Every token has 2^bits values (t fewer if all its values have the same sign), and  x_q = s b - s- j- + s+ j+  with
integers -z <= b <= n - z and 0 <= j-, j+ <= t. These are three integer planes, which a packed matmul can sum exactly.
In LBLLM the dense body and the sparse tails have different step sizes, separated by a learned knee, which is trained
through a temperature-scaled soft mask; the exact grid is ours.

Gradients: x inside the clipped range gets the straight-through gradient. The body's step gets the gradient of LSQ
(Esser et al. 2020), which assumes that values are spread evenly over a step. A tail has few steps and its values become
rarer within each step. LSQ's residual would there shrink the body far below its best size, so a value in a tail or
beyond it keeps its code and moves with its grid. The edges also get a gradient through the soft mask
sigmoid((U - x) / tau).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lbllm import kernels
from lbllm.quant.levels import float_mask, from_groups, group_length, to_groups
from lbllm.sections import WHOLE_ROW

KNEE_RANGE = (0.02, 1.0)
CLIP_RANGE = (0.05, 1.0)


class ActivationGrid(NamedTuple):
    """The grid of one range: steps of the body, the lower and upper tail, and the body's zero point, all (..., 1)."""

    body: Tensor
    low: Tensor
    high: Tensor
    zero: Tensor


def make_grid(x: Tensor, knee: Tensor, clip_low: Tensor, clip_high: Tensor, bits: int, tail: int) -> ActivationGrid:
    """Return the grid of each row of x (..., features); differentiable in the scalars knee, clip_low and clip_high."""
    steps = 2**bits - 1 - 2 * tail
    bottom = clip_low * x.detach().amin(-1, keepdim=True).clamp_max(0)
    top = clip_high * x.detach().amax(-1, keepdim=True).clamp_min(0)
    share = knee if tail else torch.ones_like(knee)
    body = (share * (top - bottom) / steps).clamp_min(1e-12)
    zero = (-share * bottom / body).detach().round()
    if not tail:
        return ActivationGrid(body, body, body, zero)
    low = (-zero * body - bottom).clamp_min(0) / tail
    high = (top - (steps - zero) * body).clamp_min(0) / tail
    return ActivationGrid(body, low, high, zero)


class Codes(NamedTuple):
    """The integers of quantized values: the body's b in [-z, n - z] and the tails' j-, j+ in [0, t]."""

    body: Tensor
    low: Tensor
    high: Tensor


def encode(x: Tensor, grid: ActivationGrid, bits: int, tail: int) -> Codes:
    """Return the codes of x (..., features) on its grids; a value in a tail is the body's edge plus j tail steps."""
    steps = 2**bits - 1 - 2 * tail
    bottom, top = -grid.zero, steps - grid.zero
    body = (x / grid.body).round_().clamp_(bottom, top)
    if not tail:
        empty = torch.zeros_like(body)
        return Codes(body, empty, empty)
    edge = body * grid.body
    low = (edge - x).div_(grid.low.clamp_min(1e-12)).round_().clamp_(0, tail).mul_(float_mask(torch.eq, body, bottom))
    high = (x - edge).div_(grid.high.clamp_min(1e-12)).round_().clamp_(0, tail).mul_(float_mask(torch.eq, body, top))
    return Codes(body, low, high)


def decode(codes: Codes, grid: ActivationGrid) -> Tensor:
    """Return the values of the codes: s b - s- j- + s+ j+."""
    return grid.body * codes.body - grid.low * codes.low + grid.high * codes.high


class _Compiled(torch.autograd.Function):
    """Quantize to the grids of ``act`` (3,), knee and clips; each pass is one operator of ``lbllm.kernels``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Tensor, bits: int, tail: int, tau: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = *act.tolist(), bits, tail
        ctx.tau = tau
        return torch.ops.lbllm.quantize_activations(x, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_x, by_act = torch.ops.lbllm.quantize_activations_backward(
            grads[0], *ctx.saved_tensors, *ctx.settings, ctx.tau
        )
        return by_x, by_act, None, None, None


class _FakeQuant(torch.autograd.Function):
    """Quantize to a given grid, in PyTorch; gradients for x and for the grid's three steps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, body: Tensor, low: Tensor, high: Tensor, zero: Tensor, bits: int, tail: int, tau: float
    ) -> Tensor:
        grid = ActivationGrid(body, low, high, zero)
        codes = encode(x, grid, bits, tail)
        ctx.save_for_backward(x, *grid, *codes)
        ctx.settings = bits, tail, tau
        return decode(codes, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, body, low, high, zero, in_body, in_low, in_high = ctx.saved_tensors
        bits, tail, tau = ctx.settings
        steps = 2**bits - 1 - 2 * tail
        lower, upper = -zero * body, (steps - zero) * body
        if tail:
            # The largest value of an unclipped token is the end of the range. It counts as inside, even if rounding
            # moved the end.
            bottom, top = lower - tail * low, upper + tail * high
            slack = 1e-5 * (top - bottom)
            inside, dense = _between(x, bottom - slack, top + slack), _between(x, lower, upper)
        else:
            # The rounded zero point moves the range by up to half a step; the range's ends still count as inside.
            inside = dense = _between(x, lower - body / 2, upper + body / 2)
        # Derivative by the body's step: the code for values in the tails, the rounding residual for the body.
        slope = torch.addcmul(in_body, x / body, dense, value=-1)
        if not tail:
            return grad * inside, torch.linalg.vecdot(grad, slope)[..., None], None, None, None, None, None, None
        # The soft mask: if an edge moves, values near it change from the tail's grid to the body's.
        width = tau * body
        for edge, ratio, step, codes, sign in (
            (upper, steps - zero, high, in_high, 1.0),
            (lower, -zero, low, in_low, -1.0),
        ):
            away = x - edge
            mask = torch.sigmoid(away * (-sign / width))
            handed = torch.addcmul(body * in_body - edge, step, codes, value=-sign)
            near = _between(away, -(body + step), body + step)
            slope.addcmul_(handed.mul_(mask - mask * mask).mul_(near), sign * ratio / width)
        grad_body, grad_low, grad_high = (torch.linalg.vecdot(grad, d)[..., None] for d in (slope, in_low, in_high))
        return grad * inside, grad_body, -grad_low, grad_high, None, None, None, None


def _between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return 1 where low <= x <= high and 0 elsewhere, in x's dtype."""
    return float_mask(torch.ge, x, low).mul_(float_mask(torch.le, x, high))


class _Latest(NamedTuple):
    """The input and result of a quantizer's last pass with gradients, and the versions of input and parameters then."""

    given: weakref.ref[Tensor]
    result: weakref.ref[Tensor]
    versions: tuple[int, int]


class ActQuantizer(nn.Module):
    """Dynamic fake quantization of a layer's input to ``bits`` (4: piecewise with ``tail`` steps per tail; 8: uniform).

    Each group of ``group_size`` features of a token has its own range; with WHOLE_ROW each token has one range.

    Holds ``knee``, ``clip_low``, ``clip_high`` in one parameter ``act`` (3,), float32.
    """

    def __init__(self, bits: int, tail: int, temperature: float = 0.5, *, group_size: int = WHOLE_ROW) -> None:
        super().__init__()
        self.bits, self.temperature, self.group_size = bits, temperature, group_size
        self.tail = tail if bits == 4 else 0
        self.act = nn.Parameter(torch.tensor([0.3, 1.0, 1.0], dtype=torch.float32))
        # Layers that share an input share its quantizer: they can reuse the last result while the graph holds it.
        self._latest: _Latest | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: not the last result."""
        return self.__dict__ | {"_latest": None}

    @torch.no_grad()
    def bound(self) -> None:
        """Clamp the parameters to their ranges: outside a range they would get no gradient and never return."""
        self.act[:1].clamp_(*KNEE_RANGE)
        self.act[1:].clamp_(*CLIP_RANGE)

    def settings(self) -> tuple[float, float, float, int, int]:
        """Return what a kernel needs: knee, lower and upper clip (clamped to their ranges), bits and tail steps."""
        knee, low, high = self.act.tolist()
        low, high = (min(max(clip, CLIP_RANGE[0]), CLIP_RANGE[1]) for clip in (low, high))
        return min(max(knee, KNEE_RANGE[0]), KNEE_RANGE[1]), low, high, self.bits, self.tail

    def bounded(self) -> Tensor:
        """Return knee, lower and upper clip (3,), clamped to their ranges; differentiable."""
        return torch.cat((self.act[:1].clamp(*KNEE_RANGE), self.act[1:].clamp(*CLIP_RANGE)))

    def ranges(self, x: Tensor) -> Tensor:
        """Return x (..., features) as (..., n, size), one row per range; zeros pad the last row and change no range."""
        return to_groups(x, group_length(self.group_size, x.shape[-1]))

    def deployed(self, x: Tensor, operator: Callable[..., Tensor]) -> Tensor:
        """Return ``forward(x)``, computed by a kernel's ``quantize_activations``, without gradients."""
        return from_groups(operator(self.ranges(x), *self.settings()), x.shape[-1])

    def by_triton(self, x: Tensor, gpu: ModuleType) -> Tensor:
        """Return ``forward(x)``, computed by ``lbllm.kernels.gpu``, without gradients and without a copy to the
        host."""
        values = gpu.quantize_activations(self.ranges(x), self.act, self.bits, self.tail, KNEE_RANGE, CLIP_RANGE)
        return from_groups(values, x.shape[-1])

    def grid(self, x: Tensor) -> ActivationGrid:
        """Return the grids of x (..., features); each row of x has one range."""
        knee, clip_low, clip_high = self.bounded()
        return make_grid(x, knee, clip_low, clip_high, self.bits, self.tail)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., features) rounded to its grid, in x's dtype; computed in float32."""
        latest = self._latest  # read once: another thread may replace it
        if latest is not None and torch.is_grad_enabled() and latest.given() is x:
            result = latest.result()
            if result is not None and latest.versions == (x._version, self.act._version):
                return from_groups(result, x.shape[-1])
        ranges = self.ranges(x)
        if x.device.type == "cpu" and x.dtype != torch.float64 and x.numel() > 0 and kernels.ready():
            quantized = _Compiled.apply(ranges, self.bounded(), self.bits, self.tail, self.temperature)
        else:
            value = ranges.float()
            quantized = _FakeQuant.apply(value, *self.grid(value), self.bits, self.tail, self.temperature)
            quantized = quantized.to(x.dtype)
        if quantized.requires_grad:  # refer to the base tensor: the graph may not hold the view that is returned
            self._latest = _Latest(weakref.ref(x), weakref.ref(quantized), (x._version, self.act._version))
        return from_groups(quantized, x.shape[-1])


class RoundThrough(torch.autograd.Function):
    """Round to integers; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
