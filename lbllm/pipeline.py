"""The stages in order over all decoder blocks, as an iterator of events; the state of every finished block is on disk.

A run can be ended at any moment and continued: finished blocks are read back, their outputs are computed again from
their saved states, and the random order of the training texts depends on seed, stage and block alone. So a continued
run ends with the same bytes as an uninterrupted one (on a CPU with the same number of threads).
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm import memory
from lbllm.activations import ActQuantizer, TrainingCache, TrainingKVLayer
from lbllm.blocks import (
    BlockCall,
    capture_calls,
    check_length,
    check_supported,
    decoder_blocks,
    first_inputs,
    linear_layers,
    linear_weight,
    recorded_inputs,
    run_batches,
    share_copy,
    shared_inputs,
    uncalled_layers,
)
from lbllm.checkpoint import BlockState, BlockStore, collect, fingerprint, restore, write_atomic
from lbllm.config import AarConfig, E2eConfig, LayerFormat, Origin, QuantConfig, RunConfig, Stage, WatConfig
from lbllm.corpora import Corpus, load_corpus
from lbllm.devices import make_accelerator
from lbllm.errors import ConfigError, CorpusError, LbllmError, ModelError
from lbllm.evaluate import perplexity
from lbllm.events import (
    BlockDone,
    BlockStarted,
    Evaluated,
    Event,
    LayerDone,
    RunDone,
    RunStarted,
    RunStopped,
    StageDone,
    StageStarted,
    StepMetric,
)
from lbllm.hf import WEIGHTS, LbllmConfig, LbllmQuantizer, attach_kv_cache, save_packed
from lbllm.layers import PackedLinear, layer_bits
from lbllm.models import Teacher, hub_id, load_teacher
from lbllm.run_record import RunRecord, write_record
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.e2e import EndToEnd
from lbllm.stages.ptq import ptq_block, to_layer
from lbllm.stages.wat import Step, batch_order, binary_layers, block_error, wat_block
from lbllm.start import checkpoint_blocks, checkpoint_record

Request = Literal["stop", "cancel"]

# A block's loss is measured on at most this many tokens, before and after a stage.
PROBE_TOKENS = 2_048
FORWARD_TOKENS = 2_048
SAVE_SECONDS = 120.0  # between two savings of stage 4, which has no blocks that finish
# Perplexities that show a run's progress are measured on few tokens: they take from the run's time.
HELD_OUT_TOKENS = 2_048


class _Ended(Exception):
    """Carries a request out of the stage that noticed it."""


@dataclass
class _Run:
    """What all stages of a run share."""

    config: RunConfig
    teacher: PreTrainedModel
    path: str
    blocks: nn.ModuleList
    formats: list[dict[str, LayerFormat]]
    calls: list[BlockCall]
    corpus: Corpus
    store: BlockStore
    autocast: Any
    request: Callable[[], Request | None]

    @property
    def batch(self) -> int:
        """Sequences in one forward pass without gradients."""
        return max(1, FORWARD_TOKENS // self.config.seq_len)

    def sequences(self, tokens: int) -> Tensor:
        """The first sequences of the corpus, enough for ``tokens``."""
        return self.corpus.sequences[: -(-tokens // self.config.seq_len)]

    def check(self) -> None:
        """Leave the run where an end was asked for."""
        if self.request() is not None:
            raise _Ended


def block_formats(
    model: PreTrainedModel, quant: QuantConfig
) -> tuple[str, nn.ModuleList, list[dict[str, LayerFormat]]]:
    """The path of the decoder blocks, the blocks, and the format of each layer to binarize in each of them.

    Raises ConfigError for a group longer than a row, for settings that leave nothing to binarize, and for a pattern
    no layer matches.
    """
    path, blocks = decoder_blocks(model)
    formats: list[dict[str, LayerFormat]] = []
    names: list[str] = []
    for number, block in enumerate(blocks):
        formats.append({})
        for name, layer in linear_layers(block).items():
            full = f"{path}.{number}.{name}"
            names.append(full)
            fmt = quant.layer(full)
            if fmt is None:
                continue
            row = linear_weight(layer).shape[1]
            if fmt.group_size > row:
                raise ConfigError(
                    f"group_size {fmt.group_size} is longer than a row of {full}, which has {row} weights; "
                    f"choose at most {row}, or -1 for one group a row"
                )
            formats[-1][name] = fmt
    for pattern in (*quant.skip, *quant.overrides):
        probe = QuantConfig(skip=(pattern,))
        if all(probe.layer(name) is not None for name in names):
            raise ConfigError(f"pattern {pattern!r} matches no layer; names look like {names[0]!r}")
    if not any(formats):
        raise ConfigError(f"quant.skip {list(quant.skip)} leaves no layer to binarize")
    return path, blocks, formats


def bits_per_weight(blocks: Iterable[nn.Module], formats: list[dict[str, LayerFormat]]) -> float:
    """Stored bits over weights of all binarized layers, group parameters included."""
    bits = weights = 0
    for block, layers in zip(blocks, formats, strict=True):
        for name, fmt in layers.items():
            out_features, in_features = linear_weight(block.get_submodule(name)).shape
            bits += layer_bits(fmt, out_features, in_features)
            weights += out_features * in_features
    return bits / weights


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(
    config: RunConfig,
    folder: Path,
    *,
    request: Callable[[], Request | None],
    teacher: Teacher | None = None,
    corpus: Corpus | None = None,
) -> Iterator[Event]:
    """Run all stages of ``config`` with ``folder`` for state and result; yields events.

    The perplexity of the teacher, and of the model after each stage, is measured on the held-out part of the configured
    corpus; a given ``corpus`` has none. Continues from the blocks that ``folder`` has. ``request`` is asked at every
    step; once it answers, RunStopped is yielded and the iterator ends with all finished blocks kept. Raises LbllmError
    for what a user can mend. Result: ``folder/checkpoint``.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config.device, _recorded_precision(folder))
    write_atomic(folder / "precision", accelerator.mixed_precision.encode())
    teacher = teacher or load_teacher(config.model)
    check_supported(teacher.model)
    check_length(teacher.model, config.seq_len, "seq_len")
    path, blocks, formats = block_formats(teacher.model, config.quant)
    held_out = _held_out(config, teacher) if corpus is None else None
    corpus = corpus or load_corpus(
        config.corpus, teacher.tokenizer, seq_len=config.seq_len, tokens=config.tokens, seed=config.seed
    )
    model = teacher.model.to(accelerator.device)
    first = corpus.sequences[:1].to(accelerator.device)
    uncalled = [name for name in uncalled_layers(model, first) if config.quant.layer(name) is not None]
    if uncalled:
        raise ModelError(
            f"{config.model} never calls {', '.join(uncalled)}: a layer that reads nothing can't be binarized. Keep it "
            f"dense: --set 'quant.skip={json.dumps([*config.quant.skip, *uncalled])}'"
        )
    with torch.no_grad():
        calls = capture_calls(model, first)
    store = BlockStore(folder, fingerprint(config, model, corpus.hash, accelerator.mixed_precision))
    if config.start is not None and not all(store.path("start", number).exists() for number in range(len(blocks))):
        for number, tensors in enumerate(checkpoint_blocks(config, teacher)):
            store.save("start", number, BlockState(tensors, 0.0, 0.0, False))
    state = _Run(config, model, path, blocks, formats, calls, corpus, store, accelerator.autocast, request)
    bpw = bits_per_weight(blocks, formats)
    finished = sum(store.path(stage, k).exists() for stage in config.stages for k in range(len(blocks)))
    yield RunStarted(
        stages=config.stages,
        blocks=len(blocks),
        layers=sum(map(len, formats)),
        weights=sum(
            linear_weight(block.get_submodule(name)).numel()
            for block, f in zip(blocks, formats, strict=True)
            for name in f
        ),
        device=str(accelerator.device),
        corpus_hash=corpus.hash,
        tokens=corpus.sequences.numel(),
        bpw=bpw,
        resumed_blocks=finished,
    )
    try:
        yield from _evaluate(state, "teacher", lambda: model, held_out)
        if config.start is not None:
            yield from _evaluate(state, "start", partial(stage_model, config, folder, "start", teacher), held_out)
        for stage in config.stages:
            memory.trim()  # what is kept free of the stage before is of other sizes than this one asks for
            yield from _end_to_end(state) if stage == "e2e" else _run_stage(state, stage)
            yield from _evaluate(state, stage, partial(stage_model, config, folder, stage, teacher), held_out)
        state.check()
    except _Ended:
        asked = request()
        assert asked is not None
        yield RunStopped(request=asked)
        return
    target = folder / "checkpoint"
    record = RunRecord(
        settings=config,
        base_model=hub_id(config.model),
        precision=teacher.precision,
        licence=teacher.licence,
        bpw=bpw,
        corpus_hash=corpus.hash,
        corpus_tokens=corpus.tokens,
        evaluations=tuple(_evaluations(state, held_out)),
        start=checkpoint_record(config.start) if config.start is not None else None,
    )
    save_checkpoint(config, folder, teacher, target, record)
    yield RunDone(
        path=str(target),
        bpw=bpw,
        disk_bytes=(target / WEIGHTS).stat().st_size,
        seconds=time.perf_counter() - began,
    )


