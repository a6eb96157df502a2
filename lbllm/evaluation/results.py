"""What an evaluation has found so far: figures of each model with intervals, and differences from another model.

    found = text_results(job, parts)
    found[1].perplexity, found[1].interval
    text_difference(job, parts, 1, 0)

Intervals are those of the paired bootstrap, over windows of a text or questions of a task. They say how much a figure
would change with other windows or questions of the same kind, and nothing of other texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.parts import Choices, GivenAnswer, Losses, OpenedModel, Parts, Question
from lbllm.measure.bootstrap import Interval, interval, resampled_means
from lbllm.measure.token_kinds import KINDS, position_buckets

FEWEST = 6  # windows or questions for an interval


@dataclass(frozen=True)
class TextResult:
    """A model on the text, over the windows that it has finished.

    ``perplexity``: exp of the mean loss; ``bits_per_byte``: its loss in bits for each byte of text, which can be
    compared across tokenizers. ``kl`` (nats per token) and ``agreement`` (0 to 1): None without a teacher of the same
    vocabulary. Intervals are None with fewer than ``FEWEST`` windows.
    """

    windows: int
    tokens: int
    perplexity: float
    bits_per_byte: float
    interval: Interval | None
    kl: float | None
    kl_interval: Interval | None
    agreement: float | None


@dataclass(frozen=True)
class Difference:
    """A model's figure less another's, with its interval; ``count``: on how many windows or questions both are."""

    value: float
    interval: Interval | None
    count: int


@dataclass(frozen=True)
class Part:
    """A part of the predicted tokens: its ``share`` of them, and each model's perplexity on it, by index."""

    label: str
    share: float
    perplexity: dict[int, float]


@dataclass(frozen=True)
class TaskResult:
    """A model's accuracy in a task, or on average over several, and what guessing reaches."""

    accuracy: float
    interval: Interval | None
    chance: float
    questions: int


@dataclass(frozen=True)
class Disputed:
    """A question that one model gets right and the other does not. ``chosen``: the index that each model chose, by the
    model's index."""

    task: str
    number: int
    question: Question
    winner: int
    chosen: dict[int, int]


@dataclass(frozen=True)
class AnswersResult:
    """A model's answers so far: their number, how many are errors, and means over the others; ``kl`` where known."""

    answers: int
    errors: int
    tokens: float
    tokens_per_second: float
    kl: float | None
    best: int


def text_results(job: EvaluationJob, parts: Parts) -> dict[int, TextResult]:
    """The models that have at least one window, by index."""
    found = {}
    for number in range(len(job.models)):
        read = _losses(parts, number)
        if read is not None:
            found[number] = _text_result(*read, seed=job.seed)
    return found


def _losses(parts: Parts, number: int) -> tuple[OpenedModel, Losses, numpy.ndarray, numpy.ndarray] | None:
    """What is known of a model, its losses, and of its finished windows the kinds and the bytes."""
    opened = parts.opened(number)
    windows = parts.windows(opened.key) if opened is not None and opened.key else None
    if opened is None or windows is None:
        return None
    losses = parts.losses(number, windows.kinds.shape[1])
    count = min(len(losses.nll), len(windows.kinds))
    if count == 0:
        return None
    return opened, _cut(losses, count), windows.kinds[:count], windows.bytes[:count]


def _text_result(
    opened: OpenedModel, losses: Losses, kinds: numpy.ndarray, sizes: numpy.ndarray, *, seed: int
) -> TextResult:
    nll = losses.nll.astype(numpy.float64)
    has_kl = not numpy.isnan(losses.kl).any()
    means = numpy.stack([nll.mean(1), losses.kl.astype(numpy.float64).mean(1)], axis=1)
    drawn = resampled_means([means], seed=seed) if len(means) >= FEWEST else None
    return TextResult(
        windows=len(nll),
        tokens=nll.size,
        perplexity=_exp(float(nll.mean())),
        bits_per_byte=float(nll.sum() / math.log(2) / max(1, int(sizes.sum()))),
        interval=interval(numpy.exp(numpy.minimum(drawn[:, 0], 700)), len(nll)) if drawn is not None else None,
        kl=float(means[:, 1].mean()) if has_kl else None,
        kl_interval=interval(drawn[:, 1], len(nll)) if drawn is not None and has_kl else None,
        agreement=float(losses.agreed.mean(dtype=numpy.float64)) if has_kl else None,
    )


