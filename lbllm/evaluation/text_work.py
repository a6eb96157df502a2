"""Measure models on the same windows of a text, window by window for all of them: perplexity, KL, agreement.

All models are in memory at once, so that the teacher reads each window once and the figures of all models are of the
same windows at every moment. Models with different tokenizers get windows of their own: they share no tokens, so only
bits per byte of text can be compared, and KL can't be measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lbllm.chat.lens import pieces_of
from lbllm.chat.pool import Loaded
from lbllm.errors import CorpusError, LbllmError, ModelError
from lbllm.evaluation.parts import OpenedModel, TextWindows
from lbllm.evaluation.work import Work, vocabulary_of
from lbllm.measure.perplexity import TokenLosses, token_losses, windows_at_once
from lbllm.measure.token_kinds import KINDS, kind_of
from lbllm.models.blocks import context_length
from lbllm.models.tokens import check_ids
from lbllm.texts.corpus import sequences_hash
from lbllm.texts.windows import WINDOW, check_text, evaluation_windows

NO_KL = "Its tokenizer is not the teacher's, so there is no KL, and only bits per byte can be compared."


@dataclass(eq=False)
class _Reader:
    """A model that is measured: ``done`` windows of ``windows`` (n, T). ``failed``: it can't go on."""

    number: int
    loaded: Loaded
    windows: Tensor
    kl: bool
    done: int
    failed: bool = False


def measure_text(work: Work) -> None:
    """Measure all windows that are not measured yet. Raises LbllmError if no model can be measured, Cancelled."""
    job = work.job
    check_text(job.text, job.windows)
    loaded = {number: found for number in job.order if (found := work.open(number)) is not None}
    if not loaded:
        raise ModelError("no model can be measured: " + " ".join(work.problems))
    readers = _readers(work, loaded)
    work.begin(sum(len(reader.windows) for reader in readers), sum(reader.done for reader in readers))
    teacher = next((one for one in readers if job.teacher is not None and one.number == job.reference), None)
    while waiting := [reader for reader in readers if reader.done < len(reader.windows)]:
        first = min(reader.done for reader in waiting)
        _measure(work, [reader for reader in waiting if reader.done == first], teacher, first)
        if teacher is not None and teacher.failed:
            raise ModelError("the teacher can't be measured: " + " ".join(work.problems))
        readers = [reader for reader in readers if not reader.failed]
    if not readers:
        raise ModelError("no model could be measured: " + " ".join(work.problems))


