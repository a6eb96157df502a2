"""Ask models the same questions of zero-shot tasks, and keep what each chose."""

from __future__ import annotations

from typing import Any

import numpy

from lbllm.chat.pool import Loaded
from lbllm.errors import LbllmError, ModelError
from lbllm.evaluation.parts import Choice, Choices, Question
from lbllm.evaluation.work import Work
from lbllm.measure.zero_shot import TASKS, zero_shot

_SHARES = 1_000  # units of progress of one model in one task


def ask_tasks(work: Work) -> None:
    """Ask all models all questions that they have not answered yet, model by model. A task whose questions are missing,
    and a model that can't be loaded, are left out with a sentence. Raises LbllmError if nothing is left, Cancelled."""
    job = work.job
    missing = {number: [task for task in job.tasks if work.parts.choices(number, task) is None] for number in job.order}
    count = len(job.models) * len(job.tasks)
    work.begin(count * _SHARES, (count - sum(map(len, missing.values()))) * _SHARES)
    unusable: set[str] = set()
    for number in job.order:
        tasks = [task for task in missing[number] if task not in unusable]
        loaded = work.open(number) if tasks else None
        if loaded is None:
            work.leave_out(len(missing[number]) * _SHARES)
            continue
        for task in tasks:
            try:
                _ask(work, number, loaded, task)
            except LbllmError as error:
                unusable.add(task)
                work.problem(f"Task {task} was left out: {error}")
                work.leave_out(_SHARES)
        del loaded
    if not any(work.parts.choices(number, task) for number in job.order for task in job.tasks):
        raise ModelError("nothing could be measured: " + " ".join(work.problems))


def _ask(work: Work, number: int, loaded: Loaded, task: str) -> None:
    job, before = work.job, work.done
    samples: list[dict[str, Any]] = []
    (score,) = zero_shot(
        loaded.model,
        loaded.tokenizer,
        [task],
        limit=job.questions,
        seed=job.seed,
        on_progress=lambda _, done, total: work.tell(
            f"{job.shown_names[number]}: {task}", before + _SHARES * done // max(1, total + 1)
        ),
        on_samples=lambda _, found: samples.extend(found),
    )
    read = [_sample(sample, normalized=score.normalized) for sample in sorted(samples, key=lambda one: one["doc_id"])]
    work.parts.put_questions(task, [question for question, _ in read])
    chosen = [choice for _, choice in read]
    if any(not numpy.isfinite(choice.likelihoods).all() for choice in chosen):
        raise ModelError(f"{job.shown_names[number]}: a likelihood is not finite; its weights are damaged")
    work.parts.put_choices(number, task, Choices(TASKS[task].chance, score.normalized, chosen))
    work.tell(f"{job.shown_names[number]}: {task}", before + _SHARES)


def _sample(sample: dict[str, Any], *, normalized: bool) -> tuple[Question, Choice]:
    """The question and the choice in what lm-eval logs of one question: each choice's text and answer, their
    log-likelihoods, and whether the likeliest one (``normalized``: per character) is right."""
    pairs = [tuple(argument) for argument in _arguments(sample["arguments"])]
    texts, choices = [str(text) for text, _ in pairs], [str(choice) for _, choice in pairs]
    # Some tasks put the choice into the text, before a common end.
    shown = choices if len(set(texts)) == 1 else texts
    text = texts[0] if len(set(texts)) == 1 else f"… {choices[0].strip()}"
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    lengths = [max(1, len(choice.removeprefix(" "))) for choice in choices]
    scores = [value / length if normalized else value for value, length in zip(likelihoods, lengths, strict=True)]
    chosen = int(numpy.argmax(scores))
    right = bool(sample["acc_norm" if normalized else "acc"])
    return Question(text, [one.strip() for one in shown], _target(sample, chosen, right)), Choice(
        chosen, right, likelihoods
    )


def _arguments(logged: Any) -> list[Any]:
    """lm-eval logs arguments as pairs, or as a dictionary of dictionaries."""
    if isinstance(logged, dict):
        return [tuple(one.values()) for one in logged.values()]
    return list(logged)


def _target(sample: dict[str, Any], chosen: int, right: bool) -> int | None:
    if right:
        return chosen
    if len(sample["filtered_resps"]) == 2:
        return 1 - chosen
    target = sample["target"]
    return int(target) if str(target).isdecimal() else None
