"""What a run will give and take, from the model's config alone: bits per weight, disk, memory, time.

    estimate(make_config("quick"))

Disk is counted tensor by tensor, header included: the size of model.safetensors to a few bytes (transformers gives
some tensors other names in its files). Memory is a sum of named terms, time is a count of FLOPs over the matmul rate
measured on this machine; their constants were fitted to measured runs.
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
from lbllm.machine import check_device, fastest_matmul_rate, free_memory
from lbllm.models.blocks import FORWARD_TOKENS, check_length, check_supported, linear_weight
from lbllm.models.teacher import skeleton
from lbllm.quant.levels import LEVELS, group_length
from lbllm.quant.plan import bits_per_weight, block_formats
from lbllm.runs.store import Run
from lbllm.sections import LayerFormat, Stage
from lbllm.stages.aar import CLIPS, KNEES

# Memory, in bytes.
PROGRAM = 660_000_000  # interpreter, PyTorch with its threads, transformers, a tokenizer and its texts
LOGITS = 5  # per token of one sequence and vocabulary entry: the first pass through the whole model
STREAMS_ADVANCE, STREAMS_TRAIN = 5, 3  # hidden states of all tokens held at once: while a block is passed, or trained
FORWARD_FEATURE = 4  # per feature that enters or leaves a layer of a block, and token of a forward pass
TRAIN_FEATURE = 14  # the same in training: kept for the backward pass, and its gradients
PTQ_INPUT = 1.3  # per token and input feature: the teacher's, once where layers share an input
PTQ_WEIGHT = 16  # per weight of a block in stage 1: target, latent, value, index, state to save
HESSIANS = 6  # float32 matrices (in, in) of the widest layer: Hessian, drift, damped, inverse, factor, solution
WAT_WEIGHT = 39  # per weight in stage 2: latent, gradient, two moments, fake-quantized weight, masks, temporaries
AAR_WEIGHT = 28  # per weight in stage 3: index, masks of the levels, expanded weight, its gradient
AAR_INPUT, AAR_INPUT_WIDEST = 32, 64  # per token and quantized input feature: kept codes; one layer's backward pass
E2E_WEIGHT = 12  # per weight in stage 4: index, expanded weight, its gradient, parameters with two moments
E2E_LATENT = 25  # and where latent weights train: latent, gradient, two moments, temporaries
E2E_LOGITS = 40  # per token of one sequence and vocabulary entry: both models' logits, the loss and its gradient

# Time, in FLOPs: a forward pass is 2 a weight and token, a backward pass 4.
PTQ_TOKEN = 12.6  # teacher and student passes, Hessians and drifts
PTQ_PASS = 15.0  # per weight and input column: EM with compensation, and each descent sweep, column by column
STREAMS_TOKEN = 4.0  # stages 2 and 3: teacher and student streams advance
STEP_TOKEN = 6.0  # the student's forward and backward pass in every epoch
# Shares of the matmul rate that the stages reach.
EFFICIENCY: dict[Stage, float] = {"ptq": 0.65, "wat": 0.55, "aar": 0.47, "e2e": 0.37}


@dataclass(frozen=True)
class Estimate:
    """``bpw``: stored bits per binarized weight, group parameters counted. All sizes in bytes, all times in seconds.

    ``parts`` sums to ``disk_bytes``, the size of model.safetensors; ``memory_parts`` to ``memory_bytes``, the run's
    peak, with what is held at that moment; ``stage_seconds`` to ``seconds``. ``weights`` are binarized,
    ``dense_weights`` are all other parameters.
    """

    bpw: float
    disk_bytes: int
    memory_bytes: int
    seconds: float
    parts: dict[str, int]
    memory_parts: dict[str, int]
    stage_seconds: dict[Stage, float]
    weights: int
    dense_weights: int
    blocks: int

    @property
    def fp16_bytes(self) -> int:
        """The size of the same model with 16 bits for every parameter."""
        return 2 * (self.weights + self.dense_weights)


@dataclass(frozen=True)
class _Layer:
    """A layer to binarize: module path, number of its block, shape (out, in), format."""

    name: str
    block: int
    rows: int
    columns: int
    format: LayerFormat

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def estimate(config: RunConfig, *, model: PreTrainedModel | None = None, rate: float | None = None) -> Estimate:
    """Everything that can be said before the run. Raises ModelError, ConfigError.

    ``model``, the config's ``skeleton``, and ``rate``, the device's ``fastest_matmul_rate``, are made and measured
    where they are not given: whoever asks again and again keeps them.
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
    seconds = _seconds(config, model, layers, rate or fastest_matmul_rate(config.device))
    return Estimate(
        bpw=bits_per_weight(blocks, formats),
        disk_bytes=sum(parts.values()),
        memory_bytes=sum(memory.values()),
        seconds=sum(seconds.values()),
        parts=parts,
        memory_parts=memory,
        stage_seconds=seconds,
        weights=weights,
        dense_weights=model.num_parameters() - weights,
        blocks=len(blocks),
    )


