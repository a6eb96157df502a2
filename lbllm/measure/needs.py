"""What a run needs: memory at its largest moment, the same on a GPU, and space on disk, by named terms in bytes.

Stages 1 to 3 hold one block at a time (``lbllm.pipeline.blockwise``), so their memory depends on the largest block and
on the text, not on the number of blocks. Of the experts of a block one is there at a time, and the others are packed.
Memory is what the process cannot do without: its anonymous pages. Pages of files, such as hidden states on disk, are
not counted. The constants were fitted to measured runs (benchmarks/large.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from lbllm.checkpoints.weights import LARGEST
from lbllm.config import RunConfig
from lbllm.machine import free_memory, has_bfloat16, uses_gpu
from lbllm.measure.perplexity import BATCH_TOKENS
from lbllm.models.blocks import FORWARD_TOKENS, linear_weight
from lbllm.models.experts import expert_count, expert_layers
from lbllm.models.opened import TRIM_BYTES
from lbllm.models.streamed import LOGITS_PART
from lbllm.models.weights import PART
from lbllm.quant import levels
from lbllm.quant.chunks import CHUNK_BYTES
from lbllm.quant.levels import LEVELS, group_length
from lbllm.quant.packed_embedding import table_weights
from lbllm.quant.plan import block_formats, layer_bits
from lbllm.sections import LayerFormat, QuantConfig, Stage
from lbllm.stages.hessians import MATRICES
from lbllm.stages.ptq import SOLVE_GROUP, SOLVE_WEIGHT
from lbllm.stages.trained_table import trains_tables

PROGRAM = 340_000_000  # interpreter, PyTorch with its threads, transformers, a tokenizer and its texts
GPU_PROGRAM = 1_000_000_000  # what a process takes on a GPU for itself
FORWARD_FEATURE = 4  # per token of a forward pass, and per feature that enters or leaves a layer of a block
TRAIN_FEATURE = 5, 2  # the same in training, kept for the backward pass: in all precisions, and twice in float32
BLOCK = 4  # per weight: a dense block, in float32
WAT_WEIGHT = 15  # per weight in stage 2: latent weight, two moments, and freed memory between them
RELAXED_WEIGHT = 12  # the same for a relaxed bitmap
AAR_WEIGHT = 3  # per weight in stage 3: its index, and freed memory of the block before
LAYER_WEIGHT = 12  # per weight of the largest layer: gradients and temporaries while its parameters step
PARAMS = 4  # group parameters with their gradient and two moments
AAR_INPUT = 10, 32  # per token and quantized input feature in stage 3: with the CPU's kernels, and in PyTorch
AAR_INPUT_WIDEST = 64  # the same of the widest layer, during its backward pass in PyTorch
READ_PART = 4 * PART  # rows of embeddings or output head that are read at once
PACKED = 1.25  # of a packed layer: its bits, and how they are laid out in memory
EXPERTS_FEATURE = 12  # per token and hidden feature: inputs of the experts, in bfloat16 twice, their sum and its aim
EXPERTS_CHOICE = 24  # per token and chosen expert: its number and weight, in the order of tokens and of experts
E2E_FEATURE = 14  # in stage 4: as TRAIN_FEATURE, with its gradients
E2E_WEIGHT = 12  # per weight in stage 4: index, expanded weight, its gradient, parameters with two moments
E2E_TABLE = 8  # in addition where scales of embeddings train: gradients, packed rows, parameters with two moments
E2E_LATENT = 25  # in addition if latent weights train: latent, gradient, two moments, temporaries
E2E_LOGITS = 3  # numbers per token of one sequence and vocabulary entry: both models' logits and a gradient
E2E_OTHER_LOSS = 32  # bytes for the same where the loss is not computed in one pass: its temporaries, too

STREAMS = "hidden states of all tokens"  # the term that several processes share

Place = Literal["memory", "disk"]


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to binarize: module path, number of its block, shape (rows, columns) = (out, in), format.

    ``expert``: the path of the expert that it is a part of, if it is; ``share``: of the tokens, those that reach it.
    """

    name: str
    block: int
    rows: int
    columns: int
    format: LayerFormat
    expert: str = ""
    share: float = 1.0

    @property
    def weights(self) -> int:
        """The number of its weights."""
        return self.rows * self.columns

    @property
    def params_bytes(self) -> int:
        """Its group parameters in float32."""
        return self._bytes(levels.PARAMS[self.format.format])

    @property
    def levels_bytes(self) -> int:
        """The levels of its groups in float32."""
        return self._bytes(LEVELS[self.format.format])

    def _bytes(self, count: int) -> int:
        groups = math.ceil(self.columns / group_length(self.format.group_size, self.columns))
        return 4 * self.rows * groups * count


