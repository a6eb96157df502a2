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
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lbllm.checkpoints.find import find_teacher
from lbllm.config import RunConfig, setting_name
from lbllm.errors import LbllmError, ResourceError
from lbllm.labels import CODE_BITS
from lbllm.machine import check_device, fastest_matmul_rate, free_memory, uses_gpu
from lbllm.measure.cache_size import CacheSize, cache_size
from lbllm.measure.needs import STREAMS, Needs, PlannedLayer, active_experts, needs, planned_layers
from lbllm.measure.perplexity import HELD_OUT_TOKENS
from lbllm.models.blocks import check_length, check_supported, decoder_blocks
from lbllm.models.experts import expert_count
from lbllm.models.teacher import skeleton
from lbllm.quant.embedding_code import SCALE, row_bytes
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.levels import PARAMS, group_length
from lbllm.quant.packed_embedding import tables
from lbllm.quant.packing import packed_shape
from lbllm.quant.plan import bits_per_weight, block_formats, layer_bits
from lbllm.quant.table import TABLE, has_table
from lbllm.runs.store import Run
from lbllm.sections import EmbeddingBits, Stage
from lbllm.stages.aar import CLIPS, KNEES
from lbllm.stages.distill import PROBE_TOKENS
from lbllm.stages.trained_table import trains_tables

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
class ExpertsShare:
    """What the experts of a mixture take. ``count``: experts of a block; ``active``: those that compute a token;
    ``weights``: of all experts; ``disk_bytes``: of their packed layers; ``seconds``: of the run's stages."""

    count: int
    active: int
    weights: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run. All sizes are in bytes, all times in seconds.

    ``bpw``: stored bits per binarized weight, with group parameters. ``disk_bytes``: the size of the checkpoint's
    weights, the sum of ``parts``. ``needs``: what the run needs of memory and disk. ``seconds``: the
    sum of ``stage_seconds`` and ``other_seconds``, which are those before, between and after the stages. ``weights``:
    the number of binarized weights. ``dense_weights``: the number of all other parameters. ``cache``: the KV cache of
    the finished model; None where that is not known. ``experts``: of a mixture.
    """

    bpw: float
    disk_bytes: int
    seconds: float
    parts: dict[str, int]
    needs: Needs
    stage_seconds: dict[Stage, float]
    other_seconds: dict[str, float]
    weights: int
    dense_weights: int
    blocks: int
    cache: CacheSize | None
    experts: ExpertsShare | None = None

    @property
    def memory_parts(self) -> dict[str, int]:
        """The memory of the machine at the run's largest moment by term."""
        return self.needs.memory

    @property
    def memory_bytes(self) -> int:
        """The run's peak memory."""
        return sum(self.needs.memory.values())

    @property
    def parameters(self) -> int:
        """The number of all parameters of the model."""
        return self.weights + self.dense_weights


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
    _, blocks, formats = block_formats(model, quant)
    layers = planned_layers(model, quant)
    weights = sum(layer.weights for layer in layers)
    parts = _disk(model, layers, quant.embedding_bits)
    rate = rate or fastest_matmul_rate(config.device)
    seconds = _seconds(config, model, layers, rate)
    active = sum(layer.share * layer.weights for layer in layers)
    others = _other_seconds(config, model, active, sum(parts.values()), rate)
    return Estimate(
        bpw=bits_per_weight(blocks, formats),
        disk_bytes=sum(parts.values()),
        seconds=sum(seconds.values()) + sum(others.values()),
        parts=parts,
        needs=needs(config, model, layers, sum(parts.values()), gpu=uses_gpu(config.device)),
        stage_seconds=seconds,
        other_seconds=others,
        weights=weights,
        dense_weights=model.num_parameters() - weights,
        blocks=len(blocks),
        cache=cache_size(model.config, KVFormat.of(quant)),
        experts=_experts(config, model, layers, rate, sum(seconds.values())),
    )


def _experts(
    config: RunConfig, model: PreTrainedModel, layers: list[PlannedLayer], rate: float, seconds: float
) -> ExpertsShare | None:
    inside = [layer for layer in layers if layer.expert]
    if not inside:
        return None
    others = [layer for layer in layers if not layer.expert]
    without = sum(_seconds(config, model, others, rate).values()) if others else 0.0
    return ExpertsShare(
        count=max(map(expert_count, decoder_blocks(model)[1])),
        active=active_experts(model),
        weights=sum(layer.weights for layer in inside),
        disk_bytes=sum(layer_bits(layer.format, layer.rows, layer.columns) for layer in inside) // 8,
        seconds=seconds - without,
    )


def expected_seconds(run: Run) -> dict[Stage, float]:
    """Return the estimated seconds of each stage of a stored run on this machine; empty if they can't be estimated."""
    try:
        return estimate(run.config).stage_seconds
    except LbllmError:
        return {}


def check_memory(result: Estimate, device: str = "auto", processes: int = 1) -> None:
    """Raise ResourceError if the run needs more memory than is free; the message says what to reduce.

    ``processes``: they share the hidden states, and each has all else, on a GPU of its own.
    """
    own = {name: size * (1 if name == STREAMS else processes) for name, size in result.needs.memory.items()}
    places = [("memory", own, "cpu")]
    if result.needs.gpu:
        places.append(("GPU memory", result.needs.gpu, device))
    for name, parts, place in places:
        needed, free = sum(parts.values()), free_memory(place)
        if needed > free:
            raise ResourceError(
                f"the run needs about {needed / 1e9:.2f} GB of {name} and {free / 1e9:.2f} GB are free. "
                f"The largest parts are: {_largest(parts)}. Free some, choose a smaller model, less text, or lower "
                f"values of {setting_name('seq_len')}, {setting_name('wat.batch_tokens')} or "
                f"{setting_name('aar.batch_tokens')}"
            )


