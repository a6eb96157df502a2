"""Estimate a run's bits per weight, disk space, memory and time from the model's config, without its weights.

    estimate(make_config("quick"))

Disk space is counted tensor by tensor, with the header: it is the size of model.safetensors up to a few bytes
(transformers renames some tensors in its files). Memory is a sum of named terms. Time is the number of FLOPs divided by
the matmul rate measured on this machine, plus what a small model's run consists of: the start of the process, the
single operations of each block, the evaluations. The constants were fitted to measured runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lbllm.checkpoints.find import find_teacher
from lbllm.config import RunConfig, setting_name
from lbllm.errors import LbllmError, ResourceError
from lbllm.machine import check_device, fastest_matmul_rate, free_memory, has_bfloat16
from lbllm.measure.perplexity import HELD_OUT_TOKENS
from lbllm.models.blocks import FORWARD_TOKENS, check_length, check_supported, linear_weight
from lbllm.models.teacher import skeleton
from lbllm.quant.levels import LEVELS, group_length
from lbllm.quant.plan import bits_per_weight, block_formats
from lbllm.runs.store import Run
from lbllm.sections import LayerFormat, Stage
from lbllm.stages.aar import CLIPS, KNEES
from lbllm.stages.distill import PROBE_TOKENS

# Memory, in bytes.
PROGRAM = 620_000_000  # interpreter, PyTorch with its threads, transformers, a tokenizer and its texts
LOGITS = 8  # per token of one sequence and vocabulary entry: logits and their logarithms while a model is measured
STREAMS_ADVANCE, STREAMS_TRAIN = 5, 3  # copies of all tokens' hidden states: while a block runs forward, or trains
FORWARD_FEATURE = 4  # per token of a forward pass, and per feature that enters or leaves a layer of a block
TRAIN_FEATURE = 14  # the same in training: kept for the backward pass, and its gradients
PTQ_INPUT = 1.3  # per token and input feature: the teacher's inputs, counted once if layers share an input
PTQ_WEIGHT = 16  # per weight of a block in stage 1: target, latent, value, index, state to save
HESSIANS = 6  # float32 matrices (in, in) of the widest layer: Hessian, drift, damped, inverse, factor, solution
WAT_WEIGHT = 39  # per weight in stage 2: latent, gradient, two moments, fake-quantized weight, masks, temporaries
AAR_WEIGHT = 28  # per weight in stage 3: index, masks of the levels, expanded weight, its gradient
AAR_INPUT, AAR_INPUT_WIDEST = 32, 64  # per token and quantized input feature: kept codes; one layer's backward pass
E2E_WEIGHT = 12  # per weight in stage 4: index, expanded weight, its gradient, parameters with two moments
E2E_LATENT = 25  # in addition if latent weights train: latent, gradient, two moments, temporaries
E2E_LOGITS = 4  # numbers per token of one sequence and vocabulary entry: both models' logits and two gradients
E2E_OTHER_LOSS = 32  # bytes for the same where the loss is not computed in one pass: its temporaries, too

# Time, in FLOPs: a forward pass takes 2 per weight and token, a backward pass 4.
PTQ_TOKEN = 12.6  # teacher and student passes, Hessians and drifts
PTQ_PASS = 15.0  # per weight and input column: EM with compensation, and each descent sweep, column by column
STREAMS_TOKEN = 4.0  # stages 2 and 3: one forward pass of the teacher's and of the student's block
STEP_TOKEN = 6.0  # the student's forward and backward pass in every epoch
PROBE_TOKEN = 4.0  # the loss of a block before and after a stage, on at most PROBE_TOKENS
# Shares of the matmul rate that the stages reach.
EFFICIENCY: dict[Stage, float] = {"ptq": 0.65, "wat": 0.55, "aar": 0.47, "e2e": 0.37}
EVALUATION_EFFICIENCY = 0.25  # windows one by one in float32, and the assembling of each student
# Seconds that do not depend on the rate of matrix products.
BLOCK_SECONDS = 0.15  # a block in a stage: its copy, its state on disk, its events
COLUMN_SECONDS = 2.5e-4  # an input column in the compensation or in a sweep of stage 1, for all layers with that input
STEP_SECONDS = 0.015  # a block's optimizer step, or its part of a step of stage 4
START_SECONDS = 8.0  # the process: interpreter, PyTorch, transformers
READ_RATE = 2e8  # bytes per second: the teacher in float32, and the checkpoint twice


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run. All sizes are in bytes, all times in seconds.

    ``bpw``: stored bits per binarized weight, with group parameters. ``disk_bytes``: the size of model.safetensors,
    the sum of ``parts``. ``memory_bytes``: the run's peak, the sum of ``memory_parts`` at that moment. ``seconds``: the
    sum of ``stage_seconds`` and ``other_seconds``, which are those before, between and after the stages. ``weights``:
    the number of binarized weights. ``dense_weights``: the number of all other parameters.
    """

    bpw: float
    disk_bytes: int
    memory_bytes: int
    seconds: float
    parts: dict[str, int]
    memory_parts: dict[str, int]
    stage_seconds: dict[Stage, float]
    other_seconds: dict[str, float]
    weights: int
    dense_weights: int
    blocks: int

    @property
    def parameters(self) -> int:
        """The number of all parameters of the model."""
        return self.weights + self.dense_weights