def expected_seconds(run: Run) -> dict[Stage, float]:
    """The estimated seconds of each stage of a stored run on this machine; empty where they can't be estimated."""
    try:
        return estimate(run.config).stage_seconds
    except LbllmError:
        return {}


def check_memory(result: Estimate, device: str = "auto") -> None:
    """Raises ResourceError where the run needs more memory than is free, saying what takes it and what to reduce."""
    free = free_memory(device)
    if result.memory_bytes <= free:
        return
    terms = sorted(result.memory_parts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in terms[:3])
    raise ResourceError(
        f"the run needs about {result.memory_bytes / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free. "
        f"Most of it goes to: {listed}. Free some, choose a smaller model, less text, or lower values of "
        f"{setting_name('seq_len')}, {setting_name('wat.batch_tokens')} or {setting_name('aar.batch_tokens')}"
    )


def _disk(model: PreTrainedModel, layers: list[_Layer]) -> dict[str, int]:
    """Bytes by part of model.safetensors, as ``lbllm.packing`` lays it out; what stays dense is stored in bfloat16."""
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
    """Bytes before the data of a safetensors file: a length, and a JSON table padded to 8 bytes.

    ``table``: each tensor's type, shape and bytes. The file has the wide types first, then the names in order.
    """
    widths = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    # Of the types of one width the format's own order puts bfloat16 last.
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
    """Peak bytes by term: the program, the teacher, and the terms of whichever moment of the run needs most."""
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
        {"logits of one sequence": LOGITS * config.seq_len * text.vocab_size},
        {"checkpoint being written": 2 * disk_bytes},
    ]
    for stage in config.stages:
        settings = getattr(config, stage)
        if stage == "e2e":
            kept = (TRAIN_FEATURE * sum(layer.columns + layer.rows for layer in layers)) * config.e2e_seq_len
            logits = E2E_LOGITS * config.e2e_seq_len * text.vocab_size
            each = E2E_WEIGHT + (E2E_LATENT if config.e2e.lr_weight > 0 else 0)
            training = each * sum(layer.weights for layer in layers)
            moments.append({activations: kept, "logits of one sequence": logits, "weights in training": training})
            continue
        stream = 4 * text.hidden_size * config.seq_len * math.ceil(settings.tokens / config.seq_len)
        moments.append({streams: STREAMS_ADVANCE * stream, activations: forward})
        if stage == "ptq":
            solving = PTQ_WEIGHT * weights + HESSIANS * 4 * widest**2
            meant = round(PTQ_INPUT * inputs * settings.tokens)
            moments.append({streams: STREAMS_TRAIN * stream + meant, activations: forward, state: solving})
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
    """Seconds of each stage of the run on a device of ``rate`` FLOPs a second."""
    # Attention costs a token as much as this many weights: causal, so half of seq_len positions, twice (QK and AV).
    attention = len({layer.block for layer in layers}) * config.seq_len * model.config.get_text_config().hidden_size
    weights = sum(layer.weights for layer in layers) + attention
    columns = sum(layer.weights * layer.columns for layer in layers)
    head = model.config.get_text_config()
    head_weights = head.hidden_size * head.vocab_size
    search = 2 * len(CLIPS) * len(KNEES) * config.aar.search_tokens
    flops: dict[Stage, float] = {
        "ptq": PTQ_TOKEN * config.ptq.tokens * weights + PTQ_PASS * (1 + config.ptq.sweeps) * columns,
        "wat": (STREAMS_TOKEN + STEP_TOKEN * config.wat.epochs) * config.wat.tokens * weights,
        "aar": ((STREAMS_TOKEN + STEP_TOKEN * config.aar.epochs) * config.aar.tokens + search) * weights,
        # Of both models a forward pass, of the student a backward pass; nothing trains in the output head.
        "e2e": config.e2e.epochs * config.e2e.tokens * (8 * weights + 6 * head_weights),
    }
    return {stage: flops[stage] / (rate * EFFICIENCY[stage]) for stage in config.stages}
