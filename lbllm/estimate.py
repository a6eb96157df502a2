"""What a run will give and take, from the model's config alone: bits per weight, disk, memory, time.

    estimate(make_config("quick"))

Disk is counted tensor by tensor, header included, so it is the size of model.safetensors to the byte. Memory is a sum
of named terms, time is a count of FLOPs over the matmul rate measured on this machine; their constants come from
measured runs (docs/results.md).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from lbllm.binarize import LEVELS, group_length
from lbllm.blocks import check_supported, decoder_blocks, linear_layers, linear_weight
from lbllm.config import WHOLE_ROW, LayerFormat, QuantConfig, RunConfig, Stage
from lbllm.errors import ConfigError, ResourceError
from lbllm.models import skeleton

# FLOPs per weight and token of each stage's work on a block; a forward pass is 2, a backward pass 4.
PTQ_TOKEN = 10.0  # teacher and student forward passes and the Hessians
WAT_TOKEN, WAT_TOKEN_EPOCH = 2.0, 6.0  # the teacher once; the student's step in every epoch
AAR_TOKEN, AAR_TOKEN_EPOCH = 4.0, 6.0  # the same, and the search of the knees
# Stage 1 besides the tokens: FLOPs per weight and input column of the compensation and of each descent sweep.
PTQ_COLUMN, PTQ_COLUMN_SWEEP = 2.0, 2.0
# The share of the measured matmul rate that each stage reaches.
EFFICIENCY: dict[Stage, float] = {"ptq": 0.4, "wat": 0.5, "aar": 0.3}

PROGRAM_BYTES = 420_000_000  # interpreter, PyTorch, transformers and a tokenizer
STREAMS = 3  # hidden states kept for all tokens: the block's input from teacher and student, the teacher's output
TRAINING_BYTES = 24  # per weight of the block in training: latent, gradient, two moments, two temporaries, float32 each
HESSIAN_COPIES = 4  # of the largest (in, in) float32 matrix: the Hessian, its inverse, the factor, a temporary
ACTIVATION_BYTES = 8  # per feature that enters or leaves a layer of the block, for each token of a batch

_SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
_PLANES = {"w1+1": 2, "w1": 1}


@dataclass(frozen=True)
class Estimate:
    """``bpw``: stored bits per binarized weight, group parameters counted. All sizes in bytes, all times in seconds.

    ``parts`` sums to ``disk_bytes``, the size of model.safetensors; ``memory_parts`` to ``memory_bytes``, the run's
    peak; ``stage_seconds`` to ``seconds``. ``weights`` are binarized, ``dense_weights`` are all other parameters.
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


@dataclass(frozen=True)
class LayerPlan:
    """One layer to binarize: its module path, shape and format."""

    name: str
    out_features: int
    in_features: int
    format: LayerFormat

    @property
    def weights(self) -> int:
        """Weights in the layer."""
        return self.out_features * self.in_features

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The packed tensors that replace the layer's weight, by name: dtype and shape."""
        out, count = self.out_features, LEVELS[self.format.format]
        groups = math.ceil(self.in_features / group_length(self.format.group_size, self.in_features))
        planes = _PLANES[self.format.format]
        small = self.format.param_bits == 8
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{self.name}.weight": (torch.uint8, (out, planes, math.ceil(self.in_features / 8))),
            f"{self.name}.params": (torch.uint8 if small else torch.float16, (out, groups, count)),
        }
        if small:
            tensors[f"{self.name}.params_scale"] = (torch.float16, (out, count, 2))
        if self.format.act_bits < 16:
            tensors[f"{self.name}.act"] = (torch.float32, (3,))
        return tensors


