"""What all kinds of evaluation share while they work: opening models, telling progress, and ending on request."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from lbllm.chat.pool import Loaded
from lbllm.checkpoints.find import FoundCheckpoint, find_model
from lbllm.checkpoints.record import provenance
from lbllm.errors import LbllmError, ModelError
from lbllm.evaluation.baseline import baseline, load_any
from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.parts import OpenedModel, Parts
from lbllm.evaluation.store import Progress, write_progress
from lbllm.measure.finished import measured_on
from lbllm.models.source import find_source

WRITE_SECONDS = 0.5
ASK_SECONDS = 0.1


class Cancelled(Exception):
    """Somebody asked the evaluation to end."""


@dataclass
class Work:
    """One evaluation at work. ``problems``: sentences on what could not be measured; the rest goes on."""

    job: EvaluationJob
    folder: Path
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = Parts(self.folder)
        self._progress = Progress("Loading", 0, 0, 0, time.time())
        self._written = self._asked = 0.0

    def begin(self, total: int, done: int) -> None:
        """Say how many units there are, and how many of them an earlier worker has finished."""
        self._progress = Progress(self._progress.what, done, total, done, time.time())
        self.tell(self._progress.what, done)

    def tell(self, what: str, done: int) -> None:
        """Say what is done now. Raises Cancelled if somebody asked for the end."""
        now = time.time()
        new = what != self._progress.what
        self._progress = replace(self._progress, what=what, done=done)
        if new or now - self._written > WRITE_SECONDS or done == self._progress.total:
            write_progress(self.folder, self._progress)
            self._written = now
        self.check()

    def leave_out(self, units: int) -> None:
        """Say that so many of the units will not be done."""
        self._progress = replace(self._progress, total=self._progress.total - units)

    @property
    def done(self) -> int:
        """The finished units."""
        return self._progress.done

    def check(self) -> None:
        """Raise Cancelled if somebody asked for the end."""
        now = time.monotonic()
        if now - self._asked > ASK_SECONDS:
            self._asked = now
            if (self.folder / "cancel").exists():
                raise Cancelled

    def problem(self, message: str) -> None:
        """Keep a sentence on what could not be measured."""
        if message not in self.problems:
            self.problems.append(message)

    def open(self, number: int) -> Loaded | None:
        """Load a model; None, with the reason stored, if it can't be loaded or has changed since its first part."""
        name, title = self.job.models[number], self.job.shown_names[number]
        self.tell(f"Loading {title}", self.done)
        known = self.parts.opened(number) or OpenedModel()
        try:
            files = files_of(name)
            if known.files and known.files != files:
                raise ModelError("its files have changed since this evaluation began; start a new evaluation")
            loaded = load_any(
                name, lambda done, blocks: self.tell(f"Quantizing {title}: block {done} of {blocks}", self.done)
            )
        except LbllmError as error:
            self.refuse(number, str(error))
            return None
        bits = loaded.bpw if loaded.packed or baseline(name) is not None else 0.0
        opened = replace(known, error="", files=files, size=loaded.weight_bytes, bits=bits, caution=self._caution(name))
        kept = "packed" if loaded.packed else str(loaded.model.dtype).removeprefix("torch.")
        self.parts.put_opened(number, replace(opened, machine=measured_on(loaded.model), kept=kept))
        return loaded

    def refuse(self, number: int, reason: str) -> None:
        """Store why a model can't be measured. What is finished of it stays."""
        known = self.parts.opened(number) or OpenedModel()
        self.parts.put_opened(number, replace(known, error=reason))
        self.problem(f"{self.job.shown_names[number]} was left out: {reason}")

    def caution(self, number: int, sentence: str) -> None:
        """Store a sentence on what to know of a model's figures."""
        known = self.parts.opened(number)
        if known is not None and sentence not in known.caution:
            self.parts.put_opened(number, replace(known, caution=f"{known.caution} {sentence}".strip()))

    def _caution(self, name: str) -> str:
        """A sentence where a checkpoint was made from another model than the teacher."""
        teacher = self.job.teacher
        if teacher is None or name == teacher or baseline(name) is not None:
            return ""
        found = find_model(name)
        stated = provenance(found.stated).get("model") if isinstance(found, FoundCheckpoint) else None
        if not stated or stated.lower() == teacher.lower() or not (_is_public(stated) and _is_public(teacher)):
            return ""
        return f"It was made from {stated}, and is measured against {teacher}."


def _is_public(name: str) -> bool:
    try:
        source = find_source(name)
    except LbllmError:
        return False
    return source is not None and source.kind in ("embedded", "hub")


def files_of(name: str) -> str:
    """A hash by which a changed model is noticed. Of a checkpoint: of its config.json, which has the hashes of all that
    decides its output, and the sizes of its files. Of another folder or file: of names, sizes and dates. Of a model of
    the hub or the catalogue: of its name. Of a baseline: the teacher's. Raises LbllmError if the name leads
    nowhere.
    """
    made = baseline(name)
    if made is not None:
        return files_of(made.teacher)
    found = find_model(name)
    listed: list[object] = [name]
    try:
        if isinstance(found, FoundCheckpoint):
            stated = found.stated / "config.json"
            listed = [hashlib.sha256(stated.read_bytes()).hexdigest()]
            listed += [(path.name, path.stat().st_size) for path in _files(found.folder, "*.safetensors")]
        elif found.kind in ("folder", "gguf"):
            place = Path(found.place)
            paths = _files(place, "*") if place.is_dir() else [place]
            listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    except OSError as error:
        raise ModelError(f"{name}: its files can't be read ({error.strerror}); put the model back") from None
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def vocabulary_of(loaded: Loaded) -> str:
    """A hash of a tokenizer's tokens with their ids: models with the same one read a text in the same way."""
    return hashlib.sha256(repr(sorted(loaded.tokenizer.get_vocab().items())).encode()).hexdigest()
