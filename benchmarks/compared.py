"""Make one model of a comparison by a method's name, and evaluate it: for ``benchmarks.quality`` and
``benchmarks.frontier``.

Every method quantizes all decoder blocks of the same teacher, in order, calibrated on the same tokens. Other packages
run in an environment of their own, see ``benchmarks.quality``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.baselines.efficient_qat import Training, efficient_qat
from lbllm.baselines.even import even_stages
from lbllm.baselines.layer import Settings
from lbllm.baselines.methods import StoredLayer, method, quantize_blocks
from lbllm.checkpoints.find import find_checkpoint, open_teacher
from lbllm.checkpoints.hf import attach_kv_cache, load
from lbllm.config import make_config
from lbllm.errors import ConfigError, LbllmError
from lbllm.events import RunStarted
from lbllm.labels import FORMAT_NAMES
from lbllm.machine import make_accelerator
from lbllm.measure.perplexity import perplexity
from lbllm.measure.zero_shot import QUESTIONS_SEED, zero_shot
from lbllm.memory import peak_memory
from lbllm.models.blocks import check_length, decoder_blocks, linear_layers
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.run import run
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.packed_layer import PackedLinear, named_groups
from lbllm.sections import PAPER_STAGES, STAGES, E2eConfig, Format, Stage, WatConfig
from lbllm.texts.catalogue import parts
from lbllm.texts.corpus import Corpus, load_corpus
from lbllm.texts.windows import evaluation_tokens

OWN: dict[str, tuple[Stage, ...]] = {f"stage{number}": PAPER_STAGES[:number] for number in (1, 2, 3)}
OWN |= {"stages124": tuple(stage for stage in STAGES if stage != "aar"), "stage4": STAGES}
OWN_LABELS = {f"stage{number}": f"Stages 1 to {number}" for number in (3, 4)}
OWN_LABELS |= {"stage1": "Stage 1", "stage2": "Stages 1 and 2", "stages124": "Stages 1, 2 and 4"}
OUTSIDE = {"hqq": "HQQ", "auto-round": "AutoRound", "gptqmodel": "GPTQModel"}
TRAINED = {"efficient-qat": "EfficientQAT", "even": "Even levels, our stages 1, 2 and 4"}
ALL_WINDOWS = 128  # of a text without an end of its own


@dataclass(frozen=True)
class Options:
    """What all rows share. ``window``: tokens of an evaluated window, ``limit``: how many of each text, ``act_bits``:
    of the layers' inputs, for each time that a model without bits of its own is evaluated; ``act_group_size``: inputs
    that share a range; ``kv_bits``: of the KV cache where these inputs have 4 bits; ``param_bits``: of our own stages'
    group parameters."""

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
    kv_bits: Literal[4, 16] = 16
    format: Format = "w1+1"  # of our own stages


@dataclass(frozen=True)
class Row:
    """One model of the table. ``name``: a method's, or any name of a checkpoint. ``how``: what differs from the
    method's usual settings; for our own stages, changes of a run's settings."""

    kind: Literal["teacher", "baseline", "trained", "own", "outside", "checkpoint"]
    name: str
    group_size: int = 0
    how: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A model to evaluate. ``act_bits``: its own bits, 16 if activations are not quantized; ``wide``: its layers' input
    channels that keep 8 bits where the others have 4."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    bpw: float | None = None
    minutes: float | None = None
    memory: int | None = None
    act_bits: int = 16
    wide: dict[str, Tensor] = field(default_factory=dict)


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
            quantize_inputs(made.model, act_bits, options.act_group_size, made.wide)
            attach_kv_cache(made.model, KVFormat(options.kv_bits))
        for text in options.texts:
            report(f"perplexity on {text}{suffix(act_bits)}")
            rows[-1][text] = perplexity(made.model, windows(text, made.tokenizer, options)).perplexity
        scores = list(zero_shot(made.model, made.tokenizer, options.tasks, limit=options.task_limit))
        for score in scores:
            rows[-1] |= {score.task: score.accuracy, f"{score.task}_stderr": score.stderr}
        if scores:
            average = fmean(score.accuracy for score in scores)
            asked = {"questions": options.task_limit, "seed": QUESTIONS_SEED}
            rows[-1] |= {"average": average} | (asked if options.task_limit else {})
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
    act_bits, wide = 16, {}

    def on_block(done: int, total: int | str = "all") -> None:
        report(f"{row.name}: block {done} of {total}")

    if row.kind == "baseline":
        chosen = method(row.name)
        settings = chosen.settings(group_size=row.group_size, damping=options.damping, **row.how)
        label = chosen.name
        stored = quantize_blocks(teacher.model, corpus.sequences, chosen, settings, on_block=on_block)
        model, bpw, wide = teacher.model, stored.bpw, stored.wide
    elif row.kind == "trained":
        label = TRAINED[row.name]
        model, stored = trained(row, teacher, corpus, on_block)
        bpw = stored.bpw
    elif row.kind == "own":
        label = OWN_LABELS[row.name]
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
    return Made(model, teacher.tokenizer, label, bpw, minutes, peak_memory(), act_bits, wide)


def trained(
    row: Row, teacher: Teacher, corpus: Corpus, on_block: Callable[[int], None]
) -> tuple[PreTrainedModel, StoredLayer]:
    """The model of a baseline that is trained, and what its layers take. ``row.how``: fields of ``Settings``, of
    EfficientQAT's ``Training``, or sections ``wat`` and ``e2e`` of our stages; ``seed``."""
    how = {"bits": 2, "seed": 0} | row.how
    names = {one.name for one in fields(Settings)}
    settings = Settings(row.group_size, clip=True, **{key: how.pop(key) for key in names & how.keys()})
    seed, autocast = how.pop("seed"), make_accelerator("cpu").autocast
    if row.name == "efficient-qat":
        options = Training(**how)
        return efficient_qat(
            teacher.model, corpus.sequences, settings, options, seed=seed, autocast=autocast, on_block=on_block
        )
    wat, e2e = WatConfig(**how.get("wat", {})), E2eConfig(**how.get("e2e", {}))
    return even_stages(
        teacher.model, corpus.sequences, settings, wat, e2e, seed=seed, autocast=autocast, on_block=on_block
    )


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
    for name, value in row.how.items():
        changes[name] = changes.get(name, {}) | value if isinstance(value, dict) else value
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
        how = json.dumps({"group_size": row.group_size} | row.how)
        command = [f"{options.outside}/bin/python", str(script), row.name, str(folder), path, how]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise LbllmError(f"{row.name} in {options.outside} failed: {last[0]}")
        told = json.loads(done.stdout.splitlines()[-1])
        model = load_teacher(str(folder / "quantized")).model
    return model, told["bpw"], told["seconds"] / 60, told["memory"]