def _held_out(config: RunConfig, teacher: Teacher) -> Corpus | None:
    """The text that shows a run's progress, which it never trains on; None where the corpus is too short to spare
    any."""
    try:
        return load_corpus(
            config.corpus, teacher.tokenizer, seq_len=config.seq_len, tokens=HELD_OUT_TOKENS, part="heldout"
        )
    except CorpusError:
        return None


def _evaluate(run: _Run, what: str, model: Callable[[], PreTrainedModel], held_out: Corpus | None) -> Iterator[Event]:
    """The perplexity of ``model`` on the held-out text, once in the life of a run: what is known lies in its folder."""
    known = _known(run)
    if held_out is None or what in known:
        return
    evaluated, losses = model(), []
    for window in held_out.sequences.split(1):  # one by one: the logits of several would be the run's peak in memory
        run.check()
        losses.append(math.log(perplexity(evaluated, window).perplexity))
    value = math.exp(sum(losses) / len(losses))
    yield _evaluation(what, value, held_out)
    write_atomic(_evaluated_path(run), json.dumps(known | {what: value}).encode())


def _evaluated_path(run: _Run) -> Path:
    return run.store.folder / "evaluated.json"


def _known(run: _Run) -> dict[str, float]:
    """The perplexities that were measured so far."""
    path = _evaluated_path(run)
    return json.loads(path.read_text()) if path.exists() else {}


