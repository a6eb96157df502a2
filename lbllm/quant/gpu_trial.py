"""Try the Triton kernels on this machine's GPU, on every format that the presets use.

on_gpu()    the module of the kernels; None, with one warning that names what failed, if they can't be used
faults()    what failed, in words; empty where everything is right
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from lbllm.kernels import Once
from lbllm.labels import CODE_BITS
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import (
    PARAMS,
    from_groups,
    group_length,
    params_to_levels,
    planes_to_index,
    take_levels,
    to_groups,
)
from lbllm.quant.packing import ParamGrid, decode_params, packed_shape, unpack_codes, unpack_plane
from lbllm.quant.table import TABLE, has_table
from lbllm.sections import LayerFormat

FORMATS = (
    # quick and standard; without activations preview, and stages 1 and 2 of all
    LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=4, act_group_size=64),
    LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=16),
    # paper
    LayerFormat(format="w1+1", group_size=128, param_bits=16, act_bits=4),
    # what else a format can have
    LayerFormat(format="w1", group_size=64, param_bits=8, act_bits=8),
    LayerFormat(format="w1+1+1", group_size=-1, param_bits=16, act_bits=16),
    LayerFormat(format="w1+1+1", group_size=64, param_bits=4, act_bits=16),
)
# Each is another way through the kernel: sums, tiles of 16 tokens, tiles of 64.
TOKENS = (1, 16, 65)
ROWS, COLUMNS, TAIL = 40, 192, 3
# Largest error of an output, in the sum of its absolute products. In bfloat16 the kernel rounds the weights.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@Once
def on_gpu() -> ModuleType | None:
    """Return ``lbllm.kernels.gpu`` if it works on this machine's GPU, else None. Tried once; warns once if it doesn't
    work."""
    if os.environ.get("LBLLM_KERNELS") == "none" or not torch.cuda.is_available():
        return None
    found = faults()
    if not found:
        from lbllm.kernels import gpu

        return gpu
    more = f", and {len(found) - 1} more, which `lbllm doctor` lists" if len(found) > 1 else ""
    warnings.warn(f"packed layers compute on the GPU in PyTorch, slowly: {found[0]}{more}", stacklevel=2)
    return None


def faults(device: str = "cuda") -> list[str]:
    """Return what is wrong with the kernels on a device, each with its format and input; empty if nothing is."""
    try:
        from lbllm.kernels import gpu
    except Exception as error:  # Triton has no build for every machine
        return [f"Triton can't be used ({type(error).__name__}: {error})"]
    found = []
    for fmt, dtype, tokens in itertools.product(FORMATS, TOLERANCE, TOKENS):
        what = _named(fmt, dtype, tokens)
        try:
            found += [f"{what}: {fault}" for fault in _faults(gpu, fmt, dtype, tokens, device)]
        except Exception as error:  # a driver or a compiler can fail in any way
            found.append(f"{what}: {type(error).__name__}: {error}")
    return found


def _named(fmt: LayerFormat, dtype: torch.dtype, tokens: int) -> str:
    return (
        f"{fmt.format}, groups of {fmt.group_size}, {fmt.param_bits}-bit parameters, {fmt.act_bits}-bit activations, "
        f"{tokens} tokens in {str(dtype).removeprefix('torch.')}"
    )


@torch.no_grad()
def _faults(gpu: ModuleType, fmt: LayerFormat, dtype: torch.dtype, tokens: int, device: str) -> Iterator[str]:
    """Compare a random layer with float64."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, COLUMNS, generator=generator).pow(3).to(dtype)  # with values far out
    there = x.to(device)
    if fmt.act_bits < 16:
        quantizer = ActQuantizer(fmt.act_bits, TAIL, group_size=fmt.act_group_size)
        wanted = quantizer(x)
        there = quantizer.to(device).by_triton(there, gpu)
        x = there.cpu()
        # A GPU divides and rounds a last bit differently: single values may fall on the neighbouring step.
        differ = float((~torch.isclose(x, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)).float().mean())
        if differ > 0.01:
            yield f"{differ:.0%} of the quantized activations are wrong"
    length = group_length(fmt.group_size, COLUMNS)
    groups = -(-COLUMNS // length)
    weight = torch.randint(0, 256, (ROWS, CODE_BITS[fmt.format], COLUMNS // 8), generator=generator, dtype=torch.uint8)
    bias = torch.randn(ROWS, generator=generator)
    params, scale, ranges = _random_params(fmt, groups, generator)
    table = torch.randn(TABLE, generator=generator).half() if has_table(fmt.format) else None
    parts = (None if part is None else part.to(device) for part in (weight, params, scale, ranges, table, bias))
    got = gpu.packed_linear(there, *parts, COLUMNS, length).cpu().double()
    dense = _expanded(weight, params, scale, ranges, table, length)
    error = (got - (x.double() @ dense.T + bias)).abs() / (x.double().abs() @ dense.abs().T + bias.abs())
    worst = float(error.nan_to_num(torch.inf).max())
    if worst > TOLERANCE[dtype]:
        yield f"the output differs by {worst:.1e} of the sum of absolute products, allowed {TOLERANCE[dtype]:.0e}"


def _random_params(
    fmt: LayerFormat, groups: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return random ``params``, ``params_scale`` and ``params_range`` as ``lbllm.quant.packing`` describes them."""
    count = PARAMS[fmt.format]
    shape = (ROWS, *packed_shape(groups, count, fmt.param_bits))
    if fmt.param_bits == 16:
        return torch.randn(shape, generator=generator).half(), None, None
    params = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if fmt.param_bits == 8:
        return params, torch.rand(ROWS, count, 2, generator=generator).half(), None
    scale, ranges = (torch.rand(shape, generator=generator).half() for shape in ((ROWS,), (count, 2)))
    return params, scale, ranges


def _expanded(
    weight: Tensor, params: Tensor, scale: Tensor | None, ranges: Tensor | None, table: Tensor | None, length: int
) -> Tensor:
    """Return the weight (out, in), float64, of stored tensors."""
    index = planes_to_index(unpack_plane(weight, COLUMNS).unbind(1))
    if scale is not None and ranges is not None:
        params, scale = unpack_codes(params, -(-COLUMNS // length), len(ranges)), ParamGrid(scale, ranges).affine()
    levels = params_to_levels(decode_params(params, scale), None if table is None else table.float()).double()
    return from_groups(take_levels(levels, to_groups(index, length)), COLUMNS)