@dataclass(frozen=True)
class _Layer:
    """A layer to binarize: module path, number of its block, shape (rows, columns) = (out, in), format."""

    name: str
    block: int
    rows: int
    columns: int
    format: LayerFormat

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def estimate(config: RunConfig, *, model: PreTrainedModel | None = None, rate: float | None = None) -> Estimate:
    """Estimate a run before it starts. Raises ModelError, ConfigError.

    ``model``: the config's ``skeleton``, made here if not given. ``rate``: the device's ``fastest_matmul_rate`` in
    FLOPs per second, measured here if not given. A caller that estimates often should keep both.
    """
    check_device(config.device)
    if model is None:
        find_teacher(config.model)
        model = skeleton(config.model)
    check_supported(model)
    check_length(model, config.seq_len, setting_name("seq_len"))
    quant = config.precision(config.stages[-1])
    path, blocks, formats = block_formats(model, quant)
    layers = []
    for number, named in enumerate(formats):
        for name, fmt in named.items():
            rows, columns = linear_weight(blocks[number].get_submodule(name)).shape
            layers.append(_Layer(f"{path}.{number}.{name}", number, rows, columns, fmt))
    weights = sum(layer.weights for layer in layers)
    parts = _disk(model, layers)
    memory = _memory(config, model, layers, sum(parts.values()))
    rate = rate or fastest_matmul_rate(config.device)
    seconds = _seconds(config, model, layers, rate)
    others = _other_seconds(config, model, weights, sum(parts.values()), rate)
    return Estimate(
        bpw=bits_per_weight(blocks, formats),
        disk_bytes=sum(parts.values()),
        memory_bytes=sum(memory.values()),
        seconds=sum(seconds.values()) + sum(others.values()),
        parts=parts,
        memory_parts=memory,
        stage_seconds=seconds,
        other_seconds=others,
        weights=weights,
        dense_weights=model.num_parameters() - weights,
        blocks=len(blocks),
    )


def expected_seconds(run: Run) -> dict[Stage, float]:
    """Return the estimated seconds of each stage of a stored run on this machine; empty if they can't be estimated."""
    try:
        return estimate(run.config).stage_seconds
    except LbllmError:
        return {}


def check_memory(result: Estimate, device: str = "auto") -> None:
    """Raise ResourceError if the run needs more memory than is free; the message says what to reduce."""
    free = free_memory(device)
    if result.memory_bytes <= free:
        return
    terms = sorted(result.memory_parts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in terms[:3])
    raise ResourceError(
        f"the run needs about {result.memory_bytes / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free. "
        f"The largest parts are: {listed}. Free some, choose a smaller model, less text, or lower values of "
        f"{setting_name('seq_len')}, {setting_name('wat.batch_tokens')} or {setting_name('aar.batch_tokens')}"
    )


