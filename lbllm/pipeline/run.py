"""Run the stages in order on all decoder blocks; yields events and saves the state of every finished block.

A run can end at any moment and be resumed later: the saved states of finished blocks are loaded, their outputs are
computed again, and the random order of the training texts depends only on seed, stage and block. So a resumed run gives
the same bytes as an uninterrupted one (on a CPU with the same number of threads).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lbllm import memory, ranks
from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.record import RunRecord
from lbllm.checkpoints.weights import weights_bytes
from lbllm.config import RunConfig, setting_name
from lbllm.errors import ConfigError, CorpusError, ModelError
from lbllm.events import Evaluated, Event, RunDone, RunStarted, RunStopped
from lbllm.files import write_file
from lbllm.machine import make_accelerator
from lbllm.measure.needs import needs, planned_layers
from lbllm.measure.perplexity import HELD_OUT_TOKENS, block_perplexity
from lbllm.models.blocks import check_length, check_supported, linear_weight
from lbllm.models.experts import experts_of
from lbllm.models.source import hub_id
from lbllm.models.streamed import BlockModel
from lbllm.models.teacher import BlockTeacher, Teacher, stream_teacher
from lbllm.models.tokens import check_ids
from lbllm.pipeline.blockwise import run_stage
from lbllm.pipeline.context import CURVE_TOKENS, Ended, HeldOutTokens, RunContext
from lbllm.pipeline.end_to_end import run_end_to_end
from lbllm.pipeline.evaluated import read_evaluated, write_evaluated
from lbllm.pipeline.packed_model import save_checkpoint, stage_blocks
from lbllm.pipeline.packed_tables import save_tables
from lbllm.pipeline.start import open_start, start_blocks, start_tables
from lbllm.quant.kv_attention import attend_in_groups
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.plan import bits_per_weight, block_formats
from lbllm.ranks import Share
from lbllm.runs.store import Request
from lbllm.stages.block_state import BlockState
from lbllm.stages.block_store import BlockStore, check_weights, fingerprint
from lbllm.stages.probe import Budget
from lbllm.streams import Streams
from lbllm.texts.corpus import Corpus, load_corpus


def run(
    config: RunConfig,
    folder: Path,
    *,
    request: Callable[[], Request | None],
    teacher: Teacher | None = None,
    corpus: Corpus | None = None,
) -> Iterator[Event]:
    """Run all stages of ``config``; yields events. The result is ``folder/checkpoint``.

    Where several processes work on the run, each calls this for the same ``folder``, and rank 0 alone writes.
    ``folder`` also stores the finished blocks; the run continues after those that already exist. The perplexity of the
    teacher, and of the model after each stage, is measured on the held-out part of the configured corpus, but not if
    ``corpus`` is given. ``request`` is called at every step; if it returns a request, the run yields RunStopped and
    ends, and all finished blocks are kept. Raises LbllmError for problems that a user can solve.
    """
    began = time.perf_counter()
    budget = Budget()
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config.device, _recorded_precision(folder))
    if ranks.is_first():
        write_file(folder / "precision", accelerator.mixed_precision.encode())
    device = accelerator.device
    opened = stream_teacher(config.model, device) if teacher is None else BlockTeacher.of(teacher, device)
    model = opened.model
    check_supported(model.model)
    if any(experts_of(block) is not None for block in model.blocks):
        if ranks.count() > 1:
            raise ConfigError(f"{config.model} has experts, whose training several processes can't share yet; use one")
        if "wat" in config.stages and config.wat.streams == "both":
            raise ConfigError(
                f"{config.model} has experts, which stage 2 trains on the student's stream alone; set "
                f'{setting_name("wat.streams")} to "student"'
            )
    check_length(model.model, config.seq_len, setting_name("seq_len"))
    if KVFormat.of(config.precision(config.stages[-1])).in_groups:
        attend_in_groups(model.model)  # refuses a model that can't, before any stage
    _, blocks, formats = block_formats(model.model, config.quant)
    held_out = _held_out(config, opened.tokenizer) if corpus is None else None
    corpus = corpus or load_corpus(
        config.corpus, opened.tokenizer, seq_len=config.seq_len, tokens=config.tokens, seed=config.seed
    )
    for text in (corpus, held_out):
        if text is not None:
            check_ids(model.model, opened.tokenizer, text.sequences)
    survey = model.survey(corpus.sequences[:1])
    uncalled = [name for name in survey.uncalled if config.quant.layer(name) is not None]
    if uncalled:
        raise ModelError(
            f"{config.model} never calls {', '.join(uncalled)}: a layer without inputs can't be binarized. Keep it "
            f"dense: --set 'quant.skip={json.dumps([*config.quant.skip, *uncalled])}'"
        )
    if ranks.is_first():
        check_weights(folder, config.model, survey.hashes, model.files)
    mark = fingerprint(config, survey.hashes, corpus.hash, accelerator.mixed_precision)
    store = BlockStore(folder, mark, config.stages)
    begun = all(store.path("start", number).exists() for number in range(len(blocks)))
    if config.start is not None and not ranks.same(begun):
        _save_start(config, model, store)
    layers = planned_layers(model.model, config.precision(config.stages[-1]))
    # The size of the checkpoint, about: it decides nothing here where it is small beside a block in training.
    place = needs(config, model.model, layers, 0, gpu=device.type != "cpu").streams
    state = RunContext(
        config,
        model,
        opened.whole,
        formats,
        survey.calls,
        corpus,
        store,
        Streams(getattr(torch, config.stream_dtype), folder / "streams" if place == "disk" else None),
        accelerator.autocast,
        lambda: ranks.same(request()),
        _held_out_tokens(model, held_out, budget) if held_out is not None and ranks.is_first() else None,
    )
    _check_ranks(state)
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
        device=str(device),
        corpus_hash=corpus.hash,
        tokens=corpus.sequences.numel(),
        bpw=bpw,
        resumed_blocks=finished,
        rows_left_out=corpus.left_out,
        streams=place,
    )
    try:
        yield from _evaluate(state, "teacher", model, held_out)
        if config.start is not None:
            yield from _evaluate(state, "start", stage_blocks(config, folder, "start", model), held_out)
        for stage in config.stages:
            memory.trim()  # freed blocks of the previous stage have other sizes than this stage needs
            yield from run_end_to_end(state) if stage == "e2e" else run_stage(state, stage)
            yield from _evaluate(state, stage, stage_blocks(config, folder, stage, model), held_out)
        state.check()
    except Ended:
        asked = state.request()
        assert asked is not None
        yield RunStopped(request=asked)
        return
    target = folder / "checkpoint"
    record = RunRecord(
        settings=config,
        base_model=hub_id(config.model),
        precision=opened.precision,
        licence=opened.licence,
        bpw=bpw,
        corpus_hash=corpus.hash,
        corpus_tokens=corpus.tokens,
        evaluations=tuple(_evaluations(state, held_out)),
        start=find_checkpoint(config.start).record if config.start is not None else None,
    )
    memory.trim()
    if ranks.is_first():
        save_checkpoint(config, folder, opened, target, record)
    ranks.barrier()
    yield RunDone(
        path=str(target),
        bpw=bpw,
        disk_bytes=weights_bytes(target),
        seconds=time.perf_counter() - began,
    )


def _save_start(config: RunConfig, teacher: BlockModel, store: BlockStore) -> None:
    """Keep what the run goes on from as the states of its blocks."""
    packed = open_start(config, teacher)
    if kept := start_tables(config, packed):
        save_tables(store, "start", teacher, kept)
    for number, tensors in enumerate(start_blocks(config, packed, teacher.path)):
        store.save_whole("start", number, BlockState(tensors, 0.0, 0.0, False), experts_of(teacher.blocks[number]))


def _check_ranks(run: RunContext) -> None:
    """Raise ConfigError where a stage has fewer sequences than there are processes to share them."""
    count = ranks.count()
    stages = [stage for stage in run.config.stages if stage != "e2e"]
    least = min((len(run.sequences(getattr(run.config, stage).tokens)) for stage in stages), default=count)
    if least < count:
        raise ConfigError(
            f"{count} processes can't share a stage of {least} sequences; use at most {least} processes, more text "
            f"or a smaller {setting_name('seq_len')}"
        )


def _held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    """Return the held-out text for the run's progress, which it never trains on; None if the corpus is too short."""
    try:
        return load_corpus(config.corpus, tokenizer, seq_len=config.seq_len, tokens=HELD_OUT_TOKENS, part="heldout")
    except CorpusError:
        return None


