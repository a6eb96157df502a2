"""Packed layers beside dense ones of the same shape, in one run: ``python -m benchmarks.layers``.

For every shape and number of tokens: the time of torch's linear layer in float32 and bfloat16, and of the packed layer
W(1+1) at group size 64, with the input as it is (A16) and quantized to 4 bits (A4), the latter by table lookup, which
is what models use, and by the float products of A16 (up to 8 tokens; more of them take one way). All take turns, over
several copies of their weights where one would fit into the caches; printed is the median. Beside one token: the share
of the read bandwidth, measured in the same run, at which the packed weights were read by A16 and by A4.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message
from benchmarks.report import machine, settings_of, write_report
from benchmarks.timing import best_seconds, median_seconds
from lbllm import kernels
from lbllm.errors import ConfigError
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerFormat

SHAPES = {
    "LLaMA-2-7B": [(4096, 4096), (4096, 11008), (11008, 4096)],
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
}
BEYOND_CACHES = 128_000_000  # bytes that no cache holds
READ = 512_000_000  # bytes
GROUP_SIZE = 64
PACKED = ("a16", "a4")
SHARES = tuple(f"bandwidth_{packed}" for packed in PACKED)


def packed_layer(columns: int, rows: int, act_bits: int, *, tables: bool = True) -> PackedLinear:
    """A layer of random bits; ``tables`` off: without table lookup."""
    settings = {"format": "w1+1", "group_size": GROUP_SIZE, "param_bits": 16, "act_bits": act_bits}
    fmt = LayerFormat.model_validate(settings)
    layer = PackedLinear(columns, rows, fmt, bias=False, tail=2, dtype=torch.float32)
    layer.weight.random_(0, 256)
    layer.params.copy_(0.02 * torch.randn(layer.params.shape))
    if not tables:
        layer.looks_up = lambda: False  # type: ignore[method-assign]
    return layer


def dense_layer(columns: int, rows: int, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)


def read_bandwidth() -> float:
    """Bytes a second at which a sum reads a tensor from memory; the best of many."""
    data = torch.ones(READ // 4)
    return data.nbytes / best_seconds(data.sum, 0.5)


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


def measure(columns: int, rows: int, tokens: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    """A shape's times in milliseconds, how many times as fast the packed layer is, and at one token its share of the
    ``bandwidth`` (bytes a second)."""
    x = torch.randn(tokens, columns)
    works = [
        turns(lambda: dense_layer(columns, rows, torch.float32), x),
        turns(lambda: dense_layer(columns, rows, torch.bfloat16), x.bfloat16()),
        turns(lambda: packed_layer(columns, rows, 16), x),
        turns(lambda: packed_layer(columns, rows, 4), x),
        turns(lambda: packed_layer(columns, rows, 4, tables=False), x),
    ]
    times = dict(zip(("fp32", "bf16", "a16", "a4", "a4_floats"), median_seconds(works, seconds), strict=True))
    row: dict[str, Any] = {"tokens": tokens} | {f"{name}_ms": 1e3 * time for name, time in times.items()}
    row |= {f"{dense}_over_{packed}": times[dense] / times[packed] for packed in PACKED for dense in ("fp32", "bf16")}
    if tokens == 1:
        size = sum(buffer.nbytes for buffer in packed_layer(columns, rows, 16).buffers())
        row |= {key: size / times[packed] / bandwidth for key, packed in zip(SHARES, PACKED, strict=True)}
    return row


def line(row: dict[str, Any]) -> str:
    """The printed row."""
    cells = [f"{row['model']} {row['layer']}", str(row["tokens"])]
    cells += [f"{value:.3f}" for key, value in row.items() if key.endswith("_ms")]
    cells += [f"{value:.1f}" for key, value in row.items() if "_over_" in key]
    return markdown.row([*cells, *(f"{row[key]:.0%}" if key in row else "" for key in SHARES)])


def shapes(models: str) -> list[tuple[str, int, int]]:
    """The shapes (model, columns, rows) of the models that ``--models`` names. Raises ConfigError."""
    for name in models.split(","):
        if name not in SHAPES:
            raise ConfigError(f"--models {name}: choose from {', '.join(SHAPES)}")
    return [(name, *shape) for name in models.split(",") for shape in SHAPES[name]]


@one_message()
@torch.inference_mode()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and number of tokens")
    parser.add_argument("--models", default=",".join(SHAPES), help="whose shapes, joined by commas")
    arguments = parser.parse_args()
    chosen = shapes(arguments.models)
    if not kernels.ready():
        raise ConfigError("the C++ kernels can't be compiled here, so there is nothing to measure")
    cores, instructions = torch.get_num_threads(), kernels.instruction_set()
    print(f"{machine()}, {cores} threads, {instructions}, {date.today()}")
    bandwidth = read_bandwidth()
    print(f"read bandwidth: {bandwidth / 1e9:.1f} GB/s from memory")
    header = ["layer in x out", "tokens", "fp32 ms", "bf16 ms", "A16 ms", "A4 ms", "A4 floats ms"]
    header += ["fp32/A16", "bf16/A16", "fp32/A4", "bf16/A4", "bandwidth A16", "A4"]
    print(markdown.head(header))
    found = []
    for model, columns, rows in chosen:
        for tokens in (1, 8, 512):
            measured = measure(columns, rows, tokens, arguments.seconds, bandwidth)
            found.append({"model": model, "layer": f"{columns} x {rows}"} | measured)
            print(line(found[-1]), flush=True)
    if arguments.out:
        facts = {"group_size": GROUP_SIZE, "read_bandwidth_gb_per_second": round(bandwidth / 1e9, 1)}
        write_report(arguments.out, "layers", settings_of(arguments) | facts, found)


if __name__ == "__main__":
    main()