def _disk(model: PreTrainedModel, layers: list[_Layer]) -> dict[str, int]:
    """Return the bytes of each part of model.safetensors (layout: ``lbllm.quant.packing``; dense tensors: bfloat16)."""
    parts = {"bits": 0, "bitmap": 0, "parameters": 0, "embeddings": 0, "output head": 0, "other": 0}
    table: dict[str, tuple[str, list[int], int]] = {}

    def add(name: str, part: str, code: str, shape: list[int], itemsize: int) -> None:
        table[name] = (code, shape, itemsize * math.prod(shape))
        parts[part] += table[name][2]

    for layer in layers:
        levels, bits = LEVELS[layer.format.format], layer.format.param_bits
        groups = math.ceil(layer.columns / group_length(layer.format.group_size, layer.columns))
        plane = layer.rows * math.ceil(layer.columns / 8)
        add(f"{layer.name}.weight", "bits", "U8", [layer.rows, levels // 2, plane // layer.rows], 1)
        if levels == 4:
            parts["bits"] -= plane
            parts["bitmap"] += plane
        shape = [layer.rows, groups, levels // 2 if bits == 4 else levels]
        add(f"{layer.name}.params", "parameters", "F16" if bits == 16 else "U8", shape, 2 if bits == 16 else 1)
        if bits < 16:
            scale = [layer.rows] if bits == 4 else [layer.rows, levels, 2]
            add(f"{layer.name}.params_scale", "parameters", "F16", scale, 2)
        if bits == 4:
            add(f"{layer.name}.params_range", "parameters", "F16", [levels, 2], 2)
        if layer.format.act_bits < 16:
            add(f"{layer.name}.quantizer.act", "other", "F32", [3], 4)

    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in table or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, nn.Embedding):
            part = "embeddings"
        else:
            part = "output head" if owner is head and tensor.ndim > 1 else "other"
        add(name, part, "BF16", list(tensor.shape), 2)
    parts["other"] += _header_bytes(table)
    return parts


def _header_bytes(table: dict[str, tuple[str, list[int], int]]) -> int:
    """Return the size of a safetensors header: a length, and a JSON table padded to a multiple of 8 bytes.

    ``table``: type, shape and size in bytes of each tensor. The file orders tensors by type, the widest first, and then
    by name.
    """
    widths = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    # Among types of the same width, the format puts bfloat16 last.
    ranks = {"F32": 0, "BF16": 1, "F16": 2, "U8": 3}
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(table, key=lambda name: (-widths[table[name][0]], ranks[table[name][0]], name)):
        code, shape, size = table[name]
        document[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    length = len(json.dumps(document, separators=(",", ":")).encode())
    return 8 + length + -length % 8


def _memory(config: RunConfig, model: PreTrainedModel, layers: list[_Layer], disk_bytes: int) -> dict[str, int]:
    """Return the peak memory in bytes by term: the program, the teacher, and the terms of the run's largest moment."""
    blocks: dict[int, list[_Layer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    features = max(sum(layer.columns + layer.rows for layer in block) for block in blocks.values())
    inputs = max(sum(layer.columns for layer in block) for block in blocks.values())
    weights = max(sum(layer.weights for layer in block) for block in blocks.values())
    widest = max(layer.columns for layer in layers)
    forward = FORWARD_FEATURE * max(config.seq_len, FORWARD_TOKENS) * features
    streams, activations, state = "hidden states of all tokens", "activations of a batch", "block in training"

    stored = model.config.dtype
    read = stored.itemsize if isinstance(stored, torch.dtype) and stored != torch.float32 else 0
    text = model.config.get_text_config()
    moments = [
        {"weights file being read": read * model.num_parameters()},
        {
            "logits of one sequence": LOGITS * config.seq_len * text.vocab_size,
            "packed model being measured": disk_bytes
            + 4 * (model.num_parameters() - sum(layer.weights for layer in layers)),
        },
        {"checkpoint being written": 2 * disk_bytes},
    ]
    for stage in config.stages:
        settings = getattr(config, stage)
        if stage == "e2e":
            kept = (TRAIN_FEATURE * sum(layer.columns + layer.rows for layer in layers)) * config.e2e_seq_len
            number = 2 if has_bfloat16() or config.device not in ("auto", "cpu") else 4
            each_logit = E2E_LOGITS * number if config.e2e.loss == "forward_kl" else E2E_OTHER_LOSS
            logits = each_logit * config.e2e_seq_len * text.vocab_size
            head = 2 * text.hidden_size * text.vocab_size if number == 2 else 0  # a copy for the products
            each = E2E_WEIGHT + (E2E_LATENT if config.e2e.lr_weight > 0 else 0)
            training = each * sum(layer.weights for layer in layers) + head
            moments.append({activations: kept, "logits of one sequence": logits, "weights in training": training})
            continue
        stream = 4 * text.hidden_size * config.seq_len * math.ceil(settings.tokens / config.seq_len)
        moments.append({streams: STREAMS_ADVANCE * stream, activations: forward})
        if stage == "ptq":
            solving = PTQ_WEIGHT * weights + HESSIANS * 4 * widest**2
            teacher_inputs = round(PTQ_INPUT * inputs * settings.tokens)
            moments.append({streams: STREAMS_TRAIN * stream + teacher_inputs, activations: forward, state: solving})
            continue
        batch = max(config.seq_len, settings.batch_tokens)
        kept = TRAIN_FEATURE * features * batch
        if stage == "aar":
            kept += (AAR_INPUT * inputs + AAR_INPUT_WIDEST * widest) * batch
        training = (WAT_WEIGHT if stage == "wat" else AAR_WEIGHT) * weights
        moments.append({streams: STREAMS_TRAIN * stream, activations: kept, state: training})
    most = max(moments, key=lambda moment: sum(moment.values()))
    return {"program": PROGRAM, "teacher in float32": 4 * model.num_parameters()} | most


def _seconds(config: RunConfig, model: PreTrainedModel, layers: list[_Layer], rate: float) -> dict[Stage, float]:
    """Return the seconds of each stage of the run on a device with ``rate`` FLOPs per second."""
    # Attention costs as much per token as this many weights: seq_len / 2 positions (causal), twice (QK and AV).
    blocks = len({layer.block for layer in layers})
    attention = blocks * config.seq_len * model.config.get_text_config().hidden_size
    weights = sum(layer.weights for layer in layers) + attention
    columns = sum(layer.weights * layer.columns for layer in layers)
    head_weights = _head_weights(model)
    search = 2 * len(CLIPS) * len(KNEES) * config.aar.search_tokens
    probes = {stage: PROBE_TOKEN * min(PROBE_TOKENS, getattr(config, stage).tokens) for stage in config.stages}
    flops: dict[Stage, float] = {
        "ptq": PTQ_TOKEN * config.ptq.tokens * weights + PTQ_PASS * (1 + config.ptq.sweeps) * columns,
        "wat": (STREAMS_TOKEN + STEP_TOKEN * config.wat.epochs) * config.wat.tokens * weights,
        "aar": ((STREAMS_TOKEN + STEP_TOKEN * config.aar.epochs) * config.aar.tokens + search) * weights,
        # A forward pass of both models and a backward pass of the student; the output head has no trained weights.
        "e2e": config.e2e.epochs * config.e2e.tokens * (8 * weights + 6 * head_weights),
    }

    def steps(stage: Stage, tokens_at_once: int) -> int:
        settings = getattr(config, stage)
        return int(settings.epochs * math.ceil(settings.tokens / tokens_at_once))

    # Layers with the same input are solved together; here, those with as many columns in the same part of a block.
    solved = sum(columns for _, _, columns in {(x.block, x.name.rpartition(".")[0], x.columns) for x in layers})
    operations: dict[Stage, float] = {
        "ptq": COLUMN_SECONDS * (1 + config.ptq.sweeps) * solved,
        "wat": STEP_SECONDS * blocks * steps("wat", max(config.seq_len, config.wat.batch_tokens)),
        "aar": STEP_SECONDS * blocks * steps("aar", max(config.seq_len, config.aar.batch_tokens)),
        "e2e": STEP_SECONDS * blocks * steps("e2e", config.e2e_seq_len),
    }
    return {
        stage: (flops[stage] + probes[stage] * weights) / (rate * EFFICIENCY[stage])
        + operations[stage]
        + BLOCK_SECONDS * blocks
        for stage in config.stages
    }


def _other_seconds(
    config: RunConfig, model: PreTrainedModel, weights: int, disk_bytes: int, rate: float
) -> dict[str, float]:
    """Return the seconds of the run outside its stages, in the order in which they pass."""
    # The teacher, the starting checkpoint if there is one, and the model after each stage.
    evaluated = (1 + len(config.origins)) * HELD_OUT_TOKENS
    return {
        "loading": START_SECONDS + 4 * model.num_parameters() / READ_RATE,
        "evaluation": 2 * evaluated * (weights + _head_weights(model)) / (rate * EVALUATION_EFFICIENCY),
        "saving": 2 * disk_bytes / READ_RATE,
    }


def _head_weights(model: PreTrainedModel) -> int:
    text = model.config.get_text_config()
    return int(text.hidden_size * text.vocab_size)
