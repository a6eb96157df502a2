"""The finished parts of an evaluation, as files in its folder. Only its worker writes them; anybody reads.

    model-0.json            what was found when the first model was opened, or why it can't be measured
    text-<key>.npz          windows of the text for one tokenizer: kinds (n, T - 1) of the predicted tokens, bytes (n,)
    losses-0.f32            the first model's losses: for each finished window nll, kl and agreed, T - 1 float32 each
    questions-piqa.json     the questions of a task
    choices-0-piqa.json     what the first model chose
    answers-0.jsonl         the first model's answers, one a line, in the order of the prompts

A part is whole or not there: small files are replaced at once, and of a file that grows, a last record that a killed
worker left unfinished is cut off before the next one is written.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy

from lbllm.errors import CheckpointError, CorpusError
from lbllm.files import write_errors, write_file

Record = TypeVar("Record")


@dataclass(frozen=True)
class OpenedModel:
    """A model as it was when its first part was made.

    ``error``: why it can't be measured; empty if it can. ``files``: names, sizes and dates of its files, by which a
    changed model is noticed. ``key``: of its windows; ``caution``: what to know of its figures; ``kl``: whether it can
    be compared with the teacher. ``size``: bytes of its weights in memory; ``bits``: per binarized weight, 0 if dense;
    ``machine``: where it was measured; ``kept``: "packed", or the dtype of its weights there. Both may be empty.
    """

    error: str = ""
    files: str = ""
    key: str = ""
    caution: str = ""
    kl: bool = False
    size: int = 0
    bits: float = 0.0
    machine: str = ""
    kept: str = ""


@dataclass(frozen=True)
class TextWindows:
    """Of n windows of T tokens: ``kinds`` uint8 (n, T - 1), indices into ``KINDS``; ``bytes`` int64 (n,): how many
    bytes of text the predicted tokens of each are."""

    kinds: numpy.ndarray
    bytes: numpy.ndarray


@dataclass(frozen=True)
class Losses:
    """A model's finished windows, float32 (n, T - 1) each. ``kl`` and ``agreed`` are NaN without a teacher."""

    nll: numpy.ndarray
    kl: numpy.ndarray
    agreed: numpy.ndarray


@dataclass(frozen=True)
class Question:
    """A question of a task as a model reads it, its choices, and the index of the right one, if the task says so."""

    text: str
    choices: list[str]
    right: int | None


@dataclass(frozen=True)
class Choice:
    """What a model chose (an index), whether it is right, and the log-likelihood of each choice in nats."""

    chosen: int
    right: bool
    likelihoods: list[float]


@dataclass(frozen=True)
class Choices:
    """A model's choices in a task. ``normalized``: it chose by the likelihood per character."""

    chance: float
    normalized: bool
    choices: list[Choice]


@dataclass(frozen=True)
class GivenAnswer:
    """A model's answer to a prompt. ``kl``: the mean KL(teacher || model) over its tokens in nats, if known. ``error``:
    why there is none."""

    text: str = ""
    tokens: int = 0
    tokens_per_second: float = 0.0
    first_token_seconds: float = 0.0
    cut: bool = False
    kl: float | None = None
    error: str = ""


