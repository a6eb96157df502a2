"""Measure finished runs on one text, so that they can be compared: perplexity, KL to the teacher, and speed.

    measure_finished(store, runs)

The figures become events of the runs, as those that the runs measured themselves.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lbllm.checkpoints.find import find_run, open_teacher
from lbllm.checkpoints.hf import load
from lbllm.errors import CorpusError, RunError
from lbllm.events import Evaluated, SpeedMeasured
from lbllm.machine import device_named
from lbllm.measure.doctor import processor
from lbllm.measure.perplexity import HELD_OUT_TOKENS, divergence
from lbllm.models.blocks import context_length
from lbllm.models.teacher import Teacher
from lbllm.models.tokens import check_ids
from lbllm.runs.store import Run, RunStore
from lbllm.texts.catalogue import find_text
from lbllm.texts.corpus import load_corpus

PROMPT, ANSWER = 32, 48  # tokens of the answer whose speed is measured, and of the prompt before it


def measure_finished(
    store: RunStore, runs: Sequence[Run], *, on_progress: Callable[[int, str], None] = lambda done, what: None
) -> str:
    """Measure each run's packed model beside its teacher on the text that the first run was evaluated on while it
    trained: the held-out part of its text, in windows of its length. Returns the text's name.

    ``on_progress(done, what)``: the number of runs that are done, and what is measured now. Teachers are loaded once.
    Raises RunError for a run that isn't done, CheckpointError, ModelError, CorpusError.
    """
    found = []
    for run in runs:
        checkpoint = find_run(run.id, store)
        if checkpoint is None:
            raise RunError(f"no run {run.id!r} in {store.root}")
        found.append((run, checkpoint.folder, checkpoint.model or run.config.model))
    if not found:
        raise RunError("no run is chosen; choose at least one that is done")
    device = device_named("auto")
    named, text, teacher = "", "", None
    # Runs of one teacher one after the other.
    for done, (run, folder, model) in enumerate(sorted(found, key=lambda one: one[2])):
        on_progress(done, f"{run.name}: loading")
        if teacher is None or model != named:
            teacher = None  # its memory is free before the next one is loaded
            teacher, named = open_teacher(model, device=device), model
            text, windows = _windows(runs[0], teacher)
        student, tokenizer = load(folder, device=device)
        check_ids(student, tokenizer, windows)
        on_progress(done, f"{run.name}: perplexity and KL")
        result = divergence(teacher.model, student, windows)
        rows = (
            ("teacher", result.teacher_perplexity, 0.0, 1.0),
            (run.config.stages[-1], result.student_perplexity, result.kl, result.top1_agreement),
        )
        for what, perplexity, kl, agreement in rows:
            store.append(
                run.id,
                Evaluated(
                    what=what,
                    text=text,
                    perplexity=perplexity,
                    tokens=result.tokens,
                    kl=kl,
                    top1_agreement=agreement,
                ),
            )
        on_progress(done, f"{run.name}: speed")
        store.append(run.id, decoding_speed(student))
        del student
    return text


def _windows(run: Run, teacher: Teacher) -> tuple[str, torch.Tensor]:
    """The name of the text that a run held out, as the run gives it, and its windows (n, T)."""
    config = run.config
    length = min(config.seq_len, context_length(teacher.model) or config.seq_len)
    place = run.cwd / config.corpus
    name = str(place) if find_text(config.corpus) is None and place.exists() else config.corpus
    held_out = load_corpus(name, teacher.tokenizer, seq_len=length, tokens=HELD_OUT_TOKENS, part="heldout")
    windows: torch.Tensor = held_out.sequences
    if not len(windows):
        raise CorpusError(f"text {name} has no part that runs leave out of training; give a longer text")
    return f"held-out part of {config.corpus}, {len(windows)} windows of {windows.shape[1]} tokens", windows


def decoding_speed(model: PreTrainedModel) -> SpeedMeasured:
    """The rate at which a model writes ``ANSWER`` tokens one by one after a prompt, from the second on. It answers a
    few tokens before that are not counted: the first ones of a model are slower."""
    ids = (torch.arange(PROMPT) % model.config.get_text_config().vocab_size)[None].to(model.device)

    # generate() fills what settings leave open from those of the model: a second view of it has these alone.
    writer: Any = copy.copy(model)

    def answer(tokens: int) -> list[float]:
        clock = _Clock()
        # Without the id of an end the answer has all its tokens.
        writer.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=True)
        writer.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock)
        return clock.times

    answer(4)
    times = answer(ANSWER)[1:]  # the first call of a streamer has the prompt
    rate = (len(times) - 1) / (times[-1] - times[0])
    return SpeedMeasured(tokens_per_second=rate, tokens=len(times), machine=measured_on(model))


def measured_on(model: PreTrainedModel) -> str:
    """The GPU that a model is on, or the processor with the number of threads that compute."""
    if model.device.type == "cuda":
        return str(torch.cuda.get_device_name(model.device))
    return f"{processor()}, {torch.get_num_threads()} threads"


class _Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
