"""Stages 1 to 3: one block at a time, from shallow to deep."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lbllm.errors import LbllmError, ModelError
from lbllm.events import BlockDone, BlockStarted, Event, LayerDone, StageDone, StageStarted
from lbllm.memory import peak_memory
from lbllm.models.blocks import (
    BlockCall,
    first_inputs,
    recorded_inputs,
    run_batches,
    run_block,
    share_copy,
    shared_inputs,
)
from lbllm.pipeline.context import RunContext, step_count, step_metric
from lbllm.quant.kv_cache import TrainingCache
from lbllm.ranks import Share
from lbllm.sections import Stage
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.block_state import BlockState, collect, restore
from lbllm.stages.distill import PROBE_TOKENS, HeldOut, Step, binary_layers, block_error
from lbllm.stages.ptq import ptq_block
from lbllm.stages.wat import wat_block

# A block whose loss training did not lower keeps its state; up to this factor that is no sign of anything.
HARMLESS = 1.02


def run_stage(run: RunContext, stage: Stage) -> Iterator[Event]:
    """One stage over all blocks: the teacher's stream and the student's advance together, block by block."""
    began = time.perf_counter()
    settings = getattr(run.config, stage)
    sequences = run.sequences(settings.tokens)
    share = run.share(sequences)
    yield StageStarted(stage=stage, steps=0 if stage == "ptq" else step_count(settings, sequences))
    sequences = share.of(sequences)
    bits = run.config.quant.kv_bits
    cache = TrainingCache(bits) if stage == "aar" and bits < 16 else None
    teacher_stream = first_inputs(run.teacher, sequences, run.batch)
    student_stream = teacher_stream
    beside = _Beside(run, cache) if run.held_out is not None and stage != "ptq" else None
    for number, block in enumerate(run.blocks):
        run.check()
        state = run.store.load(stage, number)
        # Of layers that read one input, the first.
        names: list[str] = []
        if stage == "ptq" and state is None:
            names = [names[0] for names in shared_inputs(block, teacher_stream[:1], run.calls[number])]
        with recorded_inputs(block, names) as meant:
            targets = _advance(run, block, number, teacher_stream)
        if not targets.isfinite().all():
            raise ModelError(
                f"{run.config.model}: {run.path}.{number} gives values that are not finite (NaN or infinity) for these "
                "texts before anything is binarized; its weights may be damaged, give another copy of the model"
            )
        held_out = beside.enter(number) if beside is not None else None
        if state is None:
            block_began = time.perf_counter()
            yield BlockStarted(stage=stage, block=number)
            if stage == "ptq":
                state = yield from _initialize(run, number, student_stream, meant, targets, share)
            else:
                state = yield from _train(run, stage, number, student_stream, targets, cache, held_out, share)
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
        student = _student(run, number, state)
        # The last block's output enters nothing.
        if number + 1 < len(run.blocks):
            student_stream = _advance(run, student, number, student_stream, cache)
            teacher_stream = targets
            if beside is not None:
                beside.leave(student)
    yield StageDone(stage=stage, seconds=time.perf_counter() - began)


class _Beside:
    """The held-out tokens on their way through a stage, beside those that it trains on.

    Their streams (n, T, hidden) are the teacher's and the student's, as in ``run_stage``. They end where the time to
    measure is used up.
    """

    def __init__(self, run: RunContext, cache: Any) -> None:
        assert run.held_out is not None
        self._run, self._cache, self._tokens = run, cache, run.held_out
        self._at: HeldOut | None = None
        with self._tokens.budget.timed():
            self._streams: tuple[Tensor, Tensor] | None = (first_inputs(run.teacher, self._tokens.ids, run.batch),) * 2

    def enter(self, number: int) -> HeldOut | None:
        """Return the held-out tokens before a block; None if there is no time left to measure them."""
        self._at = None
        if self._streams is not None and self._tokens.budget.allows(self._tokens.budget.cost):
            student, teacher = self._streams
            call = self._tokens.calls[number]
            with self._tokens.budget.timed():
                targets = self._pass(self._run.blocks[number], teacher, call)
            self._at = HeldOut(student, targets, call, self._tokens.budget)
        return self._at

    def leave(self, student: nn.Module) -> None:
        """Go on to the next block through a finished student's block."""
        at, self._streams = self._at, None
        if at is not None:
            with self._tokens.budget.timed():
                self._streams = self._pass(student, at.inputs, at.call, self._cache), at.targets

    @torch.no_grad()
    def _pass(self, block: nn.Module, stream: Tensor, call: BlockCall, cache: Any = None) -> Tensor:
        with self._run.autocast():
            return run_block(block, stream, call, cache).float()


