"""What large models would cost, from formulas, and the formulas against small cases: ``python -m benchmarks.scale``.

    python -m benchmarks.scale           # the tables of docs/scale.md
    python -m benchmarks.scale --check   # measure every term on a tiny model, and fail where a formula is wrong

No figure for a large model was measured. docs/scale.md says what each term means.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message
from benchmarks.report import write_report
from lbllm.models.blocks import capture_calls, decoder_blocks, run_block
from lbllm.sections import LayerFormat, PtqConfig
from lbllm.stages.block_state import BlockState, collect
from lbllm.stages.block_store import BlockStore
from lbllm.stages.hessians import input_statistics
from lbllm.stages.ptq import binarize_layer, to_layer

GROUP = 128  # weights with parameters of their own, as in the paper
SEQ_LEN = 2_048
PTQ_TOKENS = 262_144
SWEEPS = 2
ROWS_EACH, STEPS = 8, 64  # sequences of a step for each GPU, but as few as give a block this many steps

# Assumptions about the machine: H100 SXM with 80 GB, eight in a node.
PEAK = 989e12  # bfloat16 FLOPs/s, dense
SHARE = 0.4  # of the peak, reached by the products of a block
FP32_RATE = 25e12  # FLOPs/s in float32, reached by Hessians and factors (peak 67e12)
HBM = 2.0e12  # bytes/s, reached by element-wise work (peak 3.35e12)
PCIE = 25e9  # bytes/s between main memory and one GPU (peak 64e9)
DISK = 6e9  # bytes/s of a node's disks
NVLINK, INFINIBAND = 300e9, 40e9  # bytes/s of a GPU in an all-reduce within a node, and between nodes
COLUMN_SECONDS = 60e-6  # of a column in one pass of stage 1: a dozen small kernels
STEP_BYTES = 100  # moved for each weight in a step of stage 2: levels, dense weight, gradient, AdamW
STEP_BYTES_AAR = 16  # the same in stage 3: the dense weight and its gradient

# Bytes of a weight: bfloat16 in the teacher, in training (a limit that the tests keep), and after each stage: stage 1
# has an index and a latent weight, stages 2 and 3 have an index.
TEACHER_BYTES, TRAIN_BYTES = 2, 28
STATE_BYTES = {"ptq": 3.0, "wat": 1.0, "aar": 1.0}


@dataclass(frozen=True)
class Layer:
    """``number`` linear layers (rows, columns) of a block, of which a token uses ``active``; ``inputs`` different
    tensors enter them."""

    rows: int
    columns: int
    number: int = 1
    active: int = 1
    inputs: int = 1


@dataclass(frozen=True)
class Shape:
    """A model: ``query`` and ``key`` are the widths of all heads together."""

    name: str
    blocks: int
    hidden: int
    query: int
    key: int
    inner: int
    vocabulary: int
    experts: int = 1
    active: int = 1
    tied: bool = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of a block by the input that they share, in order of use."""
        each = (self.experts, self.active, self.experts)
        return (
            Layer(self.query + 2 * self.key, self.hidden),
            Layer(self.hidden, self.query),
            Layer(2 * self.inner, self.hidden, *each),
            Layer(self.hidden, self.inner, *each),
        )

    @property
    def weights(self) -> int:
        """Weights of a block's linear layers."""
        return sum(layer.rows * layer.columns * layer.number for layer in self.layers)

    @property
    def used(self) -> int:
        """Those of them that one token uses."""
        return sum(layer.rows * layer.columns * layer.active for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Those of the whole model, without norms and routers."""
        return self.blocks * self.weights + (1 if self.tied else 2) * self.hidden * self.vocabulary


SHAPES = (
    Shape("Llama 3.1 8B", 32, 4_096, 4_096, 1_024, 14_336, 128_256),
    Shape("Llama 3.1 70B", 80, 8_192, 8_192, 1_024, 28_672, 128_256),
    Shape("Qwen3 235B-A22B *", 94, 4_096, 8_192, 512, 1_536, 151_936, experts=128, active=8),
)


def forward(shape: Shape, length: int = SEQ_LEN) -> int:
    """FLOPs of a token in one block; attention to all ``length`` positions, as PyTorch counts it."""
    return 2 * shape.used + 4 * length * shape.query


def reaching(shape: Shape, length: int = SEQ_LEN) -> int:
    """FLOPs of a token for the inputs of each layer in turn: stage 1 runs the block again up to every one."""
    passed, total = 0, 0
    for number, layer in enumerate(shape.layers):
        total += passed
        passed += 2 * layer.rows * layer.columns * layer.active + (4 * length * shape.query if number == 0 else 0)
    return total


def statistics(shape: Shape) -> int:
    """FLOPs of a token for Hessians and drifts."""
    return sum(4 * layer.columns**2 * layer.active for layer in shape.layers)


def factors(columns: int) -> float:
    """FLOPs of a Hessian: two Cholesky factors and an inverse (4/3 n³), LU and its solution with n sides (8/3 n³)."""
    return 4 * columns**3


def sweep(rows: int, columns: int, group: int = GROUP, levels: int = 4) -> int:
    """FLOPs of one sweep of stage 1 over a layer: the gradient of each group, and the least squares of its levels."""
    return 2 * rows * columns * (columns + group * (levels + 2) + levels**2 + levels)


def rows_work(rows: int, columns: int, group: int, sweeps: int) -> int:
    """FLOPs of a layer's rows in stage 1: the correction of the drift, errors carried on, sweeps, squared error and
    squared output."""
    return (2 + 1 + 4) * rows * columns**2 + sweeps * sweep(rows, columns, group)


def block_factors(shape: Shape) -> float:
    """FLOPs of all Hessians of a block."""
    return sum(layer.inputs * factors(layer.columns) for layer in shape.layers)


def block_rows(shape: Shape, group: int = GROUP, sweeps: int = SWEEPS) -> int:
    """FLOPs of all layers' rows of a block in stage 1."""
    return sum(layer.number * rows_work(layer.rows, layer.columns, group, sweeps) for layer in shape.layers)


@cache
def imbalance(rows: int, gpus: int) -> float:
    """How much longer a step takes than with equal parts: its rows are random, and each GPU does those that it has.

    The mean of the most that one of ``gpus`` has of ``rows``, over the mean, in 4,000 drawn steps.
    """
    if gpus == 1:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(gpus, (4_000, rows), generator=generator)
    counts = torch.zeros(4_000, gpus).scatter_add_(1, owners, torch.ones(4_000, rows))
    return float(counts.max(1).values.mean()) / (rows / gpus)


def batch_rows(tokens: int, gpus: int) -> int:
    """Sequences of a step: on one GPU those of the paper's preset."""
    return 2 if gpus == 1 else min(ROWS_EACH * gpus, tokens // (SEQ_LEN * STEPS))


def hours(shape: Shape, tokens: int, gpus: int) -> dict[str, float]:
    """Hours of the three stages on ``gpus``, by term; the terms follow one another."""
    rows = batch_rows(tokens, gpus)
    steps = math.ceil(tokens / (rows * SEQ_LEN))
    each = tokens / gpus
    passes = 2 * forward(shape) * each  # of teacher and student through a block
    training = 3 * forward(shape) * each * imbalance(rows, gpus)
    first = (2 * forward(shape) + reaching(shape)) * PTQ_TOKENS / gpus
    products = shape.blocks * (first + 2 * (passes + training)) / (PEAK * SHARE)
    hessians = statistics(shape) * PTQ_TOKENS / gpus
    hessians += block_factors(shape) + block_rows(shape) / gpus
    columns = sum(layer.inputs * layer.columns for layer in shape.layers) * (1 + SWEEPS) * COLUMN_SECONDS
    weights = steps * shape.weights * (STEP_BYTES + STEP_BYTES_AAR) / HBM
    streams = 2 * stream_traffic(shape, tokens) / gpus / PCIE
    link = NVLINK if gpus <= 8 else INFINIBAND
    exchange = 2 * (gpus - 1) / gpus * 2 * steps * gradient_bytes(shape) / link
    teacher = 3 * TEACHER_BYTES * shape.parameters / DISK
    terms = {
        "products": products,
        "stage 1": shape.blocks * (hessians / FP32_RATE + columns),
        "weights": shape.blocks * weights,
        "streams": shape.blocks * streams,
        "gradients": shape.blocks * exchange,
        "reading": teacher,
    }
    return {name: seconds / 3600 for name, seconds in terms.items()}


def stream_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of one stream of hidden states in bfloat16."""
    return 2 * tokens * shape.hidden


def stream_traffic(shape: Shape, tokens: int) -> int:
    """Bytes that pass between main memory and GPU for one block in stage 2 or 3: both streams in and out, and inputs
    and targets once more for training."""
    return 6 * stream_bytes(shape, tokens)


def gradient_bytes(shape: Shape) -> int:
    """Bytes that the ranks add up in a step: the gradient of each weight in bfloat16; others follow from it."""
    return 2 * shape.weights


def state_bytes(shape: Shape, stage: str) -> float:
    """Bytes of a block's saved state after a stage."""
    return shape.weights * (STATE_BYTES[stage] + 4 * 4 / GROUP)


def checkpoint_bytes(shape: Shape) -> float:
    """Bytes of the packed checkpoint: two bits a weight and four float16 levels a group; the rest in bfloat16."""
    packed = shape.blocks * shape.weights
    return packed * (2 + 4 * 16 / GROUP) / 8 + 2 * (shape.parameters - packed)


def derived() -> Iterator[dict[str, Any]]:
    """The rows of the document's tables."""
    for shape in SHAPES:
        tokens = 16_777_216
        yield {
            "table": "work",
            "label": shape.name,
            "weights": shape.weights / 1e9,
            "forward": forward(shape) / 1e9,
            "stage1": (statistics(shape) + 2 * forward(shape) + reaching(shape)) * shape.blocks * PTQ_TOKENS / 1e18,
            "factors": block_factors(shape) * shape.blocks / 1e18,
            "rows": block_rows(shape) * shape.blocks / 1e18,
            "stage23": 5 * forward(shape) * shape.blocks * tokens / 1e18,
            "training_gb": TRAIN_BYTES * shape.weights / 1e9,
            "gradients_gb": gradient_bytes(shape) / 1e9,
        }
    for shape, tokens in itertools.product(SHAPES, (16_777_216, 1_048_576)):
        yield {
            "table": "disk",
            "label": shape.name,
            "tokens": f"{tokens / 1e6:.1f}M",
            "teacher_gb": TEACHER_BYTES * shape.parameters / 1e9,
            "stream_gb": stream_bytes(shape, tokens) / 1e9,
            "streams_gb": 4 * stream_bytes(shape, tokens) / 1e9,
            "traffic_tb": 2 * shape.blocks * stream_traffic(shape, tokens) / 1e12,
            "states_gb": sum(state_bytes(shape, stage) for stage in STATE_BYTES) * shape.blocks / 1e9,
            "checkpoint_gb": checkpoint_bytes(shape) / 1e9,
        }
        for gpus in (1, 8, 64):
            terms = hours(shape, tokens, gpus)
            rows = batch_rows(tokens, gpus)
            times = {f"{name.replace(' ', '')}_h": value for name, value in terms.items()}
            yield {
                "table": "hours",
                "label": shape.name,
                "tokens": f"{tokens / 1e6:.1f}M",
                "gpus": gpus,
                "rows": rows,
                "steps": math.ceil(tokens / (rows * SEQ_LEN)),
                "imbalance": imbalance(rows, gpus),
                "total_h": sum(terms.values()),
                **times,
            }


def checks() -> Iterator[dict[str, Any]]:
    """Each term on a tiny model: by its formula, and as counted or measured."""
    tiny = Shape("tiny", 1, 128, 128, 64, 384, 256)
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "hidden_size": tiny.hidden}
    config = AutoConfig.for_model("llama", intermediate_size=tiny.inner, vocab_size=tiny.vocabulary, **settings)
    # PyTorch counts attention only where it is written out.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    length = 64
    ids = torch.arange(length)[None] % tiny.vocabulary
    block = decoder_blocks(model)[1][0]
    call = capture_calls(model, ids)[0]
    hidden = torch.randn(1, length, tiny.hidden)

    def compared(label: str, formula: float, measured: float) -> dict[str, Any]:
        return {"table": "checks", "label": label, "formula": formula, "measured": measured}

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_block(block, hidden, call)
    yield compared("FLOPs of a forward pass", forward(tiny, length) * length, counter.get_total_flops())

    block.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        run_block(block, hidden, call).sum().backward()
    block.requires_grad_(False)
    yield compared("FLOPs of a training step", 3 * forward(tiny, length) * length, counter.get_total_flops())

    x = torch.randn(256, tiny.hidden)
    with FlopCounterMode(display=False) as counter:
        hessian, _ = input_statistics([x], [x])
    yield compared("FLOPs of Hessian and drift", 4 * tiny.hidden**2 * len(x), counter.get_total_flops())

    fmt = LayerFormat(format="w1+1", group_size=32, param_bits=16, act_bits=16)
    ptq = PtqConfig(sweeps=0, align=0)
    weight = torch.randn(96, tiny.hidden)
    flops = []
    for sweeps in (0, 3):
        with FlopCounterMode(display=False) as counter:
            result = binarize_layer(weight, hessian.clone(), fmt, ptq.model_copy(update={"sweeps": sweeps}))
        flops.append(counter.get_total_flops())
    yield compared("FLOPs of a sweep", sweep(len(weight), tiny.hidden, fmt.group_size), (flops[1] - flops[0]) / 3)
    # PyTorch does not count the products that add in place, by which errors are carried on.
    yield compared("FLOPs of squared error and output", 4 * weight.numel() * tiny.hidden, flops[0])

    stream = torch.zeros(4, length, tiny.hidden, dtype=torch.bfloat16)
    yield compared("bytes of a stream", stream_bytes(tiny, 4 * length), stream.untyped_storage().nbytes())

    layer = to_layer(torch.nn.Linear(tiny.hidden, len(weight), bias=False), fmt, result)
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder), "mark")
        for stage, extra in (("ptq", {"a.latent": result.latent.half()}), ("wat", {})):
            store.save(stage, 0, BlockState(collect({"a": layer}) | extra, 0.0, 0.0, False))  # type: ignore[arg-type]
            size = store.path(stage, 0).stat().st_size  # type: ignore[arg-type]
            expected = weight.numel() * (STATE_BYTES[stage] + 4 * 4 / fmt.group_size)
            yield compared(f"bytes of a state, {stage}", expected, size)

    layer.expand_dense(torch.bfloat16)
    layer(x.bfloat16()).sum().backward()
    assert layer.gradient is not None
    yield compared("bytes of a layer's gradient", 2 * weight.numel(), layer.gradient.nbytes)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a formula is more than 10%% off")
    given = parser.parse_args()
    rows = [*derived(), *(dict(row, ratio=row["measured"] / row["formula"]) for row in checks())]
    for name in ("work", "disk", "hours", "checks"):
        found = [{key: value for key, value in row.items() if key != "table"} for row in rows if row["table"] == name]
        cells = [
            [f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in found
        ]
        print(f"{markdown.table(list(found[0]), cells)}\n")
    if given.out:
        write_report(given.out, "scale", {}, rows)
    wrong = [row["label"] for row in rows if row["table"] == "checks" and not 0.9 < row["ratio"] < 1.1]
    if given.check and wrong:
        raise SystemExit(f"the formulas differ from what was measured: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
