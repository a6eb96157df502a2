"""Packed layers beside dense ones of the same shape, in one run: ``python -m benchmarks.layers``.

For every shape and number of tokens: the time of torch's linear layer in float32 and bfloat16, and of the packed layer
W(1+1) at group size 64, with the input as it is (A16) and quantized to 4 bits (A4), the latter by table lookup, which
is what models use, and by the float products of A16 (up to 8 tokens; more of them take one way). All take turns, over
several copies of their weights where one would fit into the caches; printed is the median. Beside one token: the share
of the read bandwidth, measured in the same run, at which the packed weights were read by A16 and by A4.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor, nn

from lbllm import kernels
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerFormat

SHAPES = {
    "LLaMA-2-7B": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
}
BEYOND_CACHES = 128_000_000  # bytes that no cache holds


def packed_layer(columns: int, rows: int, act_bits: int, *, tables: bool = True) -> PackedLinear:
    """A layer of random bits; ``tables`` off: without table lookup."""
    fmt = LayerFormat.model_validate({"format": "w1+1", "group_size": 64, "param_bits": 16, "act_bits": act_bits})
    layer = PackedLinear(columns, rows, fmt, bias=False, tail=2, dtype=torch.float32)
    layer.weight.random_(0, 256)
    layer.params.copy_(0.02 * torch.randn(layer.params.shape))
    if not tables:
        layer.looks_up = lambda: False  # type: ignore[method-assign]
    return layer


def dense_layer(columns: int, rows: int, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)


def read_bandwidth(megabytes: int) -> float:
    """Bytes a second at which a sum reads a tensor of that size; the best of many."""
    data = torch.ones(megabytes * 250_000)
    best = float("inf")
    for _ in range(max(5, 2000 // megabytes)):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def median_seconds(works: list[Callable[[], object]], seconds: float) -> list[float]:
    """Each work's median time; they take turns for ``seconds`` in all."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[-1]) < 5:
        for work, kept in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in times]


def turns(make: Callable[[], nn.Module], x: Tensor) -> Callable[[], object]:
    """Calls of equal layers one after the other, so many that the caches don't hold them all."""
    first = make()
    size = sum(t.nbytes for t in (*first.parameters(), *first.buffers()))
    layers = [first, *(make() for _ in range(min(32, BEYOND_CACHES // size)))]
    for layer in layers:
        layer(x)
    place = 0

    def work() -> object:
        nonlocal place
        place = (place + 1) % len(layers)
        return layers[place](x)

    return work


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and number of tokens")
    parser.add_argument("--models", default=",".join(SHAPES), help="whose shapes, joined by commas")
    arguments = parser.parse_args()
    assert kernels.ready()
    cores, instructions = torch.get_num_threads(), kernels.instruction_set()
    print(f"{platform.processor() or platform.machine()}, {cores} threads, {instructions}, {date.today()}")
    memory = read_bandwidth(512)
    print(f"read bandwidth: {memory / 1e9:.1f} GB/s from memory")
    header = ["layer in x out", "tokens", "fp32 ms", "bf16 ms", "A16 ms", "A4 ms", "A4 floats ms"]
    header += ["fp32/A16", "bf16/A16", "fp32/A4", "bf16/A4", "bandwidth A16", "A4"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for model in arguments.models.split(","):
        for columns, rows in SHAPES[model]:
            for tokens in (1, 8, 512):
                x = torch.randn(tokens, columns)
                works = [
                    turns(lambda r=rows, c=columns: dense_layer(c, r, torch.float32), x),  # type: ignore[misc]
                    turns(lambda r=rows, c=columns: dense_layer(c, r, torch.bfloat16), x.bfloat16()),  # type: ignore[misc]
                    turns(lambda r=rows, c=columns: packed_layer(c, r, 16), x),  # type: ignore[misc]
                    turns(lambda r=rows, c=columns: packed_layer(c, r, 4), x),  # type: ignore[misc]
                    turns(lambda r=rows, c=columns: packed_layer(c, r, 4, tables=False), x),  # type: ignore[misc]
                ]
                fp32, bf16, a16, a4, floats = median_seconds(works, arguments.seconds)
                size = sum(buffer.nbytes for buffer in packed_layer(columns, rows, 16).buffers())
                row = [f"{model} {columns} x {rows}", str(tokens)]
                row += [f"{1e3 * t:.3f}" for t in (fp32, bf16, a16, a4, floats)]
                row += [f"{dense / packed:.1f}" for packed in (a16, a4) for dense in (fp32, bf16)]
                row += [f"{size / packed / memory:.0%}" if tokens == 1 else "" for packed in (a16, a4)]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