def _evaluation(what: str, value: float, held_out: Corpus) -> Evaluated:
    windows, length = held_out.sequences.shape
    text = f"held-out part of {held_out.name}, {windows} windows of {length} tokens"
    return Evaluated(what=what, text=text, perplexity=value, tokens=held_out.sequences[:, 1:].numel())


def _evaluations(run: _Run, held_out: Corpus | None) -> Iterator[Evaluated]:
    """All that was evaluated in the life of a run, by whichever of its workers."""
    if held_out is not None:
        for what, value in _known(run).items():
            yield _evaluation(what, value, held_out)


def _recorded_precision(folder: Path) -> str | None:
    """The matmul precision that a run began with: a continued run must not switch it."""
    path = folder / "precision"
    return path.read_text() if path.exists() else None


def _run_stage(run: _Run, stage: Stage) -> Iterator[Event]:
    """One stage over all blocks: the teacher's stream and the student's advance together, block by block."""
    began = time.perf_counter()
    settings = getattr(run.config, stage)
    sequences = run.sequences(settings.tokens)
    yield StageStarted(stage=stage, steps=0 if stage == "ptq" else _steps(settings, sequences))
    bits = run.config.quant.kv_bits
    cache = TrainingCache(bits) if stage == "aar" and bits < 16 else None
    teacher_stream = first_inputs(run.teacher, sequences, run.batch)
    student_stream = teacher_stream
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
        if state is None:
            block_began = time.perf_counter()
            yield BlockStarted(stage=stage, block=number)
            if stage == "ptq":
                state = yield from _initialize(run, number, student_stream, meant, targets)
            else:
                state = yield from _train(run, stage, number, student_stream, targets, cache)
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
    yield StageDone(stage=stage, seconds=time.perf_counter() - began)