def _held_out_tokens(model: BlockModel, held_out: Corpus, budget: Budget) -> HeldOutTokens:
    """Return the first of the held-out tokens, on which the loss of a block is measured while it trains."""
    length = min(held_out.sequences.shape[1], CURVE_TOKENS)
    ids = held_out.sequences[: CURVE_TOKENS // length, :length]
    with budget.timed():
        return HeldOutTokens(ids, model.calls(ids[:1]), budget)


def _evaluate(run: RunContext, what: str, model: BlockModel, held_out: Corpus | None) -> Iterator[Event]:
    """Measure the perplexity of ``model`` on the held-out text and yield it, unless the run's folder already has it."""
    known = ranks.same(read_evaluated(run.store.folder, run.config))
    if held_out is None or what in known:
        return
    memory.trim()  # of what a stage has freed
    windows = Share(len(held_out.sequences)).of(held_out.sequences)
    value = block_perplexity(model, windows, between=run.check_alone) if len(windows) else 1.0
    if ranks.count() > 1:
        value = math.exp(ranks.mean(math.log(value), len(windows)))
    yield _evaluation(what, value, held_out)
    if ranks.is_first():
        write_evaluated(run.store.folder, run.config, known | {what: value})


def _evaluation(what: str, value: float, held_out: Corpus) -> Evaluated:
    windows, length = held_out.sequences.shape
    text = f"held-out part of {held_out.name}, {windows} windows of {length} tokens"
    return Evaluated(what=what, text=text, perplexity=value, tokens=held_out.sequences[:, 1:].numel())


def _evaluations(run: RunContext, held_out: Corpus | None) -> Iterator[Evaluated]:
    """Yield all evaluations of a run, those of earlier workers too."""
    if held_out is not None:
        for what, value in read_evaluated(run.store.folder, run.config).items():
            yield _evaluation(what, value, held_out)


def _recorded_precision(folder: Path) -> str | None:
    """Return the precision that the run began with, or None; a resumed run must keep it."""
    try:
        written = (folder / "precision").read_bytes()
    except OSError:
        return None
    # A damaged file counts as missing: this machine then chooses again, as at the beginning of the run. Finished blocks
    # of another precision are refused.
    return {b"no": "no", b"bf16": "bf16"}.get(written.strip())
