"""What an evaluation measures, and of which models: one frozen document, ``job.json`` in the evaluation's folder."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lbllm.chat.settings import ChatSettings
from lbllm.errors import ConfigError
from lbllm.json_input import shortened, shown
from lbllm.measure.zero_shot import TASKS

Measure = Literal["text", "tasks", "prompts"]
MOST_MODELS = 12
MOST_ANSWERING = 4  # side by side on a page
MOST_PROMPTS = 1_000
LONGEST_PROMPT = 8_000  # characters
WINDOWS, QUESTIONS = 10, 200


class EvaluationJob(BaseModel):
    """One evaluation of ``models`` (any names that ``find_model`` takes), shown under their ``titles``.

    ``teacher``: which of them the others are measured against, if any. ``measure``: perplexity, and beside a teacher KL
    and agreement, on ``windows`` windows of ``text``, each of ``seq_len`` tokens (None: 2048, or the shortest of the
    models' contexts); accuracy on ``questions`` questions of each of ``tasks``, drawn with ``seed`` (None: all); or
    answers to ``prompts`` with ``settings``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", max_length=200)
    measure: Measure
    models: tuple[str, ...] = Field(min_length=1)
    titles: tuple[str, ...] = ()
    teacher: str | None = None
    text: str = "wikitext2"
    seq_len: int | None = Field(None, ge=2)
    windows: int | None = Field(WINDOWS, ge=1)
    tasks: tuple[str, ...] = ()
    questions: int | None = Field(QUESTIONS, ge=1)
    seed: int = Field(0, ge=0)
    prompts: tuple[str, ...] = ()
    settings: ChatSettings = ChatSettings()

    @model_validator(mode="after")
    def _fits(self) -> EvaluationJob:
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model is chosen twice; choose each once")
        if self.titles and len(self.titles) != len(self.models):
            raise ValueError(f"there are {len(self.titles)} titles for {len(self.models)} models")
        if self.teacher is not None and self.teacher not in self.models:
            raise ValueError(f"the teacher {shown(self.teacher)} is not among the models")
        most = MOST_ANSWERING if self.measure == "prompts" else MOST_MODELS
        if len(self.models) > most:
            raise ValueError(
                f"at most {most} models fit into one evaluation of this kind, and these are "
                f"{len(self.models)}; leave some out, or start another evaluation"
            )
        if self.measure == "text" and not self.text.strip():
            raise ValueError("no text is chosen")
        if self.measure == "tasks":
            _check_tasks(self.tasks)
        if self.measure == "prompts":
            _check_prompts(self.prompts)
        return self

    @property
    def shown_names(self) -> tuple[str, ...]:
        """The models as people read them."""
        return self.titles or self.models

    @property
    def title(self) -> str:
        """What the evaluation is called."""
        what = {
            "text": f"Perplexity on {self.text.rstrip('/').rpartition('/')[2]}",
            "tasks": f"{len(self.tasks)} {'tasks' if len(self.tasks) > 1 else 'task'}",
            "prompts": f"{len(self.prompts)} {'prompts' if len(self.prompts) > 1 else 'prompt'}",
        }[self.measure]
        count = len(self.models)
        return self.name or f"{what}, {count} {'models' if count > 1 else 'model'}"

    @property
    def reference(self) -> int:
        """The index of the model that the others are compared with: the teacher, or else the first."""
        return self.models.index(self.teacher) if self.teacher is not None else 0

    @property
    def order(self) -> tuple[int, ...]:
        """The models' indices, the teacher's first."""
        first = self.reference
        return (first, *(number for number in range(len(self.models)) if number != first))


def _check_tasks(tasks: tuple[str, ...]) -> None:
    if not tasks:
        raise ValueError("no task is chosen; choose at least one")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {shown(task)} is not known; choose from {', '.join(TASKS)}")


def _check_prompts(prompts: tuple[str, ...]) -> None:
    if not any(prompt.strip() for prompt in prompts):
        raise ValueError("there is no prompt; write one a line, or give a file")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(
            f"there are {len(prompts):,} prompts, and one evaluation has at most {MOST_PROMPTS:,}; split them"
        )
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(
                f"prompt {number} has {len(prompt):,} characters, and at most {LONGEST_PROMPT:,} are allowed; shorten "
                f"it ({shortened(prompt, 40)})"
            )
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; leave it out")


def make_job(**values: object) -> EvaluationJob:
    """Return the job with these values. Raises ConfigError with one sentence for the first that can't be."""
    try:
        return EvaluationJob.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def read_job(data: bytes) -> EvaluationJob:
    """Return the job that ``job.json`` holds. Raises ConfigError, whose message continues the name of the file."""
    try:
        return EvaluationJob.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"can't be read: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