def planned_layers(model: PreTrainedModel, quant: QuantConfig) -> list[PlannedLayer]:
    """The layers that are binarized, in the order of the model. Raises ConfigError as ``block_formats`` does."""
    path, blocks, formats = block_formats(model, quant)
    layers = []
    for number, named in enumerate(formats):
        inside, experts = expert_layers(blocks[number]), expert_count(blocks[number])
        share = min(1.0, active_experts(model) / max(1, experts))
        for name, fmt in named.items():
            rows, columns = linear_weight(blocks[number].get_submodule(name)).shape
            full = f"{path}.{number}.{name}"
            expert = (full.rpartition(".")[0], share) if name in inside else ("", 1.0)
            layers.append(PlannedLayer(full, number, rows, columns, fmt, *expert))
    return layers


def active_experts(model: PreTrainedModel) -> int:
    """The number of experts that a token of a mixture chooses, as its config states it; 1 where that isn't known."""
    text = model.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    stated = [getattr(text, name, None) for name in names]
    return next((value for value in stated if isinstance(value, int) and value > 0), 1)


def at_once(block: list[PlannedLayer]) -> list[PlannedLayer]:
    """The layers of a block that exist at the same time in float32: all but the experts, and the largest expert."""
    sizes: dict[str, int] = {}
    for layer in block:
        sizes[layer.expert] = sizes.get(layer.expert, 0) + layer.weights
    largest = max((name for name in sizes if name), key=sizes.__getitem__, default="")
    return [layer for layer in block if layer.expert in ("", largest)]


@dataclass(frozen=True)
class Needs:
    """Bytes by term: ``memory`` of the machine and ``gpu`` memory at the run's largest moment, ``disk`` at its end.

    ``streams``: where the hidden states of all tokens lie. ``gpu`` is empty if the run uses none.
    """

    memory: dict[str, int]
    gpu: dict[str, int]
    disk: dict[str, int]
    streams: Place


def needs(
    config: RunConfig,
    model: PreTrainedModel,
    layers: list[PlannedLayer],
    checkpoint_bytes: int,
    *,
    gpu: bool,
    streams: Place | None = None,
) -> Needs:
    """What a run of the ``model``, which may be a skeleton, needs. ``streams``: where its hidden states lie; None: on
    disk if memory is short."""
    moments = _moments(config, model, layers, checkpoint_bytes)
    place: Place = streams or "memory"
    memory, on_gpu = _largest(moments, gpu, in_files=place == "disk")
    if streams is None and sum(memory.values()) > free_memory("cpu"):
        place = "disk"
        memory, on_gpu = _largest(moments, gpu, in_files=True)
    in_files = max(moment.streams for moment in moments) if place == "disk" else 0
    return Needs(memory, on_gpu, _disk(config, layers, checkpoint_bytes, in_files), place)


@dataclass
class _Moment:
    """What exists at the same time: ``compute`` where the run computes, ``host`` on the machine itself, ``streams``
    on the machine or in files."""

    compute: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    streams: int = 0


def _largest(moments: list[_Moment], gpu: bool, *, in_files: bool) -> tuple[dict[str, int], dict[str, int]]:
    def on_machine(moment: _Moment) -> dict[str, int]:
        terms = moment.host | ({} if gpu else moment.compute)
        return terms | ({} if in_files or not moment.streams else {STREAMS: moment.streams})

    memory = max(map(on_machine, moments), key=lambda terms: sum(terms.values()))
    if not gpu:
        return {"program": PROGRAM} | memory, {}
    largest = max((moment.compute for moment in moments), key=lambda terms: sum(terms.values()))
    return {"program": PROGRAM} | memory, {"program": GPU_PROGRAM} | largest


