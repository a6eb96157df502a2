"""Compare how much quality each method of quantization costs: ``python -m benchmarks.quality``.

    python -m benchmarks.quality --methods rtn,gptq,billm,arb,bwa,stage1 --group-sizes 64,128 --act-bits 16,4
    python -m benchmarks.quality --methods arb --checkpoint runs/mine --tasks piqa,arc_easy --task-limit 200
    python -m benchmarks.quality --methods rtn,hqq,auto-round --outside OUTSIDE

Every method quantizes all decoder blocks of the same teacher, in order, calibrated on the same tokens; each layer's
inputs have come through what was quantized before. ``stage1``, ``stage2`` and ``stage3`` are this program's own stages
on as many tokens each. Printed: stored bits per weight of the quantized layers, everything counted; perplexity on the
texts and accuracy in zero-shot tasks; the minutes that quantizing took, and the peak memory until it was done. With
``--act-bits 4`` the layers' inputs are in plain 4 bits (asymmetric, a range for each token, or for so many of its
inputs as ``--act-group-size`` says), with ``16,4`` there are columns of both; our stages and checkpoints have their own
bits and are in the columns of these. Each row is computed in its own process.

Other packages run in an environment of their own, which never sees this program:

    python3 -m venv OUTSIDE
    OUTSIDE/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 termcolor einops \
py-cpuinfo requests pydantic
    OUTSIDE/bin/pip install --no-deps hqq==0.2.8.post1 auto-round==0.16.1
    OUTSIDE/bin/pip install --no-deps defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 ninja==1.13.2 pillow==13.0.0 \
pypcre==0.6.4 threadpoolctl==3.8.0 tokenicer==0.0.14 torchao==0.18.0
    OUTSIDE/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0

``--no-deps`` keeps them from replacing PyTorch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.baselines.layer import Settings
from lbllm.baselines.methods import METHODS, method, quantize_blocks
from lbllm.checkpoints.find import find_checkpoint, find_teacher, open_teacher
from lbllm.checkpoints.hf import load
from lbllm.config import DEFAULT_MODEL, make_config
from lbllm.errors import ConfigError, LbllmError
from lbllm.events import RunStarted
from lbllm.labels import FORMAT_NAMES
from lbllm.measure.perplexity import perplexity
from lbllm.measure.zero_shot import task_names, zero_shot
from lbllm.memory import peak_memory
from lbllm.models.blocks import check_length, decoder_blocks, linear_layers
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.run import run
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.packed_layer import PackedLinear, named_groups
from lbllm.sections import PAPER_STAGES, Format
from lbllm.texts.catalogue import parts
from lbllm.texts.corpus import Corpus, load_corpus
from lbllm.texts.windows import evaluation_tokens

OWN = {f"stage{number}": PAPER_STAGES[:number] for number in (1, 2, 3)}
OUTSIDE = {"hqq": "HQQ", "auto-round": "AutoRound", "gptqmodel": "GPTQModel"}
ALL_WINDOWS = 128  # of a text without an end of its own
# Keys of a measured row that are not its figures.
ABOUT = ("label", "kind", "act_bits", "bits", "questions", "minutes", "memory_mb")


@dataclass(frozen=True)
class Options:
    """What all rows share. ``window``: tokens of an evaluated window, ``limit``: how many of each text, ``act_bits``:
    of the layers' inputs, for each time that a model without bits of its own is evaluated; ``act_group_size``: inputs
    that share a range; ``param_bits``: of our own stages' group parameters; ``format``: of our own stages."""

    teacher: str
    corpus: str
    tokens: int
    seq_len: int
    damping: float
    texts: tuple[str, ...]
    window: int
    limit: int | None
    act_bits: tuple[int, ...]
    act_group_size: int
    param_bits: int
    tasks: tuple[str, ...]
    task_limit: int | None
    outside: str | None
    format: Format = "w1+1"


@dataclass(frozen=True)
class Row:
    """One model of the table. ``name``: a method's, or any name of a checkpoint."""

    kind: Literal["teacher", "baseline", "own", "outside", "checkpoint"]
    name: str
    group_size: int = 0


