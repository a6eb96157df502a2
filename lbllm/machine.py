"""Where a run computes and in which precision, through accelerate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lbllm.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def matmul_rate(dtype: torch.dtype, size: int = 384, seconds: float = 0.1, place: str = "cpu") -> float:
    """FLOP a second of a square matrix product, the best of the repetitions that fit in ``seconds`` after one to
    warm up.

    On a CPU that others use at that moment the repetitions wait for it; then the processor time of the calling thread,
    which does its share from a product's beginning to its end, says more.
    """
    left, right = torch.randn(2, size, size, device=place).to(dtype)

    def product() -> float:
        began = time.perf_counter()
        torch.mm(left, right)
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    product()
    count, used, best = 1, time.thread_time(), product()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, product())
        count += 1
    if place == "cpu":
        worked = (time.thread_time() - used) / count
        best = min(best, worked) if worked > 0 else best
    return 2 * size**3 / best


_onednn: Any = torch.backends.mkldnn  # whose type hints lack ``matmul``


@contextmanager
def _by_onednn() -> Iterator[None]:
    """Float32 matrix products on the CPU by oneDNN, which may round their factors to bfloat16."""
    before = _onednn.matmul.fp32_precision
    _onednn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        _onednn.matmul.fp32_precision = before


@contextmanager
def float32_products() -> Iterator[None]:
    """Within it oneDNN computes float32 matrix products on the CPU, where it does so in float32.

    PyTorch leaves them to MKL, which takes AVX2 on other makers' processors. oneDNN takes AVX-512 on all of them, but
    is asked only where it may round to bfloat16; whether it would on this processor is tried once. Twice as fast for
    many rows, slower for a single one: to evaluate with, not to write.
    """
    with _by_onednn() if _onednn_keeps_float32() else nullcontext():
        yield


@cache
def _onednn_keeps_float32() -> bool:
    """Whether its error is that of float32; that of factors in bfloat16 is a thousand times as large."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    with _by_onednn():
        found = left @ right
    return bool((found.double() - left.double() @ right.double()).abs().max() < 1e-3)


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def bfloat16_products(model: nn.Module) -> Iterator[None]:
    """Within it the linear layers of a float32 model multiply in bfloat16, where this CPU has instructions for it.

    They still take and give float32, and all else is computed in float32: attention of one token over many costs
    several times as much in bfloat16. Twice as fast for many rows; a result differs by the rounding of its factors.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear] if has_bfloat16() else []
    # One whose forward was replaced already, or that does not compute in float32, stays as it is.
    layers = [layer for layer in layers if layer.weight.dtype == torch.float32 and "forward" not in vars(layer)]
    halves: dict[Tensor, Tensor] = {}
    for layer in layers:
        half = halves.setdefault(layer.weight, layer.weight.detach().bfloat16())
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        layer.forward = partial(_half_linear, half, bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _half_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return nn.functional.linear(x.bfloat16(), weight, bias).float()


def check_device(device: str) -> None:
    """Raise ConfigError unless ``device`` is auto, cpu, or cuda on a machine that has a GPU."""
    if device not in DEVICES:
        raise ConfigError(f"device {device!r} is not known; choose from {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': this machine has no GPU that torch can use; choose cpu")


def device_named(name: str) -> str:
    """The torch device that auto, cpu, cuda or cuda:N means. Raises ConfigError where this machine has no such
    device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no CUDA device is visible here; use cpu")
    return name


def make_accelerator(device: str, precision: str | None = None) -> Accelerator:
    """The accelerator for ``auto``, ``cpu`` or ``cuda``; ``precision``: ``no`` or ``bf16``, by the device when it is
    None.

    bf16 is taken on a GPU, and on a CPU that has instructions for its products (AVX-512 BF16 or AMX). Measuring would
    depend on what else the machine does: two runs of the same settings could then differ. Raises ConfigError where
    there is no such device.
    """
    check_device(device)
    cpu = device == "cpu" or not torch.cuda.is_available()
    if precision is None:
        precision = "bf16" if not cpu or has_bfloat16() else "no"
    try:
        return Accelerator(cpu=cpu, mixed_precision=precision)
    except ValueError:
        # accelerate keeps one state for the process, and an earlier run in it had another device or precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=precision)


def free_memory(device: str = "auto") -> int:
    """Bytes that a new process could take: on the GPU if the run uses one, else of the machine or its container."""
    if _uses_gpu(device):
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def fastest_matmul_rate(device: str = "auto") -> float:
    """FLOPs a second of a large matrix product, in the faster of float32 and bfloat16; takes about 0.2 s."""
    place = "cuda" if _uses_gpu(device) else "cpu"
    # bfloat16 can be a hundred times slower than float32 where the processor lacks it: small products decide.
    dtype = max((torch.float32, torch.bfloat16), key=lambda dtype: matmul_rate(dtype, 256, 0.02, place))
    return matmul_rate(dtype, 4096 if place == "cuda" else 1024, 0.12, place)


def _uses_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
