"""Packed layers on a GPU, in Triton: weights are read as bits and become numbers in registers.

    works()                    whether they work on this machine's GPU
    packed_linear(...)         y = x W^T + bias from the planes and parameters as a checkpoint stores them
    quantize_activations(...)  the piecewise quantizer of lbllm.quant.activations

One kernel handles any number of tokens: a program computes some rows for some tokens and loops over the input. For a
few tokens it multiplies and sums in float32, limited by the time to read the bits; from 16 tokens on it multiplies a
tile of the weights with the tokens in ``tl.dot``. Float32 input is multiplied in float32, half precision in its own
dtype with float32 sums.

With TRITON_INTERPRET=1 the same code runs in Triton's interpreter on the CPU, which is how it is tested.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _param(params_at, affine_at, at, row_in, group_in, WHICH: tl.constexpr, BITS: tl.constexpr):
    """One of the group parameters alpha_0, mu_0, alpha_1, mu_1 of the groups whose first one is at ``at``."""
    if BITS == 16:
        value = tl.load(params_at + at + WHICH, mask=group_in, other=0).to(tl.float32)
    else:
        if BITS == 8:
            code = tl.load(params_at + at + WHICH, mask=group_in, other=0)
        else:
            code = tl.load(params_at + at // 2 + WHICH // 2, mask=group_in, other=0) >> (WHICH % 2 * 4) & 15
        step = tl.load(affine_at + 2 * WHICH + 1, mask=row_in, other=0).to(tl.float32)
        value = code.to(tl.float32) * step + tl.load(affine_at + 2 * WHICH, mask=row_in, other=0).to(tl.float32)
    return value


@triton.jit
def _linear(
    x_at,
    weight_at,
    params_at,
    scale_at,
    bias_at,
    y_at,
    tokens,
    rows,
    columns,
    length,
    groups,
    PLANES: tl.constexpr,
    PARAM_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y (tokens, rows) for TOKENS x ROWS of it. ``ALIGNED``: COLUMNS of a step lie in one group."""
    COUNT: tl.constexpr = 2 * PLANES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_in, token_in = row < rows, token < tokens
    # In large models rows * columns exceeds 2^31.
    wide = row.to(tl.int64)
    stride = tl.cdiv(columns, 8)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_in = column < columns
        inside = row_in[:, None] & column_in[None, :]
        group = first // length + tl.zeros((1,), dtype=tl.int32) if ALIGNED else column // length
        group_in = row_in[:, None] & (group < groups)[None, :]
        at = (wide[:, None] * groups + group[None, :]) * COUNT
        byte = weight_at + (wide[:, None] * PLANES) * stride + (column // 8)[None, :]
        shift = (column % 8)[None, :]
        sign = ((tl.load(byte, mask=inside, other=0).to(tl.int32) >> shift) & 1) * 2 - 1
        affine = scale_at + wide[:, None] * COUNT * 2
        one = row_in[:, None]
        alpha = _param(params_at, affine, at, one, group_in, 0, PARAM_BITS)
        mu = _param(params_at, affine, at, one, group_in, 1, PARAM_BITS)
        if PLANES == 2:
            inner = _param(params_at, affine, at, one, group_in, 2, PARAM_BITS)
            middle = _param(params_at, affine, at, one, group_in, 3, PARAM_BITS)
            bitmap = (tl.load(byte + stride, mask=inside, other=0).to(tl.int32) >> shift) & 1
            alpha = tl.where(bitmap == 1, alpha, inner)
            mu = tl.where(bitmap == 1, mu, middle)
        weight = tl.where(inside, mu + alpha * sign.to(tl.float32), 0.0)
        x = tl.load(
            x_at + token.to(tl.int64)[:, None] * columns + column[None, :],
            mask=token_in[:, None] & column_in[None, :],
            other=0,
        )
        if DOT:
            total += tl.dot(x, tl.trans(weight.to(x.dtype)), input_precision="ieee")
        else:
            total += tl.sum(x.to(tl.float32)[:, None, :] * weight[None, :, :], axis=2)
    if BIAS:
        total += tl.load(bias_at + row, mask=row_in, other=0).to(tl.float32)[None, :]
    place = y_at + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(place, total.to(y_at.dtype.element_ty), mask=token_in[:, None] & row_in[None, :])


@triton.jit
def _nearest(x):
    """Round to the nearest whole number, halves to the even one, as PyTorch does."""
    up = tl.floor(x + 0.5)
    tie = (up - x == 0.5) & (tl.floor(up * 0.5) * 2 != up)
    # Above 2^22 a sum with one half may round by itself, and x is whole or half a number anyway.
    return tl.where(tl.abs(x) < 4194304.0, tl.where(tie, up - 1, up), x)


@triton.jit
def _quantize(
    x_at, out_at, knee, clip_low, clip_high, features, STEPS: tl.constexpr, TAIL: tl.constexpr, FEATURES: tl.constexpr
):
    """One token's values on its grid."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, FEATURES)
    inside = feature < features
    x = tl.load(x_at + token * features + feature, mask=inside, other=0).to(tl.float32)
    # Zero is on every grid.
    bottom = clip_low * tl.minimum(tl.min(x, axis=0), 0.0)
    top = clip_high * tl.maximum(tl.max(x, axis=0), 0.0)
    share = knee if TAIL else 1.0
    body = tl.maximum(share * (top - bottom) / STEPS, 1e-12)
    zero = _nearest(-share * bottom / body)
    span = STEPS - zero
    code = tl.minimum(tl.maximum(_nearest(x / body), -zero), span)
    value = code * body
    if TAIL:
        low = tl.maximum(-zero * body - bottom, 0.0) / TAIL
        high = tl.maximum(top - span * body, 0.0) / TAIL
        below = tl.minimum(tl.maximum(_nearest((value - x) / tl.maximum(low, 1e-12)), 0.0), TAIL)
        above = tl.minimum(tl.maximum(_nearest((x - value) / tl.maximum(high, 1e-12)), 0.0), TAIL)
        value = value - tl.where(code == -zero, low * below, 0.0) + tl.where(code == span, high * above, 0.0)
    tl.store(out_at + token * features + feature, value.to(out_at.dtype.element_ty), mask=inside)


def works() -> bool:
    """Whether small layers give the right result on this machine's GPU."""
    return all(map(_is_right, (1, 16, 65)))


def _is_right(tokens: int) -> bool:
    """Check a layer whose weights are all mu_1 + alpha_1 = 3: it must give three times the sum of its inputs."""
    weight = torch.zeros(8, 2, 8, dtype=torch.uint8, device="cuda")
    weight[:, 0] = 255
    params = torch.tensor([5.0, 7.0, 1.0, 2.0], device="cuda").half().repeat(8, 2, 1)
    x = torch.ones(tokens, 64, device="cuda")
    grid = quantize_activations(x, 0.3, 1.0, 1.0, 4, 3)
    sums = packed_linear(grid, weight, params, None, None, 64, 32)
    return bool((sums - 192).abs().max() < 0.1)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    params: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    columns: int,
    length: int,
) -> Tensor:
    """y (..., rows) = x W^T + bias in x's dtype.

    ``weight`` uint8 (rows, planes, ceil(columns / 8)), ``params`` float16 (rows, groups, 2 planes), or uint8, perhaps
    two a byte, with ``scale`` float16 (rows, 2 planes, 2), groups of ``length`` columns, as in ``lbllm.quant.packing``.
    """
    rows, planes, _ = weight.shape
    flat = x.reshape(-1, columns).contiguous()
    tokens = len(flat)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if tokens:
        dot = tokens >= 16
        many, some, step = (64, 64, 64) if tokens > 64 else (16, 64, 64) if dot else (1, 16, 256)
        while length % step and step > 16:
            step //= 2
        _linear[(triton.cdiv(rows, some), triton.cdiv(tokens, many))](
            flat,
            weight,
            params,
            params if scale is None else scale,
            y if bias is None else bias,
            y,
            tokens,
            rows,
            columns,
            length,
            params.shape[1],
            PLANES=planes,
            PARAM_BITS=16 if scale is None else 8 if params.shape[2] == 2 * planes else 4,
            ALIGNED=length % step == 0 or length >= columns,
            BIAS=bias is not None,
            DOT=dot,
            TOKENS=many,
            ROWS=some,
            COLUMNS=step,
        )
    return y.reshape(*x.shape[:-1], rows)


def quantize_activations(x: Tensor, knee: float, clip_low: float, clip_high: float, bits: int, tail: int) -> Tensor:
    """x (..., features) on the grid of each token, in x's dtype."""
    features = x.shape[-1]
    flat = x.reshape(-1, features).contiguous()
    out = torch.empty_like(flat)
    if len(flat):
        _quantize[(len(flat),)](
            flat,
            out,
            knee,
            clip_low,
            clip_high,
            features,
            STEPS=2**bits - 1 - 2 * tail,
            TAIL=tail,
            FEATURES=triton.next_power_of_2(features),
        )
    return out.reshape(x.shape)