@torch.no_grad()
def _advance(run: RunContext, block: nn.Module, number: int, stream: Tensor, cache: Any = None) -> Tensor:
    """The stream (n, T, hidden) after a block, float32."""
    outputs = []
    for part in stream.split(run.batch):
        run.check_alone()
        with run.autocast():
            outputs += list(run_batches(block, part, run.calls[number], run.batch, cache))
    return torch.cat(outputs).float()


def _student(run: RunContext, number: int, state: BlockState) -> nn.Module:
    student = restore(run.blocks[number], run.formats[number], state.tensors, run.config.quant.tail_steps)
    for layer in binary_layers(student).values():
        layer.keep_dense()
    return student.requires_grad_(False)


def _probe(
    run: RunContext, block: nn.Module, number: int, inputs: Tensor, targets: Tensor, share: Share, cache: Any = None
) -> float:
    """The relative loss of a block on the first tokens of the stage."""
    count = share.of_first(max(1, PROBE_TOKENS // run.config.seq_len))
    with run.autocast():
        return block_error(block, inputs[:count], targets[:count], run.calls[number], run.batch, cache)


def _initialize(
    run: RunContext, number: int, inputs: Tensor, meant: dict[str, list[Tensor]], targets: Tensor, share: Share
) -> Generator[Event, None, BlockState]:
    """Stage 1 on one block. ``loss_before`` is that of the dense block on the student's stream: the error that it
    inherits."""
    config, block, call = run.config, run.blocks[number], run.calls[number]
    student: nn.Module = share_copy(block)
    before = _probe(run, student, number, inputs, targets, share)
    tensors: dict[str, Tensor] = {}
    try:
        layers = ptq_block(block, student, call, inputs, meant, run.formats[number], config.ptq, run.batch)
        for name, result, layer in layers:
            error = float(result.error.sum() / result.energy.sum().clamp_min(1e-30))
            yield LayerDone(stage="ptq", block=number, layer=name, error=100 * error)
            tensors |= collect({name: layer}) | {f"{name}.latent": result.latent}
            run.check()
    except LbllmError as error:
        raise LbllmError(f"{run.path}.{number}.{error}") from error
    state = BlockState(tensors, before, 0.0, False)
    state.loss_after = _probe(run, _student(run, number, state), number, inputs, targets, share)
    return state


def _train(
    run: RunContext,
    stage: Stage,
    number: int,
    inputs: Tensor,
    targets: Tensor,
    cache: Any,
    held_out: HeldOut | None,
    share: Share,
) -> Generator[Event, None, BlockState]:
    """Stage 2 or 3 on one block; keeps the state it began with where training does not lower the loss."""
    config, call = run.config, run.calls[number]
    earlier = run.store.finished(config.origins[config.origins.index(stage) - 1], number)
    student = restore(run.blocks[number], run.formats[number], earlier.tensors, config.quant.tail_steps)
    steps: Iterator[Step]
    seed = (config.seed * 1_000_003 + number) * 2 + (stage == "aar")
    if stage == "wat":
        latents = {name: earlier.tensors[f"{name}.latent"].float() for name in run.formats[number]}
        before = _probe(run, student, number, inputs, targets, share)
        steps = wat_block(
            student,
            call,
            inputs,
            targets,
            latents,
            config.wat,
            seed=seed,
            autocast=run.autocast,
            held_out=held_out,
            share=share,
        )
        start = earlier.tensors
    else:
        quant = config.quant
        sharing = shared_inputs(run.blocks[number], inputs[:1], call)
        add_quantizers(
            student,
            sharing,
            call,
            inputs,
            config.aar,
            tail=quant.tail_steps,
            kv_bits=quant.kv_bits,
            batch=run.batch,
            share=share,
        )
        before = _probe(run, student, number, inputs, targets, share, cache)
        start = {name: tensor.clone() for name, tensor in collect(binary_layers(student)).items()}
        steps = aar_block(
            student,
            call,
            inputs,
            targets,
            config.aar,
            kv_bits=quant.kv_bits,
            seed=seed,
            autocast=run.autocast,
            held_out=held_out,
            share=share,
        )
    for step in steps:
        yield step_metric(stage, number, step)
        run.check()
    for layer in binary_layers(student).values():
        layer.round_params()
    state = BlockState(collect(binary_layers(student)), before, 0.0, False)
    state.loss_after = _probe(run, _student(run, number, state), number, inputs, targets, share, cache)
    if not state.loss_after <= before:
        kept = {k: v for k, v in start.items() if not k.endswith(".latent")}
        state = BlockState(kept, before, before, is_divergence(before, state.loss_after))
    return state


def is_divergence(before: float, after: float) -> bool:
    """Whether a block's loss after training, which is not below that before it, is worth a warning: NaN, or higher by
    more than what an unlucky choice of texts makes."""
    return not after <= HARMLESS * before