def text_difference(job: EvaluationJob, parts: Parts, number: int, other: int) -> Difference | None:
    """A model's perplexity less another's on the windows that both have finished; None if they share no window, as
    models with different tokenizers do."""
    pair = _pair(parts, number, other)
    if pair is None:
        return None
    rows = numpy.stack([losses.nll.astype(numpy.float64).mean(1) for losses in pair], axis=1)
    first, second = (_exp(float(mean)) for mean in rows.mean(0))
    if len(rows) < FEWEST:
        return Difference(first - second, None, len(rows))
    drawn = numpy.exp(numpy.minimum(resampled_means([rows], seed=job.seed), 700))
    return Difference(first - second, interval(drawn[:, 0] - drawn[:, 1], len(rows)), len(rows))


def kl_difference(job: EvaluationJob, parts: Parts, number: int, other: int) -> Difference | None:
    """The same for KL to the teacher, in nats per token; None also where one of them has none."""
    pair = _pair(parts, number, other)
    if pair is None or any(numpy.isnan(losses.kl).any() for losses in pair):
        return None
    rows = numpy.stack([losses.kl.astype(numpy.float64).mean(1) for losses in pair], axis=1)
    first, second = (float(mean) for mean in rows.mean(0))
    if len(rows) < FEWEST:
        return Difference(first - second, None, len(rows))
    drawn = resampled_means([rows], seed=job.seed)
    return Difference(first - second, interval(drawn[:, 0] - drawn[:, 1], len(rows)), len(rows))


def _pair(parts: Parts, number: int, other: int) -> tuple[Losses, Losses] | None:
    """The losses of two models on the windows that both have finished."""
    first, second = _losses(parts, number), _losses(parts, other)
    if first is None or second is None or first[0].key != second[0].key:
        return None
    count = min(len(first[1].nll), len(second[1].nll))
    return _cut(first[1], count), _cut(second[1], count)


def _cut(losses: Losses, count: int) -> Losses:
    """The first windows."""
    return Losses(losses.nll[:count], losses.kl[:count], losses.agreed[:count])


def by_position(job: EvaluationJob, parts: Parts) -> list[Part]:
    """Perplexity by the number of tokens that a model has read; models with other windows than the first are left
    out."""
    read = _same_windows(job, parts)
    if not read:
        return []
    predicted = next(iter(read.values()))[0].nll.shape[1]
    found = []
    for first, last in position_buckets(predicted + 1):
        part = slice(first - 1, last)
        values = {n: _exp(float(losses.nll[:, part].mean(dtype=numpy.float64))) for n, (losses, _) in read.items()}
        label = f"{first:,}" if first == last else f"{first:,}–{last:,}"
        found.append(Part(label, (last - first + 1) / predicted, values))
    return found


def by_kind(job: EvaluationJob, parts: Parts) -> list[Part]:
    """Perplexity by the kind of token that is predicted; kinds that do not occur are left out."""
    read = _same_windows(job, parts)
    found = []
    for number, kind in enumerate(KINDS):
        values, share = {}, 0.0
        for n, (losses, kinds) in read.items():
            mask = kinds == number
            if mask.any():
                values[n] = _exp(float(losses.nll[mask].mean(dtype=numpy.float64)))
                share = float(mask.mean())
        if values:
            found.append(Part(kind, share, values))
    return found


def _same_windows(job: EvaluationJob, parts: Parts) -> dict[int, tuple[Losses, numpy.ndarray]]:
    """Losses and kinds of the models that read the same windows as the reference, cut to those that all have."""
    read = {n: one for n in job.order if (one := _losses(parts, n)) is not None}
    if not read:
        return {}
    key = next(iter(read.values()))[0].key
    same = {n: one for n, one in read.items() if one[0].key == key}
    count = min(len(one[1].nll) for one in same.values())
    return {n: (_cut(one[1], count), one[2][:count]) for n, one in sorted(same.items())}


