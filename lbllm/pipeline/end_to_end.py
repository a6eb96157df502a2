"""Run stage 4, which trains the whole model at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm import ranks
from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.events import BlockDone, BlockStarted, Event, StageDone, StageStarted
from lbllm.memory import peak_memory
from lbllm.models.blocks import decoder_blocks, linear_weight, share_copy, shared_inputs
from lbllm.models.experts import expert_count, experts_of, silent
from lbllm.models.streamed import BlockModel
from lbllm.pipeline.context import Ended, RunContext, step_count, step_metric
from lbllm.pipeline.mixtures import share_quantizers
from lbllm.pipeline.packed_model import restored_blocks
from lbllm.pipeline.packed_tables import PackedTables, save_tables
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.kv_attention import attend_in_groups
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.packed_embedding import tables
from lbllm.sections import Origin, Stage
from lbllm.stages.block_state import BlockState, collect
from lbllm.stages.distill import PROBE_TOKENS, binary_layers
from lbllm.stages.e2e import EndToEnd
from lbllm.stages.probe import Probe
from lbllm.stages.trained_table import TrainedTable, trains_tables

SAVE_SECONDS = 120.0  # seconds between two saved states of stage 4, which has no finished blocks to save


def run_end_to_end(run: RunContext) -> Iterator[Event]:
    """Run stage 4; yields its events, in which the whole model is block 0. The training state is saved regularly."""
    began = time.perf_counter()
    stage: Stage = "e2e"
    # The end of the text: the part that earlier stages used least.
    count, length = math.ceil(run.config.e2e.tokens / run.config.seq_len), run.config.e2e_seq_len
    whole = run.corpus.sequences[-count:, : run.config.seq_len // length * length]
    sequences = whole.reshape(-1, length).to(run.teacher.device)
    yield StageStarted(stage=stage, steps=step_count(run.config.e2e, sequences))
    if any(run.store.load(stage, number) is None for number in range(run.blocks)):
        yield from _train_whole(run, sequences)
    yield StageDone(stage=stage, seconds=time.perf_counter() - began)


def _latents(run: RunContext, teacher: BlockModel, blocks: list[nn.Module]) -> Iterator[Tensor]:
    """Yield the latent weights (out, in) of all layers in order.

    They come from stage 1, or from the starting checkpoint. If these have no latent weights, the teacher's weights are
    used.
    """
    for number, block in enumerate(blocks):
        tensors = run.store.whole("ptq" if run.config.start is None else "start", number, expert_count(block))
        for name in binary_layers(block):
            latent = tensors.get(f"{name}.latent")
            if latent is None:
                latent = linear_weight(teacher.block(number).get_submodule(name)).detach()
            yield latent.to(run.teacher.device)


def _train_whole(run: RunContext, sequences: Tensor) -> Iterator[Event]:
    stage: Stage = "e2e"
    origin = run.config.origins[-2]
    # This stage needs all of the teacher at once.
    whole = run.whole_teacher()
    teacher = BlockModel.of(whole)
    student, blocks = _whole_student(run, teacher, origin)
    trained = _quantized_tables(run, teacher, student)
    training = EndToEnd(
        student,
        whole,
        [layer for block in blocks for layer in binary_layers(block).values()],
        sequences,
        run.config.e2e,
        latents=list(_latents(run, teacher, blocks)) if run.config.e2e.lr_weight > 0 else (),
        tables=list(trained.values()),
        seed=run.config.seed,
        autocast=run.autocast,
    )
    began = saved = time.perf_counter()
    probe = training.sequences[: max(1, PROBE_TOKENS // run.config.e2e_seq_len)]
    unfinished = len(blocks)  # the block store keeps the state of unfinished training under this number
    state = run.store.load(stage, unfinished)
    if state is None:
        yield BlockStarted(stage=stage, block=0)
        before = training.loss(probe)
    else:
        before = state.loss_before
        training.load(state.tensors)

    def keep() -> None:
        run.store.save(stage, unfinished, BlockState(training.state(), before, 0.0, False))

    beside = None
    if run.held_out is not None:
        length = min(run.config.e2e_seq_len, run.held_out.ids.shape[1])
        measure = partial(training.loss, run.held_out.ids[:, :length])
        beside = Probe(measure, len(training.order), run.held_out.budget)
    try:
        for step in training.steps():
            run.check()
            if step is None:
                continue
            yield step_metric(stage, 0, step if beside is None else replace(step, probe=beside.after(step.step)))
            if ranks.same(time.perf_counter() - saved > SAVE_SECONDS):
                keep()
                saved = time.perf_counter()
    except Ended:
        if run.request() == "stop":
            keep()
        raise
    latents = [
        {
            f"{name}.latent": layer.latent.half()
            for name, layer in binary_layers(block).items()
            if layer.latent is not None
        }
        for block in blocks
    ]
    training.freeze()
    after = training.loss(probe)
    diverged = not after <= before
    if trained and not diverged:
        save_tables(run.store, stage, teacher, {name: table.packed for name, table in trained.items()})
    for number, block in enumerate(blocks):
        tensors = collect(binary_layers(block)) | latents[number]
        if diverged:
            earlier = run.store.whole(origin, number, expert_count(block))
            tensors = {name: tensor for name, tensor in earlier.items() if not name.endswith(".latent")}
        state = BlockState(tensors, before, before if diverged else after, diverged)
        run.store.save_whole(stage, number, state, experts_of(block))
    if ranks.is_first():
        run.store.path(stage, unfinished).unlink(missing_ok=True)
    yield BlockDone(
        stage=stage,
        block=0,
        loss_before=before,
        loss_after=before if diverged else after,
        seconds=time.perf_counter() - began,
        memory_bytes=peak_memory(),
        diverged=diverged,
    )


def _whole_student(run: RunContext, teacher: BlockModel, stage: Origin) -> tuple[PreTrainedModel, list[nn.Module]]:
    """Return the model after a stage, with BinaryLinear layers to train, and its blocks.

    Layers that read the same input share a quantizer.
    """
    quant = run.config.precision(stage)
    student: PreTrainedModel = share_copy(teacher.model)
    attach_kv_cache(student, KVFormat.of(quant), training=True)
    _, student_blocks = decoder_blocks(student)
    (hidden,) = teacher.first_inputs(run.corpus.sequences[:1], 1)
    blocks: list[nn.Module] = []
    for number, restored in enumerate(restored_blocks(teacher, run.store, stage, quant)):
        block, layers = teacher.block(number), binary_layers(restored)
        with silent(block):
            sharing = shared_inputs(block, hidden, run.calls[number])
        found = experts_of(restored)
        for expert in range(expert_count(restored)):
            assert found is not None
            share_quantizers(found[1].expert(expert))
        for names in sharing:
            shared: dict[int, ActQuantizer] = {}
            for name in names:
                if name in layers and (quantizer := layers[name].quantizer) is not None:
                    layers[name].quantizer = shared.setdefault(quantizer.bits, quantizer)
        if KVFormat.of(quant).in_groups:
            attend_in_groups(restored)
        student_blocks[number] = restored
        blocks.append(restored)
    return student, blocks


def _quantized_tables(run: RunContext, teacher: BlockModel, student: PreTrainedModel) -> dict[str, TrainedTable]:
    """Give a student embeddings and an output head of its own with the values that a checkpoint will hold, if they have
    less than 16 bits; what shared weights shares the rounded ones. Returns those whose scales train, by name."""
    bits, trained = run.config.quant.embedding_bits, dict[str, TrainedTable]()
    if bits == 16:
        return trained
    packed = PackedTables(teacher, bits, run.store, run.config.origins[-2])
    same: dict[int, dict[str, nn.Module]] = {}
    for name, module in tables(student).items():
        same.setdefault(id(module.weight), {})[f"{name}.weight"] = module
    for modules in same.values():
        name = next(iter(modules))
        weight = nn.Parameter(packed.unpacked(name), requires_grad=False)
        for module in modules.values():
            module.weight = weight
        if trains_tables(run.config):
            rows = packed.packed(name).to(weight.device)
            trained[name] = TrainedTable(rows, bits, weight.shape[1], list(modules.values()))
    return trained
