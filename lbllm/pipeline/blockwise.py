"""Stages 1 to 3: one block at a time, from shallow to deep."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm import ranks
from lbllm.errors import LbllmError, ModelError
from lbllm.events import BlockDone, BlockStarted, Event, LayerDone, StageDone, StageStarted
from lbllm.memory import peak_memory
from lbllm.models.blocks import (
    entering,
    recorded_inputs,
    run_block,
    share_copy,
    shared_inputs,
)
from lbllm.models.experts import silent
from lbllm.pipeline.beside import Beside
from lbllm.pipeline.context import RunContext, step_count, step_metric
from lbllm.pipeline.mixtures import (
    TaughtExperts,
    binarize_experts,
    keep_experts,
    learn_factor,
    outer_formats,
    pass_experts,
    put_back,
    search_experts,
    train_experts,
)
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.kv_groups import training_cache
from lbllm.ranks import Share
from lbllm.sections import Origin, Stage
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.block_state import BlockState, collect, restore
from lbllm.stages.distill import PROBE_TOKENS, HeldOut, Step, binary_layers, block_error
from lbllm.stages.ptq import ptq_block
from lbllm.stages.routing import resumed
from lbllm.stages.wat import wat_block

# A block whose loss training did not lower keeps its state; up to this factor that is no sign of anything.
HARMLESS = 1.02


def run_stage(run: RunContext, stage: Stage) -> Iterator[Event]:
    """One stage over all blocks: the teacher's stream and the student's advance together, block by block.

    A stream has the hidden states (n, T, hidden) of all tokens of the stage, before or after a block. Only one block
    exists at a time: the teacher's until its outputs are known, then the student's until its own are.
    """
    began = time.perf_counter()
    settings = getattr(run.config, stage)
    sequences = run.sequences(settings.tokens)
    share = run.share(sequences)
    yield StageStarted(stage=stage, steps=0 if stage == "ptq" else step_count(settings, sequences))
    if ranks.same(all(run.store.has(stage, number) for number in range(run.blocks))):
        yield StageDone(stage=stage, seconds=time.perf_counter() - began)  # no later stage reads the streams
        return
    sequences = share.of(sequences)
    cache = training_cache(KVFormat.of(run.config.quant)) if stage == "aar" else None
    targets = _first_stream(run, sequences)
    inputs = run.streams.empty(*targets.shape).copy_(targets)
    both = stage == "wat" and run.config.wat.streams == "both"
    entered = run.streams.empty(*targets.shape) if both else None
    beside = Beside(run, cache) if run.held_out is not None and stage != "ptq" else None
    for number in range(run.blocks):
        run.check()
        state, student = run.store.load(stage, number), None
        if entered is not None and state is None:
            entered.copy_(targets)
        taught = _teach(run, stage, number, targets, share, beside, done=state is not None)
        taught.entered = entered
        if state is None:
            block_began = time.perf_counter()
            yield BlockStarted(stage=stage, block=number)
            if stage == "ptq":
                state, student = yield from _initialize(run, number, inputs, targets, taught)
            else:
                state, student = yield from _train(run, stage, number, inputs, targets, taught, cache)
            run.store.save(stage, number, state)
            yield BlockDone(
                stage=stage,
                block=number,
                loss_before=state.loss_before,
                loss_after=state.loss_after,
                seconds=time.perf_counter() - block_began,
                memory_bytes=peak_memory(),
                diverged=state.diverged,
            )
        # The last block's output enters nothing.
        if number + 1 < run.blocks:
            student = student or _student(run, number, state.tensors, stage)
            _advance(run, student, number, inputs, cache)
            if beside is not None:
                beside.leave(student)
        del state, student, taught
    yield StageDone(stage=stage, seconds=time.perf_counter() - began)


@dataclass
class _Taught:
    """What the teacher's block shows on its stream, which has this rank's ``share`` of the sequences.

    ``sharing``: its layers grouped by input. ``meant``: for stage 1, the inputs (tokens, in) of the first layer of each
    group, by batch. ``held_out``: held-out tokens before and after the block. ``experts``: of a block that has some.
    ``entered``: for stage 2 on both streams, what entered the teacher's block (n, T, hidden).
    """

    sharing: list[list[str]]
    meant: dict[str, list[Tensor]]
    held_out: HeldOut | None
    share: Share
    experts: TaughtExperts | None
    entered: Tensor | None = None


def _teach(
    run: RunContext, stage: Stage, number: int, stream: Tensor, share: Share, beside: Beside | None, *, done: bool
) -> _Taught:
    """Let the teacher's stream pass a block; it then holds the block's targets. ``done``: the block is finished."""
    block = run.teacher.block(number)
    with silent(block):
        sharing = [] if done else shared_inputs(block, stream[:1], run.calls[number])
    names = [names[0] for names in sharing] if stage == "ptq" else []
    experts = pass_experts(run, block, number, stream)
    if experts is not None and not done and stage != "ptq":
        learn_factor(run, block, number, stream, experts)
    with recorded_inputs(block, names, lambda: run.streams.rows(stream[..., 0].numel())) as inputs:
        finite = _advance(run, block, number, stream, passed=experts)
    meant = {name: rows.batches() for name, rows in inputs.items()}
    if experts is not None:
        experts.keep_for(stage)
    if not finite:
        raise ModelError(
            f"{run.config.model}: {run.teacher.path}.{number} gives values that are not finite (NaN or infinity) for "
            "these texts before anything is binarized; its weights may be damaged, give another copy of the model"
        )
    return _Taught(sharing, meant, beside.enter(number, block) if beside is not None else None, share, experts)


def _first_stream(run: RunContext, sequences: Tensor) -> Tensor:
    """The stream (n, T, hidden) before the first block."""
    stream, done = None, 0
    for part in run.teacher.first_inputs(sequences, run.batch):
        if stream is None:
            stream = run.streams.empty(len(sequences), *part.shape[1:])
        stream[done : done + len(part)].copy_(part)
        done += len(part)
    assert stream is not None
    return stream


@torch.no_grad()
def _advance(
    run: RunContext,
    block: nn.Module,
    number: int,
    stream: Tensor,
    cache: Any = None,
    passed: TaughtExperts | None = None,
) -> bool:
    """Replace a stream (n, T, hidden) by what a block makes of it; returns whether all of it is finite. ``passed``: the
    block's experts, where the stream has passed them already."""
    finite = True
    passed = passed or pass_experts(run, block, number, stream, cache)
    for part, output in zip(stream.split(run.batch), _outputs(run, block, number, stream, cache, passed), strict=True):
        run.check_alone()
        finite = finite and bool(output.isfinite().all())
        part.copy_(output)
    return finite