def _measure(work: Work, readers: Sequence[_Reader], teacher: _Reader | None, first: int) -> None:
    """One pass over the windows from ``first`` on, as many as go through a model at once. The teacher, first in
    ``readers`` if it is among them, reads them for itself or for the others' KL."""
    logits: Tensor | None = None
    many = windows_at_once(readers[0].windows)
    part = slice(first, (first // many + 1) * many)  # so that models that are apart meet again
    if teacher is not None and teacher not in readers and any(reader.kl for reader in readers):
        batch = teacher.windows[part]
        logits = token_losses(teacher.loaded.model, batch)[1]
    for reader in readers:
        title = work.job.shown_names[reader.number]
        batch = reader.windows[part]
        try:
            found, own = token_losses(reader.loaded.model, batch, logits if reader.kl else None)
            _check(found, work.job.text)
        except (LbllmError, RuntimeError, MemoryError) as error:
            work.refuse(reader.number, str(error).splitlines()[0])
            work.leave_out(len(reader.windows) - reader.done)
            reader.failed = True
            continue
        if reader is teacher:
            logits = own
        work.parts.add_losses(reader.number, _records(found, is_teacher=reader is teacher))
        reader.done += len(batch)
        work.tell(title, work.done + len(batch))


def _check(found: TokenLosses, text: str) -> None:
    if bool(found.nll.isnan().any()):
        raise ModelError(
            f"its perplexity on {text} became NaN: its weights or its activations are damaged; load the model again"
        )


def _records(found: TokenLosses, *, is_teacher: bool) -> numpy.ndarray:
    unknown = torch.full_like(found.nll, torch.nan)
    kl = torch.zeros_like(found.nll) if is_teacher else unknown
    agreed = torch.ones_like(found.nll) if is_teacher else unknown
    if found.kl is not None and found.agreed is not None:
        kl, agreed = found.kl.clamp_min(0), found.agreed  # rounding gives tiny negative values
    values: numpy.ndarray = torch.stack([found.nll, kl, agreed], dim=1).numpy()
    return values


def _readers(work: Work, loaded: dict[int, Loaded]) -> list[_Reader]:
    """The models with their windows, the teacher first. Raises LbllmError if the text can't be read or has changed."""
    job = work.job
    groups: dict[str, list[int]] = {}
    for number, found in loaded.items():
        groups.setdefault(vocabulary_of(found), []).append(number)
    home = next((group for group in groups.values() if job.teacher is not None and job.reference in group), [])
    readers = []
    for vocabulary, numbers in groups.items():
        try:
            windows, key = _windows(work, [loaded[number] for number in numbers], vocabulary)
        except LbllmError as error:
            if len(groups) == 1:
                raise
            for number in numbers:
                work.refuse(number, str(error))
            continue
        for number in numbers:
            try:
                readers.append(_reader(work, number, loaded[number], windows, key, kl=number in home))
            except ModelError as error:
                work.refuse(number, str(error))
    if not readers:
        raise ModelError("no model can be measured: " + " ".join(work.problems))
    if job.teacher is not None and not home:
        raise ModelError("the teacher can't be measured: " + " ".join(work.problems))
    if len(groups) > 1:
        for number in [number for group in groups.values() if group != home for number in group]:
            if job.teacher is not None:
                work.caution(number, NO_KL)
    return sorted(readers, key=lambda reader: job.order.index(reader.number))


def _reader(work: Work, number: int, found: Loaded, windows: Tensor, key: str, *, kl: bool) -> _Reader:
    check_ids(found.model, found.tokenizer, windows)
    known = work.parts.opened(number) or OpenedModel()
    if known.key and known.key != key:
        raise ModelError("the text has changed since this evaluation began; start a new evaluation")
    work.parts.put_opened(number, replace(known, key=key, kl=kl))
    done = len(work.parts.losses(number, windows.shape[1] - 1).nll)
    return _Reader(number, found, windows, kl and number != work.job.reference, done)


def _windows(work: Work, models: Sequence[Loaded], vocabulary: str) -> tuple[Tensor, str]:
    """The windows (n, T) of the models of one tokenizer, and their key; what results need of them is stored."""
    job = work.job
    contexts = [context_length(one.model) or WINDOW for one in models]
    length = job.seq_len or min(WINDOW, *contexts)
    shortest = models[contexts.index(min(contexts))]
    windows = evaluation_windows(job.text, shortest.model, shortest.tokenizer, length, job.windows)
    if len(windows) == 0:
        raise CorpusError(f"text {job.text} has fewer than {length} tokens; give a longer text or shorter windows")
    key = hashlib.sha256(f"{vocabulary} {sequences_hash(windows)}".encode()).hexdigest()[:16]
    if work.parts.windows(key) is None:
        work.tell("Reading the text", work.done)
        work.parts.put_windows(key, described(windows, shortest.tokenizer))
    return windows, key


def described(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> TextWindows:
    """The kind of each predicted token of windows (n, T), and the bytes of text that they are."""
    kinds, sizes = [], []
    for window in windows.tolist():
        first, *others = pieces_of(tokenizer, window)
        before, found = first, []
        for piece in others:
            found.append(KINDS.index(kind_of(piece, before)))
            before = piece or before
        kinds.append(found)
        sizes.append(sum(len(piece.encode("utf-8", "replace")) for piece in others))
    return TextWindows(numpy.array(kinds, dtype=numpy.uint8), numpy.array(sizes, dtype=numpy.int64))