@torch.no_grad()
def _advance(run: _Run, block: nn.Module, number: int, stream: Tensor, cache: Any = None) -> Tensor:
    """The stream (n, T, hidden) after a block, float32."""
    outputs = []
    for part in stream.split(run.batch):
        run.check()
        with run.autocast():
            outputs += list(run_batches(block, part, run.calls[number], run.batch, cache))
    return torch.cat(outputs).float()


def _student(run: _Run, number: int, state: BlockState) -> nn.Module:
    student = restore(run.blocks[number], run.formats[number], state.tensors, run.config.quant.tail_steps)
    for layer in binary_layers(student).values():
        layer.keep_dense()
    return student.requires_grad_(False)


def _probe(run: _Run, block: nn.Module, number: int, inputs: Tensor, targets: Tensor, cache: Any = None) -> float:
    """The relative loss of a block on the first tokens of the stage."""
    count = max(1, PROBE_TOKENS // run.config.seq_len)
    with run.autocast():
        return block_error(block, inputs[:count], targets[:count], run.calls[number], run.batch, cache)


def _initialize(
    run: _Run, number: int, inputs: Tensor, meant: dict[str, list[Tensor]], targets: Tensor
) -> Generator[Event, None, BlockState]:
    """Stage 1 on one block. ``loss_before`` is that of the dense block on the student's stream: the error that it
    inherits."""
    config, block, call = run.config, run.blocks[number], run.calls[number]
    student: nn.Module = share_copy(block)
    before = _probe(run, student, number, inputs, targets)
    tensors: dict[str, Tensor] = {}
    try:
        for name, result in ptq_block(block, student, call, inputs, meant, run.formats[number], config.ptq, run.batch):
            error = float(result.error.sum() / result.energy.sum().clamp_min(1e-30))
            yield LayerDone(stage="ptq", block=number, layer=name, error=100 * error)
            layer = to_layer(block.get_submodule(name), run.formats[number][name], result)
            layer.round_params()
            tensors |= collect({name: layer}) | {f"{name}.latent": result.latent.half()}
            run.check()
    except LbllmError as error:
        raise LbllmError(f"{run.path}.{number}.{error}") from error
    state = BlockState(tensors, before, 0.0, False)
    state.loss_after = _probe(run, _student(run, number, state), number, inputs, targets)
    return state


def _train(
    run: _Run, stage: Stage, number: int, inputs: Tensor, targets: Tensor, cache: Any
) -> Generator[Event, None, BlockState]:
    """Stage 2 or 3 on one block; keeps the state it began with where training diverges or makes the block worse."""
    config, call = run.config, run.calls[number]
    earlier = run.store.finished(config.origins[config.origins.index(stage) - 1], number)
    student = restore(run.blocks[number], run.formats[number], earlier.tensors, config.quant.tail_steps)
    steps: Iterator[Step]
    seed = (config.seed * 1_000_003 + number) * 2 + (stage == "aar")
    if stage == "wat":
        latents = {name: earlier.tensors[f"{name}.latent"].float() for name in run.formats[number]}
        before = _probe(run, student, number, inputs, targets)
        steps = wat_block(student, call, inputs, targets, latents, config.wat, seed=seed, autocast=run.autocast)
        start = earlier.tensors
    else:
        quant = config.quant
        sharing = shared_inputs(run.blocks[number], inputs[:1], call)
        add_quantizers(
            student, sharing, call, inputs, config.aar, tail=quant.tail_steps, kv_bits=quant.kv_bits, batch=run.batch
        )
        before = _probe(run, student, number, inputs, targets, cache)
        start = {name: tensor.clone() for name, tensor in collect(binary_layers(student)).items()}
        steps = aar_block(
            student, call, inputs, targets, config.aar, kv_bits=quant.kv_bits, seed=seed, autocast=run.autocast
        )
    for step in steps:
        yield _metric(stage, number, step)
        run.check()
    for layer in binary_layers(student).values():
        layer.round_params()
    state = BlockState(collect(binary_layers(student)), before, 0.0, False)
    state.loss_after = _probe(run, _student(run, number, state), number, inputs, targets, cache)
    if not state.loss_after <= before:
        state = BlockState({k: v for k, v in start.items() if not k.endswith(".latent")}, before, before, True)
    return state


def _metric(stage: Stage, number: int, step: Step) -> StepMetric:
    return StepMetric(
        stage=stage,
        block=number,
        step=step.step,
        loss=step.loss,
        reg=step.reg,
        lr=step.lr,
        tokens_per_second=step.tokens_per_second,
    )


def _end_to_end(run: _Run) -> Iterator[Event]:
    """Stage 4 on the whole model at once, which counts as its block 0; its state so far is saved now and then."""
    began = time.perf_counter()
    stage: Stage = "e2e"
    # The last of the text: what earlier stages have seen least.
    count, length = math.ceil(run.config.e2e.tokens / run.config.seq_len), run.config.e2e_seq_len
    whole = run.corpus.sequences[-count:, : run.config.seq_len // length * length]
    sequences = whole.reshape(-1, length).to(run.teacher.device)
    yield StageStarted(stage=stage, steps=_steps(run.config.e2e, sequences))
    if any(run.store.load(stage, number) is None for number in range(len(run.blocks))):
        yield from _train_whole(run, sequences)
    yield StageDone(stage=stage, seconds=time.perf_counter() - began)


def _steps(settings: WatConfig | AarConfig | E2eConfig, sequences: Tensor) -> int:
    """How many steps a stage takes on sequences (n, T)."""
    batch = max(1, settings.batch_tokens // sequences.shape[1])
    return len(batch_order(len(sequences), batch, settings.epochs, 0))


def _latents(run: _Run, blocks: list[nn.Module]) -> Iterator[Tensor]:
    """The latent weights of all layers in order: as stage 1's compensation left them, or stage 4 of the run whose
    checkpoint this one goes on from; where those are not at hand, the teacher's."""
    for number, block in enumerate(blocks):
        tensors = run.store.finished("ptq" if run.config.start is None else "start", number).tensors
        for name in binary_layers(block):
            latent = tensors.get(f"{name}.latent")
            if latent is None:
                latent = linear_weight(run.blocks[number].get_submodule(name)).detach()
            yield latent.to(run.teacher.device)


def _train_whole(run: _Run, sequences: Tensor) -> Iterator[Event]:
    stage: Stage = "e2e"
    origin = run.config.origins[-2]
    student, blocks = _whole_student(run, origin)
    training = EndToEnd(
        student,
        run.teacher,
        [layer for block in blocks for layer in binary_layers(block).values()],
        sequences,
        run.config.e2e,
        latents=list(_latents(run, blocks)) if run.config.e2e.lr_weight > 0 else (),
        seed=run.config.seed,
        autocast=run.autocast,
    )
    began = saved = time.perf_counter()
    probe = training.sequences[: max(1, PROBE_TOKENS // run.config.e2e_seq_len)]
    underway = len(blocks)  # the number under which the state of unfinished training lies beside those of the blocks
    state = run.store.load(stage, underway)
    if state is None:
        yield BlockStarted(stage=stage, block=0)
        before = training.loss(probe)
    else:
        before = state.loss_before
        training.load(state.tensors)

    def keep() -> None:
        run.store.save(stage, underway, BlockState(training.state(), before, 0.0, False))

    try:
        for step in training.steps():
            run.check()
            if step is None:
                continue
            yield _metric(stage, 0, step)
            if time.perf_counter() - saved > SAVE_SECONDS:
                keep()
                saved = time.perf_counter()
    except _Ended:
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
    for number, block in enumerate(blocks):
        tensors = collect(binary_layers(block)) | latents[number]
        if diverged:
            earlier = run.store.finished(origin, number)
            tensors = {name: tensor for name, tensor in earlier.tensors.items() if not name.endswith(".latent")}
        run.store.save(stage, number, BlockState(tensors, before, before if diverged else after, diverged))
    run.store.path(stage, underway).unlink(missing_ok=True)
    yield BlockDone(
        stage=stage,
        block=0,
        loss_before=before,
        loss_after=before if diverged else after,
        seconds=time.perf_counter() - began,
        memory_bytes=peak_memory(),
        diverged=diverged,
    )


def _restored(model: PreTrainedModel, store: BlockStore, stage: Origin, quant: QuantConfig) -> Iterator[nn.Module]:
    """The blocks of a teacher as they were after a stage, one by one. Raises CheckpointError where one is missing."""
    _, blocks, formats = block_formats(model, quant)
    for number, block in enumerate(blocks):
        yield restore(block, formats[number], store.finished(stage, number).tensors, quant.tail_steps)


def _whole_student(run: _Run, stage: Origin) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The model after a stage with BinaryLinear layers to train, and its blocks; layers that read one input share
    their quantizer."""
    quant = run.config.precision(stage)
    student: PreTrainedModel = share_copy(run.teacher)
    attach_kv_cache(student, quant.kv_bits, TrainingKVLayer)
    _, student_blocks = decoder_blocks(student)
    hidden = first_inputs(run.teacher, run.corpus.sequences[:1], 1)
    blocks: list[nn.Module] = []
    for number, restored in enumerate(_restored(run.teacher, run.store, stage, quant)):
        block, layers = run.blocks[number], binary_layers(restored)
        for names in shared_inputs(block, hidden, run.calls[number]):
            shared: dict[int, ActQuantizer] = {}
            for name in names:
                if name in layers and (quantizer := layers[name].quantizer) is not None:
                    layers[name].quantizer = shared.setdefault(quantizer.bits, quantizer)
        student_blocks[number] = restored
        blocks.append(restored)
    return student, blocks


def stage_model(config: RunConfig, folder: Path, stage: Origin, teacher: Teacher | None = None) -> PreTrainedModel:
    """The model as it was after a stage of the run in ``folder``, packed as it would be deployed, computing in float32.

    Weights alone are binarized after stages 1 and 2; from stage 3 on activations and KV cache have their bits too.
    Raises CheckpointError where the run has not finished that stage.
    """
    teacher = teacher or load_teacher(config.model)
    return _packed_model(config, folder, stage, teacher, torch.float32)[0]


def _packed_model(
    config: RunConfig, folder: Path, stage: Origin, teacher: Teacher, dtype: torch.dtype
) -> tuple[PreTrainedModel, QuantConfig]:
    """The packed model after a stage and its format; what stays dense is rounded to bfloat16 and then held in
    ``dtype``."""
    quant = config.precision(stage)
    student: PreTrainedModel = share_copy(teacher.model)
    attach_kv_cache(student, quant.kv_bits)
    _, student_blocks = decoder_blocks(student)
    for number, restored in enumerate(_restored(teacher.model, BlockStore(folder, None), stage, quant)):
        for name, layer in binary_layers(restored).items():
            packed = PackedLinear.pack(layer, quant.tail_steps, dtype)
            student_blocks[number].set_submodule(name, packed)
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(module, ActQuantizer):
                # New parameters, since the teacher shares the old ones.
                stored = parameter.detach().bfloat16().to(dtype)
                setattr(module, name, nn.Parameter(stored, requires_grad=False))
    student.tie_weights()
    return student.eval(), quant


def save_checkpoint(config: RunConfig, folder: Path, teacher: Teacher, target: Path, record: RunRecord) -> None:
    """Write the packed checkpoint of a run's last stage: model.safetensors, config.json, tokenizer, and the record of
    the run. Whole or not at all."""
    model, quant = _packed_model(config, folder, config.stages[-1], teacher, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    provenance = {"model": config.model, "precision": teacher.precision, "licence": teacher.licence}
    model.config.quantization_config = LbllmConfig(
        quant=quant.model_dump(mode="json"),
        bpw=record.bpw,
        provenance=provenance | {"run": config.model_dump(mode="json", exclude={"device"})},
    )
    model.hf_quantizer = LbllmQuantizer(model.config.quantization_config)  # type: ignore[assignment]
    unfinished = target.with_name(target.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_packed(model, unfinished)
        teacher.tokenizer.save_pretrained(unfinished)
        write_record(unfinished, record)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    unfinished.replace(target)
