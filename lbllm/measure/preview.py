"""Preview formats on one decoder block, in seconds: stage 1 in several formats, and a few steps of stage 2 in one.

Methods of ``lbllm.baselines`` can be compared with them.

    sample = take_block(config, 12)
    for result in preview(sample, config):
        print(result)

The preview is simplified to be fast: every layer gets the teacher's input, so that all formats share the Hessians, and
stage 1 omits its last sweeps. In a run, the input comes from the binarized blocks and layers before. So the errors are
good to compare formats, but the errors of a run are higher. They are measured on text that stage 1 does not use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lbllm.baselines.methods import StoredLayer, method, quantize_layer
from lbllm.config import RunConfig, setting_name
from lbllm.errors import ConfigError, LbllmError, ModelError
from lbllm.models.blocks import (
    capture_calls,
    check_supported,
    decoder_blocks,
    first_inputs,
    linear_layers,
    linear_weight,
    recorded_inputs,
    run_batches,
    set_linear_weight,
    share_copy,
    shared_inputs,
)
from lbllm.models.calls import BlockCall
from lbllm.models.experts import experts_of
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.quant.plan import bits_per_weight
from lbllm.sections import WHOLE_ROW, Format, LayerFormat
from lbllm.stages.block_state import collect, restore
from lbllm.stages.distill import binary_layers, block_error
from lbllm.stages.hessians import factorize, input_statistics
from lbllm.stages.ptq import binarize_together, by_format, to_layer
from lbllm.stages.wat import wat_block
from lbllm.texts.corpus import load_corpus

SEQ_LEN = 256
CALIBRATION, PROBE = 6, 2  # sequences
AT_ONCE = 2  # choices computed at the same time: each consists of many small operations on one core
EM_STEPS, TRAIN_STEPS = 4, 6
USUAL_SIZES = (64, 128, 256)
FORMATS: tuple[Format, ...] = ("w1+1", "w1", "w1+1+1")

Choice = tuple[str, int]  # a format or a method's name, and a group size


@dataclass
class BlockSample:
    """A block of the teacher with hidden states of texts.

    ``path``: the block's full name. ``inputs`` and ``targets``, the block's own outputs, are for stage 1;
    ``probe_inputs`` and ``probe_targets`` are for measuring; all are (n, T, hidden). ``hessians``: the names of layers
    that share an input, with the Hessian (in, in) of this input.
    """

    path: str
    block: nn.Module
    call: BlockCall
    inputs: Tensor
    targets: Tensor
    probe_inputs: Tensor
    probe_targets: Tensor
    hessians: list[tuple[list[str], Tensor]]
    _factors: dict[float, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def factors(self, damping: float) -> list[tuple[Tensor, Tensor]]:
        """Return ``factorize`` of each Hessian; computed once, because it is the same for all choices."""
        if damping not in self._factors:
            self._factors[damping] = [factorize(hessian, damping) for _, hessian in self.hessians]
        return self._factors[damping]


@dataclass(frozen=True)
class Point:
    """The result of stage 1 in a format, or of a method of ``lbllm.baselines``, on the block.

    ``error``: the relative loss of the block's output; ``bpw``: stored bits per binarized weight.
    """

    format: str
    group_size: int
    error: float
    bpw: float


@dataclass(frozen=True)
class Trained:
    """The progress after ``step`` of ``steps`` optimizer steps.

    ``loss``: the loss of this step; ``error``: the relative loss of the block's output, only after the last step.
    """

    step: int
    steps: int
    loss: float
    error: float | None = None


@dataclass
class Initialized:
    """A block's binarized layers after stage 1: their formats, and ``tensors`` with the latent weights."""

    point: Point
    formats: dict[str, LayerFormat]
    tensors: dict[str, Tensor]


