"""Packed layers on a GPU, in Triton: weights are read as bits and become numbers in registers.

    packed_linear(...)         y = x W^T + bias from the planes and parameters as a checkpoint stores them
    quantize_activations(...)  the piecewise quantizer of lbllm.quant.activations

One kernel handles any number of tokens: a program computes some rows for some tokens and loops over the input. For a
few tokens it multiplies and sums in float32, limited by the time to read the bits; from 16 tokens on it multiplies a
tile of the weights with the tokens in ``tl.dot``. Float32 input is multiplied in float32, half precision in its own
dtype with float32 sums. All values that a kernel needs lie on the GPU: no call waits for one.

``lbllm.quant.gpu_trial`` says whether they work on this machine's GPU. With TRITON_INTERPRET=1 the same code runs in
Triton's interpreter on the CPU, which is how it is tested.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _param(
    params_at,
    scale_at,
    ranges_at,
    at,
    row,
    row_in,
    group_in,
    WHICH: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
):
    """One of the group parameters alpha_0, mu_0, alpha_1, mu_1 (of three planes: the scale) of the groups whose first
    one is at ``at``."""
    if BITS == 16:
        value = tl.load(params_at + at + WHICH, mask=group_in, other=0).to(tl.float32)
    else:
        if BITS == 8:
            code = tl.load(params_at + at + WHICH, mask=group_in, other=0)
            pair = scale_at + (row * COUNT + WHICH) * 2
            low = tl.load(pair, mask=row_in, other=0).to(tl.float32)
            step = tl.load(pair + 1, mask=row_in, other=0).to(tl.float32)
        else:
            if COUNT == 1:
                code = (
                    tl.load(params_at + at // 2, mask=group_in, other=0).to(tl.int32) >> (at % 2 * 4).to(tl.int32) & 15
                )
            else:
                code = tl.load(params_at + at // 2 + WHICH // 2, mask=group_in, other=0) >> (WHICH % 2 * 4) & 15
            unit = tl.load(scale_at + row, mask=row_in, other=0).to(tl.float32)
            # Rounded to float16, as ``ParamGrid.affine`` does.
            low = (unit * tl.load(ranges_at + 2 * WHICH).to(tl.float32)).to(tl.float16).to(tl.float32)
            step = (unit * tl.load(ranges_at + 2 * WHICH + 1).to(tl.float32)).to(tl.float16).to(tl.float32)
        value = code.to(tl.float32) * step + low
    return value


@triton.jit
def _linear(
    x_at,
    weight_at,
    params_at,
    scale_at,
    ranges_at,
    table_at,
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
    COUNT: tl.constexpr = 1 if PLANES == 3 else 2 * PLANES
    # Two 4-bit codes share a byte, and a row has whole bytes.
    held = groups + groups % 2 if PLANES == 3 and PARAM_BITS == 4 else groups
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
        at = (wide[:, None] * held + group[None, :]) * COUNT
        byte = weight_at + (wide[:, None] * PLANES) * stride + (column // 8)[None, :]
        shift = (column % 8)[None, :]
        sign = ((tl.load(byte, mask=inside, other=0).to(tl.int32) >> shift) & 1) * 2 - 1
        one, one_in = wide[:, None], row_in[:, None]
        # alpha_0, or the scale of three planes
        alpha = _param(params_at, scale_at, ranges_at, at, one, one_in, group_in, 0, COUNT, PARAM_BITS)
        if PLANES == 3:
            bitmap = (tl.load(byte + stride, mask=inside, other=0).to(tl.int32) >> shift) & 1
            second = (tl.load(byte + 2 * stride, mask=inside, other=0).to(tl.int32) >> shift) & 1
            place = 2 * bitmap + second
            level = tl.load(table_at + tl.where(sign == 1, 4 + place, 3 - place)).to(tl.float32)
            weight = tl.where(inside, alpha * level, 0.0)
        else:
            mu = _param(params_at, scale_at, ranges_at, at, one, one_in, group_in, 1, COUNT, PARAM_BITS)
            if PLANES == 2:
                inner = _param(params_at, scale_at, ranges_at, at, one, one_in, group_in, 2, COUNT, PARAM_BITS)
                middle = _param(params_at, scale_at, ranges_at, at, one, one_in, group_in, 3, COUNT, PARAM_BITS)
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
def _bounded(act_at, WHICH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.minimum(tl.maximum(tl.load(act_at + WHICH).to(tl.float32), LOW), HIGH)


@triton.jit
def _quantize(
    x_at,
    out_at,
    act_at,
    features,
    KNEE_LOW: tl.constexpr,
    KNEE_HIGH: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One range's values on its grid."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, FEATURES)
    inside = feature < features
    x = tl.load(x_at + token * features + feature, mask=inside, other=0).to(tl.float32)
    # Zero is on every grid.
    bottom = _bounded(act_at, 1, CLIP_LOW, CLIP_HIGH) * tl.minimum(tl.min(x, axis=0), 0.0)
    top = _bounded(act_at, 2, CLIP_LOW, CLIP_HIGH) * tl.maximum(tl.max(x, axis=0), 0.0)
    knee = _bounded(act_at, 0, KNEE_LOW, KNEE_HIGH)
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


def packed_linear(
    x: Tensor,
    weight: Tensor,
    params: Tensor,
    scale: Tensor | None,
    ranges: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    columns: int,
    length: int,
) -> Tensor:
    """y (..., rows) = x W^T + bias in x's dtype; groups of ``length`` columns.

    The tensors are those of ``lbllm.quant.packing``, all on x's device: ``weight`` uint8 (rows, planes, ceil(columns /
    8)); ``params`` float16 (rows, groups, 2 planes), or uint8 with ``scale`` float16 (rows, 2 planes, 2), or uint8, two
    a byte, with ``scale`` float16 (rows,) and ``ranges`` float16 (2 planes, 2). With three planes a ``table`` float16
    (8,) is needed, and a group has one parameter instead of two for each plane.
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
        with torch.cuda.device_of(x):  # Triton uses the current GPU, wherever the tensors are
            _linear[(triton.cdiv(rows, some), triton.cdiv(tokens, many))](
                flat,
                weight,
                params,
                params if scale is None else scale,
                params if ranges is None else ranges,
                params if table is None else table,
                y if bias is None else bias,
                y,
                tokens,
                rows,
                columns,
                length,
                triton.cdiv(columns, length),
                PLANES=planes,
                PARAM_BITS=16 if scale is None else 8 if ranges is None else 4,
                ALIGNED=length % step == 0 or length >= columns,
                BIAS=bias is not None,
                DOT=dot,
                TOKENS=many,
                ROWS=some,
                COLUMNS=step,
            )
    return y.reshape(*x.shape[:-1], rows)


def quantize_activations(
    x: Tensor,
    act: Tensor,
    bits: int,
    tail: int,
    knee_range: tuple[float, float],
    clip_range: tuple[float, float],
) -> Tensor:
    """x (..., features) on the grid of each row, in x's dtype.

    ``act`` float32 (3,), on x's device: knee, lower and upper clip, each of which is clamped to its range.
    """
    features = x.shape[-1]
    flat = x.reshape(-1, features).contiguous()
    out = torch.empty_like(flat)
    if len(flat):
        with torch.cuda.device_of(x):
            _quantize[(len(flat),)](
                flat,
                out,
                act,
                features,
                *knee_range,
                *clip_range,
                STEPS=2**bits - 1 - 2 * tail,
                TAIL=tail,
                FEATURES=triton.next_power_of_2(features),
            )
    return out.reshape(x.shape)