def estimate(config: RunConfig) -> Estimate:
    """Everything that can be said before the run. Raises ModelError, ConfigError."""
    model = skeleton(config.model)
    plans = plan_layers(model, config.quant)
    _, blocks = decoder_blocks(model)
    weights = sum(plan.weights for plan in plans)
    parts, stored_bits = _disk(model, plans)
    memory = _memory(config, model, plans, sum(parts.values()))
    seconds = _seconds(config, model, plans)
    return Estimate(
        bpw=stored_bits / weights,
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


def plan_layers(model: PreTrainedModel, quant: QuantConfig) -> list[LayerPlan]:
    """The layers to binarize, in the model's order. Raises ModelError, and ConfigError where settings don't fit it."""
    check_supported(model)
    path, blocks = decoder_blocks(model)
    shapes = {
        f"{path}.{index}.{name}": tuple(linear_weight(layer).shape)
        for index, block in enumerate(blocks)
        for name, layer in linear_layers(block).items()
    }
    for setting, patterns in (("skip", quant.skip), ("overrides", tuple(quant.overrides))):
        for pattern in patterns:
            if not any(QuantConfig(skip=(pattern,)).layer(name) is None for name in shapes):
                raise ConfigError(
                    f"quant.{setting}: the pattern {pattern!r} matches no layer; "
                    f"layers are named like {next(iter(shapes))}"
                )
    plans = []
    for name, (out_features, in_features) in shapes.items():
        layer_format = quant.layer(name)
        if layer_format is None:
            continue
        size = layer_format.group_size
        if size != WHOLE_ROW and size > in_features:
            raise ConfigError(
                f"group_size {size} is larger than a row of {name}, which has {in_features} weights; "
                f"use at most {in_features}, or -1 for one group a row"
            )
        plans.append(LayerPlan(name, out_features, in_features, layer_format))
    if not plans:
        raise ConfigError(f"quant.skip = {list(quant.skip)} leaves no layer to binarize")
    return plans


def check_memory(result: Estimate, device: str = "auto") -> None:
    """Raises ResourceError where the run needs more memory than is free, saying what takes it and what to reduce."""
    free = free_memory(device)
    if result.memory_bytes <= free:
        return
    terms = sorted(result.memory_parts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in terms[:3])
    raise ResourceError(
        f"the run needs {result.memory_bytes / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free. "
        f"It goes to: {listed}. Free some, choose a smaller model, or lower seq_len, wat.batch_tokens, "
        "aar.batch_tokens or the stages' tokens"
    )


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


def matmul_rate(device: str = "auto") -> float:
    """FLOPs a second of a large matrix product, in the faster of float32 and bfloat16; takes about 0.2 s."""
    place = "cuda" if _uses_gpu(device) else "cpu"
    # bfloat16 can be a hundred times slower than float32 where the processor lacks it: small products decide.
    dtype = max((torch.float32, torch.bfloat16), key=lambda dtype: _rate(256, dtype, place, 0.02))
    return _rate(4096 if place == "cuda" else 1024, dtype, place, 0.12)


def _rate(size: int, dtype: torch.dtype, place: str, seconds: float) -> float:
    """FLOPs a second of (size, size) products, measured for ``seconds`` after one to warm up."""
    left, right = (torch.randn(size, size, dtype=dtype, device=place) for _ in range(2))
    began, done = 0.0, -1
    while done < 1 or time.perf_counter() - began < seconds:
        product = left @ right
        if place == "cuda":
            torch.cuda.synchronize()
        done += 1
        if done == 0:
            began = time.perf_counter()
    del product
    return done * 2 * size**3 / (time.perf_counter() - began)


def _disk(model: PreTrainedModel, plans: list[LayerPlan]) -> tuple[dict[str, int], int]:
    """Bytes by part of model.safetensors, and the stored bits of the binarized weights."""
    parts = {"bits": 0, "bitmap": 0, "parameters": 0, "embeddings": 0, "output head": 0, "other": 0}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for plan in plans:
        for name, (dtype, shape) in plan.tensors().items():
            size = dtype.itemsize * math.prod(shape)
            tensors[name] = (dtype, shape)
            if name.endswith(".weight"):
                parts["bits"] += size // shape[1]
                parts["bitmap"] += size - size // shape[1]
            else:
                parts["other" if name.endswith(".act") else "parameters"] += size
    stored_bits = 8 * (parts["bits"] + parts["bitmap"] + parts["parameters"])
    packed = {f"{plan.name}.weight" for plan in plans}
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in packed or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        tensors[name] = (dtype, tuple(tensor.shape))
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, nn.Embedding):
            part = "embeddings"
        else:
            part = "output head" if owner is head and tensor.ndim > 1 else "other"
        parts[part] += dtype.itemsize * tensor.numel()
    parts["other"] += _header_bytes(tensors)
    return parts, stored_bits


def _header_bytes(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes before the data of a safetensors file: a length and a JSON table, padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = offset + dtype.itemsize * math.prod(shape)
        code = _SAFETENSORS_NAMES.get(dtype, str(dtype).removeprefix("torch."))
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(table, separators=(",", ":")).encode())
    return 8 + length + -length % 8


def _memory(config: RunConfig, model: PreTrainedModel, plans: list[LayerPlan], disk_bytes: int) -> dict[str, int]:
    """Peak bytes by term, as if the largest needs of all stages met: the training state outlives the activations."""
    hidden = _hidden_size(model)
    by_block = _by_block(model, plans)
    widest = max(sum(plan.in_features + plan.out_features for plan in block) for block in by_block)
    batch = max(
        [getattr(config, stage).batch_tokens for stage in config.stages if stage != "ptq"], default=config.seq_len
    )
    trained = max(sum(plan.weights for plan in block) for block in by_block) if "wat" in config.stages else 0
    columns = max(plan.in_features for plan in plans)
    return {
        "program": PROGRAM_BYTES,
        "teacher in float32": 4 * model.num_parameters(),
        "hidden states of all tokens": STREAMS * 4 * config.tokens * hidden,
        "block in training": TRAINING_BYTES * trained,
        "Hessians": HESSIAN_COPIES * 4 * columns**2,
        "activations of a batch": ACTIVATION_BYTES * max(batch, config.seq_len) * widest,
        "checkpoint being written": disk_bytes,
    }


def _seconds(config: RunConfig, model: PreTrainedModel, plans: list[LayerPlan]) -> dict[Stage, float]:
    """Seconds of each stage of the run."""
    rate = matmul_rate(config.device)
    _, blocks = decoder_blocks(model)
    # Attention costs a token as much as this many weights: causal, so half of seq_len positions, twice (QK and AV).
    weights = sum(plan.weights for plan in plans) + len(blocks) * config.seq_len * _hidden_size(model)
    columns = sum(plan.weights * plan.in_features for plan in plans)
    flops: dict[Stage, float] = {
        "ptq": PTQ_TOKEN * config.ptq.tokens * weights + (PTQ_COLUMN + PTQ_COLUMN_SWEEP * config.ptq.sweeps) * columns,
        "wat": (WAT_TOKEN + WAT_TOKEN_EPOCH * config.wat.epochs) * config.wat.tokens * weights,
        "aar": (AAR_TOKEN + AAR_TOKEN_EPOCH * config.aar.epochs) * config.aar.tokens * weights,
    }
    return {stage: flops[stage] / (rate * EFFICIENCY[stage]) for stage in config.stages}


def _by_block(model: PreTrainedModel, plans: list[LayerPlan]) -> list[list[LayerPlan]]:
    path, blocks = decoder_blocks(model)
    found: list[list[LayerPlan]] = [[] for _ in blocks]
    for plan in plans:
        found[int(plan.name.removeprefix(f"{path}.").split(".")[0])].append(plan)
    return [block for block in found if block]


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _uses_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