def _moments(
    config: RunConfig, model: PreTrainedModel, layers: list[PlannedLayer], checkpoint_bytes: int
) -> list[_Moment]:
    """The moments at which a run can need the most."""
    blocks: dict[int, list[PlannedLayer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    features = round(
        max(sum(layer.share * (layer.columns + layer.rows) for layer in block) for block in blocks.values())
    )
    weights = max(sum(layer.weights for layer in at_once(block)) for block in blocks.values())
    params = max(sum(layer.params_bytes for layer in at_once(block)) for block in blocks.values())
    packed = max(sum(map(_packed_bytes, block)) for block in blocks.values())
    text = model.config.get_text_config()
    forward = FORWARD_FEATURE * max(config.seq_len, FORWARD_TOKENS) * features
    activations, state, dense = "activations of a batch", "block in training", "dense block"
    window = max(BATCH_TOKENS, config.seq_len)
    # The logits of a part of the vocabulary, and the rows of the output head that give them.
    part = min(text.vocab_size, max(256, LOGITS_PART // config.seq_len))
    logits = {
        "logits of one sequence": (3 * 4 * config.seq_len + 4 * text.hidden_size) * part,
        STREAMS: 4 * window * text.hidden_size,
    }
    matrix = 2 * text.hidden_size * text.vocab_size  # as a checkpoint stores it
    freed = min(TRIM_BYTES, BLOCK * sum(layer.weights for layer in layers))
    moments = [
        _Moment(logits),
        _Moment({dense: BLOCK * weights, state: 2 * weights + 2 * params, activations: 2 * forward}),
        # A file of the checkpoint, and what comes next: a block, or the embeddings, read in parts; and freed memory of
        # blocks that has not gone back yet.
        _Moment(
            {dense: BLOCK * weights, state: 2 * weights + 2 * params},
            {"checkpoint being written": min(LARGEST, checkpoint_bytes)},
        ),
        _Moment(
            {"rows of the embeddings": min(READ_PART, 2 * matrix)},
            {"checkpoint being written": min(LARGEST + matrix, checkpoint_bytes) + freed},
        ),
    ]
    for stage in config.stages:
        if stage == "e2e":
            moments.append(_whole(config, model, layers))
            continue
        stream = _stream_bytes(config, model, stage)
        # The student's block, made from its state and the teacher's.
        moments.append(
            _Moment(
                {dense: BLOCK * weights, state: (BLOCK + 1) * weights + params, activations: forward},
                {"state of a block": (3 if stage == "ptq" else 1) * weights + params},
                2 * stream,
            )
        )
        if stage == "ptq":
            moments += [_solving(config, block, stream, forward) for block in blocks.values()]
        else:
            moments.append(_training(config, stage, blocks, features, weights, params, stream))
    if packed:
        rows = max(_rows_bytes(config, model, stage) for stage in config.stages)
        for moment in moments:
            moment.compute["packed experts"] = packed
            moment.streams += rows if moment.streams else 0
    return moments


def _packed_bytes(layer: PlannedLayer) -> int:
    """The bytes of a packed layer of an expert, in the order of this processor's kernels; 0 for other layers."""
    return round(PACKED / 8 * layer_bits(layer.format, layer.rows, layer.columns)) if layer.expert else 0


def _rows_bytes(config: RunConfig, model: PreTrainedModel, stage: Stage) -> int:
    """What is kept of the inputs and sums of experts for all tokens of a stage."""
    if stage == "e2e":
        return 0
    text = model.config.get_text_config()
    tokens = config.seq_len * math.ceil(getattr(config, stage).tokens / config.seq_len)
    return int(tokens * (EXPERTS_FEATURE * text.hidden_size + EXPERTS_CHOICE * active_experts(model)))


def _stream_bytes(config: RunConfig, model: PreTrainedModel, stage: Stage) -> int:
    """One stream of a stage: the hidden states of all its tokens."""
    tokens = config.seq_len * math.ceil(getattr(config, stage).tokens / config.seq_len)
    item = 2 if config.stream_dtype == "bfloat16" else 4
    return int(item * model.config.get_text_config().hidden_size * tokens)


def _solving(config: RunConfig, block: list[PlannedLayer], stream: int, forward: int) -> _Moment:
    """Stage 1 on a block, see ``lbllm.stages.ptq``."""
    block = at_once(block)
    widest = max(layer.columns for layer in block)
    tokens = config.seq_len * math.ceil(config.ptq.tokens / config.seq_len)
    weights, params = sum(layer.weights for layer in block), sum(layer.params_bytes for layer in block)
    # Layers with one input: here, those with as many columns in the same part of the block.
    groups: dict[tuple[str, int], int] = {}
    solved = 0
    for layer in block:
        key = (layer.name.rpartition(".")[0], layer.columns)
        groups[key] = groups.get(key, 0) + layer.levels_bytes
        length = group_length(layer.format.group_size, layer.columns)
        solved = max(solved, layer.rows * (SOLVE_WEIGHT * layer.columns + SOLVE_GROUP * length))
    # The inputs of experts are counted by ``_rows_bytes``.
    inside = {(layer.name.rpartition(".")[0], layer.columns) for layer in block if layer.expert}
    inputs = sum(columns for key, columns in groups if (key, columns) not in inside)
    # A part whose layers all have as many columns is attention: its output projection has an input of its own.
    for part in {part for part, _ in groups.keys() - inside}:
        same = [layer.columns for layer in block if layer.name.rpartition(".")[0] == part]
        inputs += same[0] if len(same) > 1 and len(set(same)) == 1 else 0
    batch = 12 * widest * max(config.seq_len, min(FORWARD_TOKENS, tokens))
    return _Moment(
        {
            "dense block": 2 * BLOCK * weights,
            "Hessians": 4 * MATRICES * widest**2,
            "rows being solved, or inputs of a batch": max(min(CHUNK_BYTES, solved), batch + forward),
            "block in training": 3 * weights + params + 2 * max(groups.values()),
        },
        streams=2 * stream + 2 * inputs * tokens,
    )


def _training(
    config: RunConfig,
    stage: Stage,
    blocks: dict[int, list[PlannedLayer]],
    features: int,
    weights: int,
    params: int,
    stream: int,
) -> _Moment:
    """Stages 2 and 3 on a block."""
    both = stage == "wat" and config.wat.streams == "both"
    batch = max(config.seq_len, getattr(config, stage).batch_tokens) * (1 + both)
    number = product_bytes(config)
    kept = (TRAIN_FEATURE[0] + TRAIN_FEATURE[1] * number // 2) * features * batch
    if stage == "aar":
        inputs = round(max(sum(layer.share * layer.columns for layer in block) for block in blocks.values()))
        widest = max(layer.columns for block in blocks.values() for layer in block)
        plain = uses_gpu(config.device)
        kept += (AAR_INPUT[plain] * inputs + AAR_INPUT_WIDEST * widest * plain) * batch
    each = WAT_WEIGHT if stage == "wat" else AAR_WEIGHT
    if stage == "wat" and config.wat.bitmap == "relaxed":
        each += RELAXED_WEIGHT
    # The expanded weight, and then its gradient, in the precision of the products.
    training = (each + number) * weights + PARAMS * params
    largest = LAYER_WEIGHT * max(layer.weights for block in blocks.values() for layer in block)
    return _Moment(
        {"activations of a batch": kept, "block in training": training + (largest if stage == "wat" else 0)},
        streams=(2 + both) * stream,
    )


def product_bytes(config: RunConfig) -> int:
    """Return the bytes of a number in matrix products: bfloat16 on a GPU and on a CPU that has such products."""
    return 2 if has_bfloat16() or uses_gpu(config.device) else 4


def _whole(config: RunConfig, model: PreTrainedModel, layers: list[PlannedLayer]) -> _Moment:
    """Stage 4, which has the whole model in memory."""
    text = model.config.get_text_config()
    kept = round(E2E_FEATURE * sum(x.share * (x.columns + x.rows) for x in layers) * config.e2e_seq_len)
    number = product_bytes(config)
    each_logit = E2E_LOGITS * number if config.e2e.loss == "forward_kl" else E2E_OTHER_LOSS
    head = 2 * text.hidden_size * text.vocab_size if number == 2 else 0  # a copy for the products
    each = E2E_WEIGHT + (E2E_LATENT if config.e2e.lr_weight > 0 else 0)
    # The student's own embeddings and output head, rounded, and the copy of this head for the products.
    own = 0 if config.quant.embedding_bits == 16 else head + 4 * table_weights(model)
    if trains_tables(config):
        own += E2E_TABLE * table_weights(model)
    return _Moment(
        {
            "teacher in float32": 4 * model.num_parameters() + own,
            "activations of a batch": kept,
            "logits of one sequence": each_logit * config.e2e_seq_len * text.vocab_size,
            "weights in training": each * sum(layer.weights for layer in layers) + head,
        }
    )


def _disk(config: RunConfig, layers: list[PlannedLayer], checkpoint_bytes: int, in_files: int) -> dict[str, int]:
    """The files of a run: states of all blocks after each stage, the checkpoint, and what ``in_files`` lies there of
    hidden states."""
    weights, params = sum(layer.weights for layer in layers), sum(layer.params_bytes for layer in layers)
    states = 0
    for stage in config.stages:
        latent = stage == "ptq" or (stage == "e2e" and config.e2e.lr_weight > 0)
        states += (3 if latent else 1) * weights + params
    found = {"states of the blocks": states, "checkpoint": checkpoint_bytes}
    return found | ({STREAMS: in_files} if in_files else {})