@dataclass(frozen=True)
class Made:
    """A model to evaluate. ``act_bits``: its own bits, 16 if activations are not quantized."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    bpw: float | None = None
    minutes: float | None = None
    memory: int | None = None
    act_bits: int = 16


def measure(row: Row, options: Options, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """One model in this process: a row for each number of activation bits, as ``--out`` keeps it. Perplexities stand
    under the names of their texts, accuracies with their standard errors under those of their tasks."""
    made = make(row, options, report)
    for setting, tokens in (("--window", options.window), ("--seq-len", options.seq_len)):
        check_length(made.model, tokens, setting)
    cost = {} if made.minutes is None else {"minutes": made.minutes}
    cost |= {} if made.memory is None else {"memory_mb": round(made.memory / 1e6)}
    rows: list[dict[str, Any]] = []
    own_bits = row.kind in ("own", "checkpoint")
    for act_bits in (made.act_bits,) if own_bits else options.act_bits:
        rows.append({"label": made.label, "kind": row.kind, "act_bits": act_bits, "bits": made.bpw})
        if act_bits < made.act_bits:
            quantize_inputs(made.model, act_bits, options.act_group_size)
        for text in options.texts:
            report(f"perplexity on {text}{suffix(act_bits)}")
            rows[-1][text] = perplexity(made.model, windows(text, made.tokenizer, options)).perplexity
        scores = list(zero_shot(made.model, made.tokenizer, options.tasks, limit=options.task_limit))
        for score in scores:
            rows[-1] |= {score.task: score.accuracy, f"{score.task}_stderr": score.stderr}
        if scores:
            average = fmean(score.accuracy for score in scores)
            rows[-1] |= {"average": average, "questions": options.task_limit}
        rows[-1] |= cost
    return rows


def suffix(act_bits: int) -> str:
    """What the name of a column says of activation bits."""
    return "" if act_bits == 16 else f", A{act_bits}"


def make(row: Row, options: Options, report: Callable[[str], None]) -> Made:
    """The row's model, quantized now or read. Raises LbllmError."""
    if row.kind == "checkpoint":
        model, tokenizer = load(find_checkpoint(row.name).folder)
        layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
        for layer in layers:
            layer.keep_dense(torch.float32)
        stored: Any = model.config.quantization_config
        quant = stored.quant
        label = f"{Path(row.name)}, A{quant['act_bits']}KV{quant['kv_bits']}, {named_groups(layers)}"
        return Made(model, tokenizer, label, bpw=stored.bpw, act_bits=quant["act_bits"])
    teacher = open_teacher(options.teacher)
    if row.kind == "teacher":
        return Made(teacher.model, teacher.tokenizer, f"Teacher, {teacher.precision}")
    corpus = load_corpus(options.corpus, teacher.tokenizer, seq_len=options.seq_len, tokens=options.tokens)
    if corpus.tokens < options.tokens:
        raise ConfigError(f"corpus {options.corpus} has {corpus.tokens} tokens for --tokens {options.tokens}")
    began = time.perf_counter()
    act_bits = 16
    if row.kind == "baseline":
        chosen = method(row.name)
        settings = Settings(row.group_size, damping=options.damping)
        label = chosen.name

        def on_block(done: int, total: int) -> None:
            report(f"{chosen.name}: block {done} of {total}")

        bpw = quantize_blocks(teacher.model, corpus.sequences, chosen, settings, on_block=on_block).bpw
        model = teacher.model
    elif row.kind == "own":
        label = f"Stages 1 to {row.name[-1]}" if row.name != "stage1" else "Stage 1"
        if options.format != "w1+1":
            label += f", {FORMAT_NAMES[options.format]}"
        if options.param_bits < 16:
            label += f", {options.param_bits}-bit parameters"
        model, bpw, act_bits = own_stages(row, options, teacher, corpus)
    else:
        label = OUTSIDE[row.name]
        report(f"{label}: {options.outside}")
        model, bpw, minutes, memory = outside(row, options, teacher, corpus.sequences)
        return Made(model, teacher.tokenizer, f"{label}, group {row.group_size}", bpw, minutes, memory)
    minutes = (time.perf_counter() - began) / 60
    label = f"{label}, group {row.group_size}"
    return Made(model, teacher.tokenizer, label, bpw, minutes, peak_memory(), act_bits)