def quantize_inputs(
    model: PreTrainedModel, bits: int, group_size: int, wide: Mapping[str, Tensor] | None = None
) -> None:
    """Let the blocks' linear layers see their inputs in so many bits: with a range for each token, or for so many of
    its features, asymmetric, even steps, no tails. ``wide``: channels of layers, by full name, that get 8 bits and a
    range of their own; the ranges are then those of the other channels in their order."""
    quantizer, wider = ActQuantizer(bits, tail=0, group_size=group_size), ActQuantizer(8, tail=0)

    def hooked(channels: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        @torch.no_grad()
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            if channels is None or not len(channels):
                return (quantizer(x), *args[1:])
            others = torch.ones(x.shape[-1], dtype=torch.bool)
            others[channels] = False
            result = torch.empty_like(x)
            result[..., others], result[..., channels] = quantizer(x[..., others]), wider(x[..., channels])
            return (result, *args[1:])

        return hook

    path, blocks = decoder_blocks(model)
    for number, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            layer.register_forward_pre_hook(hooked((wide or {}).get(f"{path}.{number}.{name}")))


def windows(text: str, tokenizer: PreTrainedTokenizerBase, options: Options) -> Tensor:
    """The windows (n, T) of a text that all rows are evaluated on."""
    return windows_of(text, tokenizer, options.window, options.limit, options.corpus)


def windows_of(
    text: str, tokenizer: PreTrainedTokenizerBase, window: int, limit: int | None, calibrated: str
) -> Tensor:
    """Windows (n, T) of WikiText-2's test split, of a file, or of a corpus: of one that ``calibrated`` names, the
    held-out part."""
    if text == "wikitext2" or Path(text).is_file():
        return evaluation_tokens(text, tokenizer, seq_len=window, limit=limit)
    tokens = (limit or ALL_WINDOWS) * window
    part: Literal["heldout", "train"] = "heldout" if text in parts(calibrated) else "train"
    return load_corpus(text, tokenizer, seq_len=window, tokens=tokens, part=part).sequences