@torch.no_grad()
def take_block(config: RunConfig, number: int, teacher: Teacher | None = None) -> BlockSample:
    """Load the teacher, run it up to block ``number`` on a small part of the run's text, and keep only this block.

    ``teacher``: the loaded one, if there is one; it gets hooks while it runs, so nobody else may use its modules.
    Raises ModelError, CorpusError, and ConfigError if the block does not exist.
    """
    teacher = teacher or load_teacher(config.model)
    model = teacher.model
    check_supported(model)
    path, blocks = decoder_blocks(model)
    if not 0 <= number < len(blocks):
        raise ConfigError(f"block {number}: {config.model} has blocks 0 to {len(blocks) - 1}")
    if experts_of(blocks[number]) is not None:
        raise ModelError(
            f"block {number} of {config.model} has experts, and the preview compares formats on dense blocks only; "
            "choose another block, if the model has one"
        )
    length = min(SEQ_LEN, config.seq_len)
    tokens = (CALIBRATION + PROBE) * SEQ_LEN
    sequences = load_corpus(config.corpus, teacher.tokenizer, seq_len=length, tokens=tokens).sequences
    block, call = blocks[number], capture_calls(model, sequences[:1], number + 1)
    hidden = first_inputs(model, sequences, CALIBRATION)
    for earlier in range(number):
        hidden = torch.cat(list(run_batches(blocks[earlier], hidden, call[earlier], CALIBRATION)))
    # If the text is too short for both parts, the errors are measured on the text of stage 1.
    probe = len(hidden) * PROBE // (CALIBRATION + PROBE)
    inputs, probe_inputs = hidden[probe:], hidden[: probe or None]
    sharing = shared_inputs(block, inputs[:1], call[number])
    with recorded_inputs(block, [names[0] for names in sharing]) as seen:
        targets = torch.cat(list(run_batches(block, inputs, call[number], CALIBRATION)))
    probe_targets = targets
    if probe:
        probe_targets = torch.cat(list(run_batches(block, probe_inputs, call[number], CALIBRATION)))
    hessians = []
    for names in sharing:
        batches = [batch.float() for batch in seen[names[0]]]
        hessians.append((names, input_statistics(iter(batches), iter(batches))[0]))
    return BlockSample(
        path=f"{path}.{number}",
        block=block,
        call=call[number],
        inputs=inputs,
        targets=targets,
        probe_inputs=probe_inputs,
        probe_targets=probe_targets,
        hessians=hessians,
    )


def choices(sample: BlockSample, config: RunConfig, methods: Sequence[str] = ()) -> list[Choice]:
    """Return the formats and group sizes to compare; the run's own choice is the first.

    The sizes are the run's own, the usual ones that fit into the block's rows, and the whole row. The other formats
    have only every second size, which is enough for their lines. ``methods`` come last, with these sizes and the run's
    own.
    """
    shortest = min(linear_weight(layer).shape[1] for layer in linear_layers(sample.block).values())
    own = config.quant.group_size
    sizes = [*sorted({size for size in (*USUAL_SIZES, own) if size <= shortest} - {WHOLE_ROW}), WHOLE_ROW]
    first = (config.quant.format, own)
    fewer = sorted({*sizes[:-1:2], sizes[-1]}, key=sizes.index)
    others: list[Choice] = [(fmt, size) for fmt in FORMATS for size in (sizes if fmt == first[0] else fewer)]
    others += [(name, size) for name in methods for size in sizes if size in (*fewer, own)]
    return [first, *(choice for choice in others if choice != first)]


def preview(
    sample: BlockSample, config: RunConfig, known: Container[Choice] = (), methods: Sequence[str] = ()
) -> Iterator[Point | Trained]:
    """Yield a Point for the run's own choice, then its steps of stage 2, then a Point for each choice not in ``known``.

    Raises ConfigError if the settings leave the block dense or a method is not known, and LbllmError if the block's
    inputs are degenerate.
    """
    _, *others = choices(sample, config, methods)
    start = initialize(sample, config, config.quant.format, config.quant.group_size)
    yield start.point
    yield from train(sample, config, start)
    unknown = [choice for choice in others if choice not in known]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield from pool.map(lambda choice: measure(sample, config, *choice), unknown)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def measure(sample: BlockSample, config: RunConfig, name: str, group_size: int) -> Point:
    """Return the Point of a format or a method."""
    fmt = next((fmt for fmt in FORMATS if fmt == name), None)
    return (
        baseline(sample, config, name, group_size) if fmt is None else initialize(sample, config, fmt, group_size).point
    )