def own_stages(row: Row, options: Options, teacher: Teacher, corpus: Corpus) -> tuple[PreTrainedModel, float, int]:
    """The model after this program's own stages, its bits per weight and activation bits."""
    stages = OWN[row.name]
    act_bits = 4 if "aar" in stages else 16
    changes: dict[str, Any] = {"model": options.teacher, "corpus": options.corpus, "seq_len": options.seq_len}
    changes["stages"] = stages
    for stage in stages:
        changes[stage] = {"tokens": options.tokens}
    bits: dict[str, Any] = {"format": options.format, "param_bits": options.param_bits}
    bits |= {"act_bits": act_bits, "kv_bits": act_bits}
    bits["act_group_size"] = options.act_group_size
    changes |= {"quant": {"group_size": row.group_size} | bits}
    config = make_config("quick", changes)
    with tempfile.TemporaryDirectory() as folder:
        events = run(config, Path(folder), request=lambda: None, teacher=teacher, corpus=corpus)
        started = [event for event in events if isinstance(event, RunStarted)]
        return stage_model(config, Path(folder), stages[-1], teacher), started[0].bpw, act_bits


def outside(
    row: Row, options: Options, teacher: Teacher, sequences: Tensor
) -> tuple[PreTrainedModel, float, float, int]:
    """The dense model that another package leaves, its bits per weight, minutes and peak memory."""
    script = Path(__file__).with_name("quality_outside.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher.model.save_pretrained(folder / "teacher")
        teacher.tokenizer.save_pretrained(folder / "teacher")
        save_file({"input_ids": sequences}, folder / "tokens.safetensors")
        path, _ = decoder_blocks(teacher.model)
        command = [f"{options.outside}/bin/python", str(script), row.name, str(folder), path, str(row.group_size)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise LbllmError(f"{row.name} in {options.outside} failed: {last[0]}")
        told = json.loads(done.stdout.splitlines()[-1])
        model = load_teacher(str(folder / "quantized")).model
    return model, told["bpw"], told["seconds"] / 60, told["memory"]


def quantize_inputs(model: PreTrainedModel, bits: int, group_size: int) -> None:
    """Let the blocks' linear layers see their inputs in so many bits: with a range for each token, or for so many of
    its features, asymmetric, even steps, no tails."""
    quantizer = ActQuantizer(bits, tail=0, group_size=group_size)

    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (quantizer(args[0]), *args[1:])

    for block in decoder_blocks(model)[1]:
        for layer in linear_layers(block).values():
            layer.register_forward_pre_hook(hook)


def windows(text: str, tokenizer: PreTrainedTokenizerBase, options: Options) -> Tensor:
    """Windows (n, T) of WikiText-2's test split, of a file, or of a corpus: of one that is calibrated on, the held-out
    part."""
    if text == "wikitext2" or Path(text).is_file():
        return evaluation_tokens(text, tokenizer, seq_len=options.window, limit=options.limit)
    tokens = (options.limit or ALL_WINDOWS) * options.window
    part: Literal["heldout", "train"] = "heldout" if text in parts(options.corpus) else "train"
    return load_corpus(text, tokenizer, seq_len=options.window, tokens=tokens, part=part).sequences


def figures(row: dict[str, Any]) -> dict[str, str]:
    """The figures of a measured row as they are printed, by their columns."""
    found: dict[str, str] = {}
    for key, value in row.items():
        if key in ABOUT or key.endswith("_stderr"):
            continue
        error = row.get(f"{key}_stderr")
        if error is not None:
            cell = f"{value:.1%} ± {error:.1%}"
        else:
            cell = f"{value:.1%}" if key == "average" else f"{value:,.2f}"
        found[f"{key}{suffix(row['act_bits'])}"] = cell
    return found


def table(models: list[list[dict[str, Any]]]) -> str:
    """Models as ``measure`` gives them as a Markdown table of a line each; a column that a model has nothing for stays
    empty."""
    shown = [{column: cell for row in rows for column, cell in figures(row).items()} for rows in models]
    columns = list(dict.fromkeys(column for cells in shown for column in cells))
    columns.sort(key=lambda column: column.endswith(", A4"))
    lines = []
    for (row, *_), cells in zip(models, shown, strict=True):
        bpw = "" if row["bits"] is None else f"{row['bits']:.3f}"
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
        memory = f"{row['memory_mb']}" if "memory_mb" in row else ""
        lines.append([row["label"], bpw, *(cells.get(column, "") for column in columns), minutes, memory])
    return markdown.table(["", "bits per weight", *columns, "minutes", "peak, MB"], lines)


def rows_of(methods: str, sizes: str, checkpoints: list[str], outside: str | None) -> list[Row]:
    """The table's rows: the teacher, each method at each group size, checkpoints. Raises ConfigError."""
    rows = [Row("teacher", "")]
    for name in filter(None, methods.split(",")):
        kind: Literal["baseline", "own", "outside"] = (
            "own" if name in OWN else "outside" if name in OUTSIDE else "baseline"
        )
        if kind == "baseline" and name not in METHODS:
            raise ConfigError(f"--methods {name}: choose from {', '.join((*METHODS, *OWN, *OUTSIDE))}")
        if kind == "outside" and outside is None:
            raise ConfigError(f"--methods {name} needs --outside with the environment that it is installed in")
        for size in sizes.split(","):
            rows.append(Row(kind, name, size_of(size, "--group-sizes")))
    return rows + [Row("checkpoint", folder) for folder in checkpoints]


def size_of(text: str, setting: str) -> int:
    """The size of a group that a setting names. Raises ConfigError."""
    if not text.removeprefix("-").isdigit() or int(text) < -1 or int(text) == 0:
        raise ConfigError(f"{setting} {text}: a size is 1 or more, or -1 for a whole row")
    return int(text)


def own_process(row: Row) -> list[dict[str, Any]] | None:
    """What ``measure`` gives of a row, by this program called again with the same arguments; None where that failed."""
    command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], "--row", json.dumps(asdict(row))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        progress(f"{row.kind} {row.name} {row.group_size}: no row, see above")
        return None
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    progress(table([found]))  # hours may pass until all rows are there
    return found


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--teacher", default=DEFAULT_MODEL)
    parser.add_argument("--methods", default="rtn,gptq,billm,arb,bwa", help=", ".join((*METHODS, *OWN, *OUTSIDE)))
    parser.add_argument("--group-sizes", default="128", help="joined by commas; -1: the whole row")
    packed = "packed: its folder, a finished run's id, or shipped; may be repeated"
    parser.add_argument("--checkpoint", action="append", default=[], metavar="CHECKPOINT", help=packed)
    parser.add_argument("--corpus", default="embedded", help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=24_576, help="to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence that is calibrated on")
    parser.add_argument("--damping", type=float, default=0.01, help="of the Hessians, as published; not of the stages")
    parser.add_argument("--texts", default="wikitext2,c4", help="for perplexity: wikitext2, corpora, files")
    parser.add_argument("--window", type=int, default=2_048)
    parser.add_argument("--limit", type=int, help="windows of each text; all by default")
    parser.add_argument(
        "--act-bits", default="16", choices=("16", "4", "16,4"), help="of the inputs; 16: not quantized"
    )
    parser.add_argument("--act-group-size", default="-1", help="inputs that share a range; -1: all of a token")
    parser.add_argument("--param-bits", type=int, default=16, choices=(16, 8, 4), help="of our own stages' groups")
    parser.add_argument("--format", default="w1+1", choices=tuple(FORMAT_NAMES), help="of our own stages")
    parser.add_argument("--tasks", help="zero-shot tasks joined by commas, or all")
    parser.add_argument("--task-limit", type=int, help="questions of each task; all by default")
    parser.add_argument("--outside", metavar="ENV", help="environment of hqq, auto-round and gptqmodel")
    parser.add_argument("--jobs", type=count, default=1, help="rows made at once, each in a process of its own")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = Options(
        **{name: getattr(given, name) for name in ("teacher", "corpus", "tokens", "seq_len", "damping")},
        **{name: getattr(given, name) for name in ("window", "limit", "task_limit", "outside", "format")},
        param_bits=given.param_bits,
        act_group_size=size_of(given.act_group_size, "--act-group-size"),
        act_bits=tuple(int(bits) for bits in given.act_bits.split(",")),
        texts=tuple(given.texts.split(",")),
        tasks=tuple(task_names(given.tasks)) if given.tasks else (),
    )
    if given.row:
        print(json.dumps(measure(Row(**json.loads(given.row)), options, progress)))
        return
    rows = rows_of(given.methods, given.group_sizes, given.checkpoint, given.outside)
    find_teacher(options.teacher)
    for name in given.checkpoint:
        find_checkpoint(name)
    threads = f"{torch.get_num_threads()} threads" + (f" a row, {given.jobs} rows at once" if given.jobs > 1 else "")
    print(f"{given.tokens:,} tokens of {given.corpus}, {threads}, {date.today()}", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        models = [found for found in pool.map(own_process, rows) if found is not None]
    print(table(models))
    if given.out:
        write_report(given.out, "quality", settings_of(given, "row"), [row for model in models for row in model])


if __name__ == "__main__":
    main()
