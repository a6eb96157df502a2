"""Bit planes and 8-bit group parameters as they lie in a checkpoint, with exact inverses.

A plane of booleans (out, in) becomes bytes (out, ceil(in / 8)): input column j of a row is bit j % 8, counted from
the least significant, of byte j // 8. Bits past the end of a row are zero. The planes of a layer are stacked:

    weight uint8 (out, 2, ceil(in / 8))        plane 0: B (1 stands for +1), plane 1: G;  W1 has plane 0 alone
    params float16 (out, n, K)                 alpha_0, mu_0[, alpha_1, mu_1] of each of the n groups of a row
    params uint8 (out, n, K) + params_scale float16 (out, K, 2)      the same with 8 bits: minimum and step of each row

A byte order of its own for the kernels is theirs to derive; this one is for storage and is the same on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_plane(plane: Tensor) -> Tensor:
    """Booleans (..., in) to bytes (..., ceil(in / 8)), least significant bit first."""
    missing = -plane.shape[-1] % 8
    bits = torch.nn.functional.pad(plane.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=plane.device)).sum(-1, dtype=torch.uint8)


def unpack_plane(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of ``pack_plane``: bytes (..., ceil(in / 8)) to booleans (..., in)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :in_features].bool()


def encode_params(params: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit group parameters: float (out, n, K) to codes uint8 (out, n, K) and (minimum, step) float16 (out, K, 2).

    Each parameter of a row has an affine scale over the row's groups; a constant row is exact to float16. Encoding what
    was decoded gives it back unchanged.
    """
    params = params.float()
    least, most = params.amin(1, keepdim=True), params.amax(1, keepdim=True)
    low = least.half().float()
    step = ((most - low) / 255).clamp_min(0).half().float()
    codes = ((params - low) / step.clamp_min(1e-12)).round_().clamp_(0, 255)
    # The ends get the end codes, however minimum and step were rounded: only then do they come out the same once more.
    codes = codes.masked_fill(params == most, 255).masked_fill(params == least, 0)
    return codes.to(torch.uint8), torch.stack((low[:, 0], step[:, 0]), -1).half()


def stored_params(params: Tensor, bits: int) -> Tensor:
    """Group parameters (out, n, K) as a checkpoint stores them, in float32: rounded to float16, or to 8 bits and a
    scale."""
    return decode_params(*encode_params(params)) if bits == 8 else params.half().float()


def decode_params(params: Tensor, scale: Tensor | None) -> Tensor:
    """Group parameters as float32 (out, n, K) from float16 ones or from 8-bit codes and their scale (out, K, 2)."""
    if scale is None:
        return params.float()
    scale = scale.float()
    return params.float() * scale[:, None, :, 1] + scale[:, None, :, 0]