def task_results(job: EvaluationJob, parts: Parts) -> dict[int, dict[str, TaskResult]]:
    """Each model's accuracy in the tasks that it has finished; under "" the average, once it has finished all that any
    model has."""
    read = _choices(job, parts)
    done = {task for tasks in read.values() for task in tasks}
    found: dict[int, dict[str, TaskResult]] = {}
    for number, tasks in read.items():
        found[number] = {task: _accuracy([choices], job.seed) for task, choices in tasks.items()}
        if tasks.keys() == done:
            found[number][""] = _accuracy(list(tasks.values()), job.seed)
    return found


def _choices(job: EvaluationJob, parts: Parts) -> dict[int, dict[str, Choices]]:
    read = {
        number: {task: one for task in job.tasks if (one := parts.choices(number, task)) is not None}
        for number in range(len(job.models))
    }
    return {number: tasks for number, tasks in read.items() if tasks}


def _right(choices: Choices) -> numpy.ndarray:
    return numpy.array([choice.right for choice in choices.choices], dtype=numpy.float64)


def _accuracy(tasks: Sequence[Choices], seed: int) -> TaskResult:
    rows = [_right(choices)[:, None] for choices in tasks]
    enough = min(len(one) for one in rows) >= FEWEST
    return TaskResult(
        accuracy=float(numpy.mean([one.mean() for one in rows])),
        interval=interval(resampled_means(rows, seed=seed)[:, 0], _free(rows)) if enough else None,
        chance=float(numpy.mean([choices.chance for choices in tasks])),
        questions=sum(len(one) for one in rows),
    )


def _free(strata: Sequence[numpy.ndarray]) -> int:
    """The number of rows of one stratum with as many degrees of freedom as these have together."""
    return sum(len(rows) - 1 for rows in strata) + 1


def task_difference(job: EvaluationJob, parts: Parts, number: int, other: int) -> Difference | None:
    """A model's average accuracy less another's, over the tasks that both have finished; None if there is none."""
    read = _choices(job, parts)
    both = [task for task in job.tasks if task in read.get(number, {}) and task in read.get(other, {})]
    if not both:
        return None
    rows = [numpy.stack([_right(read[one][task]) for one in (number, other)], axis=1) for task in both]
    value = float(numpy.mean([(one[:, 0] - one[:, 1]).mean() for one in rows]))
    count = sum(len(one) for one in rows)
    if min(len(one) for one in rows) < FEWEST:
        return Difference(value, None, count)
    drawn = resampled_means(rows, seed=job.seed)
    return Difference(value, interval(drawn[:, 0] - drawn[:, 1], _free(rows)), count)


def disputed(job: EvaluationJob, parts: Parts, first: int, second: int) -> list[Disputed]:
    """The questions that only one of two models gets right, in the order of the tasks, with what every model chose."""
    read = _choices(job, parts)
    found = []
    for task in job.tasks:
        answered = {number: tasks[task].choices for number, tasks in read.items() if task in tasks}
        questions = parts.questions(task)
        if questions is None or first not in answered or second not in answered:
            continue
        for n, question in enumerate(questions):
            if answered[first][n].right != answered[second][n].right:
                winner = first if answered[first][n].right else second
                chosen = {number: choices[n].chosen for number, choices in answered.items()}
                found.append(Disputed(task, n, question, winner, chosen))
    return found


def answers_results(job: EvaluationJob, parts: Parts) -> dict[int, AnswersResult]:
    """The models that have answered at least one prompt, by index."""
    votes = list(parts.votes().values())
    found = {}
    for number in range(len(job.models)):
        answers = parts.answers(number)
        if answers:
            found[number] = _answers_result(answers, votes.count(number))
    return found


def _answers_result(answers: Sequence[GivenAnswer], best: int) -> AnswersResult:
    good = [answer for answer in answers if not answer.error]
    timed = [answer for answer in good if answer.tokens_per_second > 0]
    known = [(answer.kl, answer.tokens) for answer in good if answer.kl is not None]
    written = sum(tokens for _, tokens in known)
    # Tokens after the first of each answer, by the time that they took.
    seconds = sum((answer.tokens - 1) / answer.tokens_per_second for answer in timed)
    return AnswersResult(
        answers=len(answers),
        errors=len(answers) - len(good),
        tokens=sum(answer.tokens for answer in good) / max(1, len(good)),
        tokens_per_second=sum(answer.tokens - 1 for answer in timed) / seconds if seconds else 0.0,
        kl=sum(kl * tokens for kl, tokens in known) / written if written else None,
        best=best,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
