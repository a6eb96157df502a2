"""The machine that computes: devices, precision (with accelerate), matmul rate and free memory."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from lbllm.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
# How long a process of a run waits for the others. A lost one is noticed at once; this is for those that hang.
PATIENCE = timedelta(hours=1)


def matmul_rate(dtype: torch.dtype, size: int = 384, seconds: float = 0.1, place: str = "cpu") -> float:
    """Return the FLOPs per second of a square matrix product: the best of the repetitions in ``seconds``, after one to
    warm up.

    If other processes use the CPU at that moment, the repetitions wait for it. The processor time of the calling
    thread, which works during the whole product, is then the better measure.
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


_onednn: Any = torch.backends.mkldnn  # its type hints lack ``matmul``


class _Products:
    """How many threads compute by oneDNN now, and the setting without them."""

    def __init__(self) -> None:
        self.mutex, self.users, self.before = threading.Lock(), 0, ""


_products = _Products()


@contextmanager
def _by_onednn() -> Iterator[None]:
    """Compute float32 matrix products on the CPU with oneDNN, which may round their factors to bfloat16."""
    # It holds for the whole process: the last of several threads restores what the first one found.
    with _products.mutex:
        if _products.users == 0:
            _products.before = _onednn.matmul.fp32_precision
            _onednn.matmul.fp32_precision = "bf16"
        _products.users += 1
    try:
        yield
    finally:
        with _products.mutex:
            _products.users -= 1
            if _products.users == 0:
                _onednn.matmul.fp32_precision = _products.before


@contextmanager
def float32_products() -> Iterator[None]:
    """Compute float32 matrix products on the CPU with oneDNN, if oneDNN keeps float32 precision on this processor.

    By default PyTorch uses MKL, which uses only AVX2 on processors that are not Intel's. oneDNN uses AVX-512 on all
    processors, but PyTorch calls it only if it may round to bfloat16; a single test finds out whether it does. It is
    twice as fast for many rows and slower for a single row: good for evaluation, not for generating text.
    """
    with _by_onednn() if _onednn_keeps_float32() else nullcontext():
        yield


@cache
def _onednn_keeps_float32() -> bool:
    """Return whether oneDNN's error is that of float32; with factors in bfloat16 it is a thousand times larger."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    with _by_onednn():
        found = left @ right
    return bool((found.double() - left.double() @ right.double()).abs().max() < 1e-3)


def has_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def bfloat16_products(model: nn.Module) -> Iterator[None]:
    """Compute the linear layers of a float32 model in bfloat16, if this CPU has instructions for it.

    Inputs and outputs stay float32, and so does everything else: attention of one token to many takes several times
    longer in bfloat16. It is twice as fast for many rows; results differ by the rounding of the factors.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear] if has_bfloat16() else []
    # Skip layers that have another dtype or whose forward is already replaced.
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


def devices() -> tuple[str, ...]:
    """The names of devices that a run on this machine can be given."""
    count = torch.cuda.device_count()
    return DEVICES + tuple(f"cuda:{index}" for index in range(count) if count > 1)


def check_device(device: str) -> None:
    """Raise ConfigError unless ``device`` is auto, cpu, or a GPU that this machine has: cuda or cuda:N."""
    kind, _, index = device.partition(":")
    if device not in DEVICES and not (kind == "cuda" and index.isdecimal() and index.isascii()):
        raise ConfigError(f"device {device!r} is not known; choose from {', '.join(DEVICES)}, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: this machine has no GPU that torch can use; choose cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")


def check_processes(device: str, processes: int) -> None:
    """Raise ConfigError unless a run on ``device`` can have so many processes: on GPUs, each has one of its own."""
    check_device(device)
    if processes < 1:
        raise ConfigError(f"--processes {processes}: a run has at least 1 process")
    if processes == 1 or not uses_gpu(device):
        return
    if ":" in device:
        raise ConfigError(f"--processes {processes} with device {device}, which is one GPU; choose auto or cuda")
    if processes > torch.cuda.device_count():
        raise ConfigError(
            f"--processes {processes}: this machine has {torch.cuda.device_count()} GPUs, and each process needs one"
        )


def device_named(name: str) -> str:
    """Return the torch device of auto, cpu, cuda or cuda:N. Raises ConfigError if the machine does not have it.

    mps and xpu, which nobody has tried, are let through on a machine that has them.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    counts = {"cpu": lambda: 1, "cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    counts["mps"] = lambda: int(torch.backends.mps.is_available())
    try:
        device = torch.device(name)
        count = counts[device.type]()
    except (RuntimeError, KeyError):
        raise ConfigError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if count == 0:
        raise ConfigError(f"--device {name}: torch finds no such device on this machine; use cpu")
    if (device.index or 0) >= count:
        raise ConfigError(f"--device {name}: this machine has {count} of these devices, counted from 0")
    return name


def make_accelerator(device: str, precision: str | None = None) -> Accelerator:
    """Return the accelerator for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises ConfigError if there is no such
    device. A process that a launcher started beside others joins them here.

    ``precision``: ``no`` or ``bf16``. None selects bf16 on a GPU, and on a CPU with instructions for bfloat16 products
    (AVX-512 BF16 or AMX). It is not selected by measured speed, which depends on what else the machine does: two runs
    with the same settings could then differ.
    """
    check_device(device)
    cpu = device == "cpu" or not torch.cuda.is_available()
    if ":" in device:
        torch.cuda.set_device(torch.device(device))
    if precision is None:
        precision = "bf16" if not cpu or has_bfloat16() else "no"
    joining = [InitProcessGroupKwargs(timeout=PATIENCE)]
    try:
        return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=joining)
    except ValueError:
        # accelerate has one state per process, and an earlier run in this process had another device or precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=joining)


def free_memory(device: str = "auto") -> int:
    """Return the bytes that a new process can use: GPU memory if the run uses one, or that of machine or container."""
    if uses_gpu(device):
        return int(torch.cuda.mem_get_info(device if ":" in device else None)[0])
    free = min(int(psutil.virtual_memory().available), _data_left())
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def _data_left() -> int:
    """Return the bytes of data that this process may still get, where a limit is set (ulimit -d, prlimit --data)."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(0, limit - int(psutil.Process().memory_info().data)) if sys.platform == "linux" else limit


def fastest_matmul_rate(device: str = "auto") -> float:
    """Return the FLOPs per second of a large matrix product in float32 or bfloat16, the faster one; takes 0.2 s."""
    place = "cuda" if uses_gpu(device) else "cpu"
    # Small products decide, as bfloat16 can be a hundred times slower than float32 on processors without it.
    dtype = max((torch.float32, torch.bfloat16), key=lambda dtype: matmul_rate(dtype, 256, 0.02, place))
    return matmul_rate(dtype, 4096 if place == "cuda" else 1024, 0.12, place)


def uses_gpu(device: str) -> bool:
    """Return whether a run with this device setting computes on a GPU."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