class Parts:
    """The files of one evaluation's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def opened(self, number: int) -> OpenedModel | None:
        """What is known of a model; None before it was opened."""
        return self._read(OpenedModel, f"model-{number}.json")

    def put_opened(self, number: int, opened: OpenedModel) -> None:
        """Store what is known of a model."""
        self._write(f"model-{number}.json", asdict(opened))

    def windows(self, key: str) -> TextWindows | None:
        """The windows for one tokenizer."""
        try:
            with numpy.load(self.folder / f"text-{key}.npz", allow_pickle=False) as file:
                return TextWindows(file["kinds"], file["bytes"])
        except (OSError, ValueError, KeyError):
            return None

    def put_windows(self, key: str, windows: TextWindows) -> None:
        """Store the windows for one tokenizer."""
        stream = io.BytesIO()
        numpy.savez_compressed(stream, kinds=windows.kinds, bytes=windows.bytes)
        with write_errors(self.folder):
            write_file(self.folder / f"text-{key}.npz", stream.getvalue())

    def losses(self, number: int, predicted: int) -> Losses:
        """A model's finished windows of ``predicted`` = T - 1 tokens."""
        try:
            data = (self.folder / f"losses-{number}.f32").read_bytes()
        except OSError:
            data = b""
        record = 12 * predicted
        values = numpy.frombuffer(data[: len(data) // record * record], dtype="<f4").reshape(-1, 3, predicted)
        return Losses(values[:, 0], values[:, 1], values[:, 2])

    def add_losses(self, number: int, losses: numpy.ndarray) -> None:
        """Add windows, float32 (n, 3, T - 1): nll, kl, agreed."""
        self._add(f"losses-{number}.f32", losses.astype("<f4").tobytes(), 12 * losses.shape[2])

    def questions(self, task: str) -> list[Question] | None:
        """The questions of a task; None before any model has answered them."""
        rows = self._rows(f"questions-{task}.json")
        return None if rows is None else [Question(**row) for row in rows]

    def put_questions(self, task: str, questions: list[Question]) -> None:
        """Store the questions of a task. Raises CorpusError if other ones are stored."""
        known = self.questions(task)
        if known is None:
            self._write(f"questions-{task}.json", [asdict(question) for question in questions])
        elif [(one.text, one.choices) for one in known] != [(one.text, one.choices) for one in questions]:
            raise CorpusError(f"the questions of {task} have changed since this evaluation began; start a new one")

    def choices(self, number: int, task: str) -> Choices | None:
        """What a model chose in a task; None before it is done."""
        found = self._read(Choices, f"choices-{number}-{task}.json")
        if found is None:
            return None
        rows: list[Any] = found.choices
        return Choices(found.chance, found.normalized, [Choice(**row) for row in rows])

    def put_choices(self, number: int, task: str, choices: Choices) -> None:
        """Store what a model chose in a task."""
        self._write(f"choices-{number}-{task}.json", asdict(choices))

    def answers(self, number: int) -> list[GivenAnswer]:
        """A model's finished answers, those of the first prompts."""
        try:
            lines = (self.folder / f"answers-{number}.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        return [GivenAnswer(**json.loads(line)) for line in lines]

    def add_answer(self, number: int, answer: GivenAnswer) -> None:
        """Add the answer to the next prompt."""
        self._add(f"answers-{number}.jsonl", json.dumps(asdict(answer)).encode() + b"\n", None)

    def votes(self) -> dict[int, int]:
        """The index of the model that answered a prompt best, -1 for a tie, -2 where all are bad, by the prompt's."""
        found = self._json("votes.json")
        return {int(key): int(value) for key, value in found.items()} if isinstance(found, dict) else {}

    def vote(self, prompt: int, choice: int | None) -> None:
        """Store a vote on a prompt's answers; None withdraws it."""
        others = {key: value for key, value in self.votes().items() if key != prompt}
        self._write("votes.json", others | ({} if choice is None else {prompt: choice}))

    def _add(self, name: str, data: bytes, record: int | None) -> None:
        """Append whole records of so many bytes, or a line; the unfinished end of an earlier one is cut off."""
        path = self.folder / name
        with write_errors(self.folder), path.open("ab") as file:
            length = file.tell()
            if record is None:
                whole = length if length == 0 else path.read_bytes().rfind(b"\n") + 1
            else:
                whole = length // record * record
            if whole != length:
                file.truncate(whole)
            file.write(data)

    def _write(self, name: str, value: object) -> None:
        with write_errors(self.folder):
            write_file(self.folder / name, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

    def _json(self, name: str) -> Any:
        """The value in a file; None if it is not there. Raises CheckpointError if it is damaged."""
        path = self.folder / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete this evaluation and measure again") from None

    def _rows(self, name: str) -> list[Any] | None:
        found = self._json(name)
        return found if isinstance(found, list) else None

    def _read(self, kind: type[Record], name: str) -> Record | None:
        found = self._json(name)
        if not isinstance(found, dict):
            return None
        known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**{key: value for key, value in found.items() if key in known})