@torch.no_grad()
def baseline(sample: BlockSample, config: RunConfig, name: str, group_size: int) -> Point:
    """Return the Point of a method of ``lbllm.baselines``, on the layers that the run binarizes.

    Raises ConfigError for an unknown method, and LbllmError if the block's inputs are degenerate.
    """
    chosen, stored = method(name), StoredLayer()
    formats = block_layers(sample, config, config.quant.format, group_size)
    block = share_copy(sample.block)
    for names, hessian in sample.hessians:
        for layer_name in (name for name in names if name in formats):
            layer = block.get_submodule(layer_name)
            settings, full = chosen.settings(group_size=formats[layer_name].group_size), f"{sample.path}.{layer_name}"
            result = quantize_layer(full, linear_weight(layer), hessian, chosen, settings)
            set_linear_weight(layer, result.weight)
            stored.add(full, result)
    return Point(name, group_size, _error(sample, block), stored.bpw)


def block_layers(sample: BlockSample, config: RunConfig, fmt: Format, group_size: int) -> dict[str, LayerFormat]:
    """Return the format of each layer of the block to binarize; overrides and skipped layers are those of the run."""
    quant = config.quant.model_copy(update={"format": fmt, "group_size": group_size})
    named = {name: quant.layer(f"{sample.path}.{name}") for name in linear_layers(sample.block)}
    return {name: layer for name, layer in named.items() if layer is not None}


@torch.no_grad()
def initialize(sample: BlockSample, config: RunConfig, fmt: Format, group_size: int) -> Initialized:
    """Run stage 1 on the block in a format.

    Raises ConfigError if the run's settings leave the block dense, and LbllmError if its inputs are degenerate.
    """
    formats = block_layers(sample, config, fmt, group_size)
    if not formats:
        raise ConfigError(
            f"{sample.path} stays dense: {setting_name('quant.skip')} {list(config.quant.skip)} excludes all its layers"
        )
    settings = config.ptq.model_copy(update={"em_steps": min(EM_STEPS, config.ptq.em_steps), "sweeps": 0})
    tensors: dict[str, Tensor] = {}
    known: Sequence[tuple[Tensor, Tensor] | None]
    try:
        known = sample.factors(settings.damping)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        known = [None] * len(sample.hessians)  # ``binarize_together`` reports the error with the layer's name
    for (sharing, hessian), factors in zip(sample.hessians, known, strict=True):
        for layer_format, names in by_format(sharing, formats):
            try:
                solved = binarize_together(sample.block, names, hessian, layer_format, settings, factors=factors)
            except LbllmError as error:
                raise LbllmError(f"{sample.path}.{error}") from error
            for name, result in solved.items():
                layer = to_layer(sample.block.get_submodule(name), layer_format, result)
                tensors |= collect({name: layer}) | {f"{name}.latent": result.latent.float()}
    built = restore(sample.block, formats, tensors, config.quant.tail_steps)
    bpw = bits_per_weight([sample.block], [formats])
    return Initialized(Point(fmt, group_size, _error(sample, built), bpw), formats, tensors)


def train(sample: BlockSample, config: RunConfig, start: Initialized) -> Iterator[Trained]:
    """Run a few steps of stage 2 from ``start``, with the run's learning rates; yields each step, then the error."""
    block = restore(sample.block, start.formats, start.tensors, config.quant.tail_steps)
    length = sample.inputs.shape[1]
    batch = max(1, min(len(sample.inputs), config.wat.batch_tokens // length))
    per_epoch = -(-len(sample.inputs) // batch)
    settings = config.wat.model_copy(
        update={"epochs": max(1, round(TRAIN_STEPS / per_epoch)), "batch_tokens": batch * length}
    )
    steps = settings.epochs * per_epoch
    latents = {name: start.tensors[f"{name}.latent"] for name in start.formats}
    for step in wat_block(
        block,
        sample.call,
        sample.inputs,
        sample.targets,
        latents,
        settings,
        seed=config.seed,
        autocast=contextlib.nullcontext,
    ):
        yield Trained(step.step, steps, step.loss)
    for layer in binary_layers(block).values():
        layer.round_params()
    yield Trained(steps, steps, step.loss, _error(sample, block))


@torch.no_grad()
def _error(sample: BlockSample, block: nn.Module) -> float:
    return block_error(block, sample.probe_inputs, sample.probe_targets, sample.call, len(sample.probe_inputs))