def _outputs(
    run: RunContext, block: nn.Module, number: int, stream: Tensor, cache: Any, passed: TaughtExperts | None
) -> Iterator[Tensor]:
    """What a block makes of a stream, batch by batch."""
    call = run.calls[number]
    if passed is not None:
        yield from resumed(block, stream, call, run.batch, passed.total, run.autocast, cache)
        return
    for part in stream.split(run.batch):
        with run.autocast():
            output = run_block(block, entering(part, run.teacher.device), call, cache)
        yield output


def _student(run: RunContext, number: int, tensors: dict[str, Tensor], experts: Origin) -> nn.Module:
    """A finished student's block, which computes with expanded weights, and with packed experts: those of a stage."""
    student = _restored(run, number, tensors, experts)
    for layer in binary_layers(student).values():
        layer.keep_dense()
    return student.requires_grad_(False)


def _restored(run: RunContext, number: int, tensors: dict[str, Tensor], experts: Origin) -> nn.Module:
    """A student's block from the state of its layers; its experts are packed, and those of a stage."""
    of_stage, tail = run.store.experts(experts, number), run.config.quant.tail_steps
    return restore(run.teacher.block(number), run.formats[number], tensors, tail, of_stage, packed=True)


def _probe(
    run: RunContext, block: nn.Module, number: int, inputs: Tensor, targets: Tensor, share: Share, cache: Any = None
) -> float:
    """The relative loss of a block on the first tokens of the stage."""
    count = share.of_first(max(1, PROBE_TOKENS // run.config.seq_len))
    with run.autocast():
        return block_error(block, inputs[:count], targets[:count], run.calls[number], run.batch, cache)


def _initialize(
    run: RunContext, number: int, inputs: Tensor, targets: Tensor, taught: _Taught
) -> Generator[Event, None, tuple[BlockState, nn.Module]]:
    """Stage 1 on one block; returns its state and the finished student. ``loss_before`` is that of the dense block on
    the student's stream: the error that it inherits."""
    before, tensors = yield from _binarize(run, number, inputs, targets, taught)
    taught.meant.clear()
    state = BlockState(tensors, before, 0.0, False)
    student = _student(run, number, tensors, "ptq")
    state.loss_after = _probe(run, student, number, inputs, targets, taught.share)
    return state, student


def _binarize(
    run: RunContext, number: int, inputs: Tensor, targets: Tensor, taught: _Taught
) -> Generator[Event, None, tuple[float, dict[str, Tensor]]]:
    """The loss of the dense block, and the tensors of the binarized one."""
    config, block, call = run.config, run.teacher.block(number), run.calls[number]
    student: nn.Module = share_copy(block)
    before = _probe(run, student, number, inputs, targets, taught.share)
    tensors: dict[str, Tensor] = {}
    try:
        with silent(block), silent(student):
            formats = outer_formats(run, number)
            layers = ptq_block(block, student, call, inputs, taught.meant, formats, config.ptq, run.batch)
            for name, result, layer in layers:
                error = float(result.error.sum() / result.energy.sum().clamp_min(1e-30))
                yield LayerDone(stage="ptq", block=number, layer=name, error=100 * error)
                tensors |= collect({name: layer}) | {f"{name}.latent": result.latent}
                run.check()
        if taught.experts is not None:
            yield from binarize_experts(run, number, block, student, inputs, taught.experts)
    except LbllmError as error:
        raise LbllmError(f"{run.teacher.path}.{number}.{error}") from error
    return before, tensors


def _train(
    run: RunContext, stage: Stage, number: int, inputs: Tensor, targets: Tensor, taught: _Taught, cache: Any
) -> Generator[Event, None, tuple[BlockState, nn.Module]]:
    """Stage 2 or 3 on one block; returns its state and the finished student. The state is that it began with where
    training does not lower the loss."""
    config, call = run.config, run.calls[number]
    origin = config.origins[config.origins.index(stage) - 1]
    earlier = run.store.finished(origin, number).tensors
    student = _restored(run, number, earlier, origin)
    steps: Iterator[Step]
    seed = (config.seed * 1_000_003 + number) * 2 + (stage == "aar")
    searched: dict[str, Tensor] = {}
    searched_experts: dict[str, Tensor] = {}
    if stage == "wat":
        # Taken out, so that training alone holds them.
        latents = {name: earlier.pop(f"{name}.latent") for name in outer_formats(run, number)}
        del earlier
        before = _probe(run, student, number, inputs, targets, taught.share)
        steps = wat_block(
            student,
            call,
            inputs,
            targets,
            latents,
            config.wat,
            seed=seed,
            autocast=run.autocast,
            held_out=taught.held_out,
            share=taught.share,
            teacher_inputs=taught.entered,
        )
        del latents
    else:
        del earlier
        quant = config.quant
        with silent(student):
            add_quantizers(
                student,
                taught.sharing,
                call,
                inputs,
                config.aar,
                tail=quant.tail_steps,
                cache=cache,
                batch=run.batch,
                share=taught.share,
            )
        if taught.experts is not None:
            searched_experts = search_experts(run, number, origin, student, inputs, cache)
        before = _probe(run, student, number, inputs, targets, taught.share, cache)
        searched = {
            f"{name}.act": layer.quantizer.act.detach().clone()
            for name, layer in binary_layers(student).items()
            if layer.quantizer is not None
        }
        steps = aar_block(
            student,
            call,
            inputs,
            targets,
            config.aar,
            cache=cache,
            seed=seed,
            autocast=run.autocast,
            held_out=taught.held_out,
            share=taught.share,
        )
    for step in steps:
        yield step_metric(stage, number, step)
        run.check()
    del steps
    state = BlockState(_rounded(student), before, 0.0, False)
    if taught.experts is None:
        del student
        finished = _student(run, number, state.tensors, stage)
    else:
        finished = student
        if not _probe(run, finished, number, inputs, targets, taught.share, cache) <= before:
            state.tensors = _kept(run, number, origin, searched)
            put_back(run, number, finished, state.tensors)
        for layer in binary_layers(finished.requires_grad_(False)).values():
            layer.keep_dense()
        yield from train_experts(
            run, stage, number, origin, finished, inputs, targets, taught.experts, searched_experts, cache, seed
        )
    state.loss_after = _probe(run, finished, number, inputs, targets, taught.share, cache)
    if not state.loss_after <= before:
        del finished  # before the block is made once more
        state = BlockState(
            _kept(run, number, origin, searched), before, before, is_divergence(before, state.loss_after)
        )
        if taught.experts is not None:
            keep_experts(run, stage, number, origin, searched_experts)
        finished = _student(run, number, state.tensors, stage)
    return state, finished


def _kept(run: RunContext, number: int, origin: Origin, searched: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a block had before a stage, without latent weights, and the knees that were searched."""
    first = run.store.finished(origin, number).tensors
    return {name: first.pop(name) for name in list(first) if not name.endswith(".latent")} | searched


def _rounded(student: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trained block, whose parameters are rounded to what a checkpoint stores."""
    layers = binary_layers(student)
    for layer in layers.values():
        layer.round_params()
    return collect(layers)


def is_divergence(before: float, after: float) -> bool:
    """Whether a block's loss after training, which is not below that before it, is worth a warning: NaN, or higher by
    more than what an unlucky choice of texts makes."""
    return not after <= HARMLESS * before