def check_disk(result: Estimate, folder: Path) -> None:
    """Raise ResourceError if the run's files need more space than is free where ``folder`` lies or will be made."""
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(result.needs.disk.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"the run needs about {needed / 1e9:.2f} GB of disk space and {free / 1e9:.2f} GB are free in {folder}. "
            f"The largest parts are: {_largest(result.needs.disk)}. Free some, set LBLLM_HOME to a folder on another "
            "disk, or choose a smaller model or fewer stages"
        )


def _largest(parts: dict[str, int]) -> str:
    terms = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in terms[:3])


def _disk(model: PreTrainedModel, layers: list[PlannedLayer], embedding_bits: EmbeddingBits) -> dict[str, int]:
    """Return the bytes of each part of model.safetensors (layout: ``lbllm.quant.packing``; embeddings and output head:
    ``lbllm.quant.embedding_code`` if they have fewer than 16 bits; other dense tensors: bfloat16)."""
    parts = {"bits": 0, "bitmap": 0, "parameters": 0, "embeddings": 0, "output head": 0, "other": 0}
    table: dict[str, tuple[str, list[int], int]] = {}

    def add(name: str, part: str, code: str, shape: list[int], itemsize: int) -> None:
        table[name] = (code, shape, itemsize * math.prod(shape))
        parts[part] += table[name][2]

    for layer in layers:
        kind, bits = layer.format.format, layer.format.param_bits
        planes, count = CODE_BITS[kind], PARAMS[kind]
        groups = math.ceil(layer.columns / group_length(layer.format.group_size, layer.columns))
        plane = layer.rows * math.ceil(layer.columns / 8)
        add(f"{layer.name}.weight", "bits", "U8", [layer.rows, planes, plane // layer.rows], 1)
        parts["bits"] -= (planes - 1) * plane
        parts["bitmap"] += (planes - 1) * plane
        shape = [layer.rows, *packed_shape(groups, count, bits)]
        add(f"{layer.name}.params", "parameters", "F16" if bits == 16 else "U8", shape, 2 if bits == 16 else 1)
        if bits < 16:
            scale = [layer.rows] if bits == 4 else [layer.rows, count, 2]
            add(f"{layer.name}.params_scale", "parameters", "F16", scale, 2)
        if bits == 4:
            add(f"{layer.name}.params_range", "parameters", "F16", [count, 2], 2)
        if has_table(kind):
            add(f"{layer.name}.table", "parameters", "F16", [TABLE], 2)
        if layer.format.act_bits < 16:
            add(f"{layer.name}.quantizer.act", "other", "F32", [3], 4)

    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    head_name = next((name for name, module in modules.items() if module is head), "")
    rows = {f"{name}.weight" for name in tables(model)} if embedding_bits < 16 else set()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in rows and embedding_bits < 8:  # of each matrix, also of a tied one
            part = "output head" if name == f"{head_name}.weight" else "embeddings"
            add(f"{name.removesuffix('weight')}column_scale", part, "U8", [tensor.shape[1], SCALE], 1)
        if name in table or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, nn.Embedding):
            part = "embeddings"
        else:
            part = "output head" if owner is head and tensor.ndim > 1 else "other"
        if name in rows:
            add(name, part, "U8", [tensor.shape[0], row_bytes(tensor.shape[1], embedding_bits)], 1)
        else:
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


def _seconds(config: RunConfig, model: PreTrainedModel, layers: list[PlannedLayer], rate: float) -> dict[Stage, float]:
    """Return the seconds of each stage of the run on a device with ``rate`` FLOPs per second."""
    # Attention costs as much per token as this many weights: seq_len / 2 positions (causal), twice (QK and AV).
    blocks = len({layer.block for layer in layers})
    attention = blocks * config.seq_len * model.config.get_text_config().hidden_size
    weights = sum(layer.share * layer.weights for layer in layers) + attention
    columns = sum(layer.weights * layer.columns for layer in layers)
    head_weights = _head_weights(model)
    of_head = 8 if trains_tables(config) else 6  # without a gradient of its weights
    inputs = 2 if config.wat.streams == "both" else 1
    search = 2 * len(CLIPS) * len(KNEES) * config.aar.search_tokens
    probes = {stage: PROBE_TOKEN * min(PROBE_TOKENS, getattr(config, stage).tokens) for stage in config.stages}
    flops: dict[Stage, float] = {
        "ptq": PTQ_TOKEN * config.ptq.tokens * weights + PTQ_PASS * (1 + config.ptq.sweeps) * columns,
        "wat": (STREAMS_TOKEN + STEP_TOKEN * config.wat.epochs * inputs) * config.wat.tokens * weights,
        "aar": ((STREAMS_TOKEN + STEP_TOKEN * config.aar.epochs) * config.aar.tokens + search) * weights,
        # A forward pass of both models and a backward pass of the student.
        "e2e": config.e2e.epochs * config.e2e.tokens * (8 * weights + of_head * head_weights),
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
    config: RunConfig, model: PreTrainedModel, weights: float, disk_bytes: int, rate: float
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
