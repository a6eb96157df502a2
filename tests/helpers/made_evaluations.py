"""Stored evaluations with invented figures, for pages and commands: no model is loaded."""

from __future__ import annotations

from typing import Any

import numpy

from lbllm.evaluation.job import make_job
from lbllm.evaluation.parts import Choice, Choices, GivenAnswer, OpenedModel, Parts, Question, TextWindows
from lbllm.evaluation.store import Evaluation, EvaluationStore, write_end
from lbllm.measure.token_kinds import KINDS

MODELS = ("smollm2-135m-instruct", "shipped", "elsewhere/<b>third</b>")
TITLES = ("Teacher", "Student", "<b>Third</b> _one_")


def made(store: EvaluationStore, measure: str, models: int = 3, message: str = "", **values: Any) -> Evaluation:
    """A finished evaluation of the first so many of ``MODELS``; the first one is the teacher."""
    base: dict[str, Any] = {"measure": measure, "models": MODELS[:models], "titles": TITLES[:models]}
    base |= {"teacher": MODELS[0]} | values
    evaluation = store.create(make_job(**base))
    parts = Parts(evaluation.folder)
    for number in range(models):
        key = "same" if number < 2 else "other"
        caution = "Its tokenizer is not the teacher's." if number == 2 else ""
        parts.put_opened(number, OpenedModel("", "files", key, caution, number < 2, 10**8, 0.0 if number == 0 else 3.0))
    {"text": _text, "tasks": _tasks, "prompts": _prompts}[measure](evaluation, parts, models)
    write_end(evaluation.folder, "done", message)
    return store.get(evaluation.id)


def _text(evaluation: Evaluation, parts: Parts, models: int) -> None:
    generator = numpy.random.default_rng(0)
    shape = (6, 63)
    for key in ("same", "other"):
        kinds = generator.integers(0, len(KINDS) - 1, shape).astype(numpy.uint8)
        parts.put_windows(key, TextWindows(kinds, numpy.full(6, 250, dtype=numpy.int64)))
    hard = generator.random(shape)
    for number in range(models):
        nll = 2 + hard + 0.5 * number
        kl = numpy.full(shape, numpy.nan if number == 2 else 0.3 * number)
        parts.add_losses(number, numpy.stack([nll, kl, numpy.ones(shape) * (1 - 0.2 * number)], axis=1))


def _tasks(evaluation: Evaluation, parts: Parts, models: int) -> None:
    for task in evaluation.job.tasks:
        questions = [Question(f"Question {n} of {task}?", ["yes <i>", "no"], n % 2) for n in range(12)]
        parts.put_questions(task, questions)
        for number in range(models):
            # The teacher is always right, the others on every second and third question.
            right = [n % (number + 1) == 0 for n in range(12)]
            chosen = [n % 2 if good else 1 - n % 2 for n, good in enumerate(right)]
            given = [Choice(c, good, [-1.0, -2.0]) for c, good in zip(chosen, right, strict=True)]
            parts.put_choices(number, task, Choices(0.5, False, given))


def _prompts(evaluation: Evaluation, parts: Parts, models: int) -> None:
    for number in range(models):
        for n, prompt in enumerate(evaluation.job.prompts):
            if number == 1 and n == 1:
                parts.add_answer(number, GivenAnswer(error="the conversation has 900 tokens"))
                continue
            text = f"=Answer {n} by <script>alert({number})</script>\nto {prompt}"
            parts.add_answer(number, GivenAnswer(text, 10, 5.0 + number, 0.2, n == 0, 0.5 if number else None))
