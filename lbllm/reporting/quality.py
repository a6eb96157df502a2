"""How good the models of a report are: on texts, in tasks and in answers to prompts, beside their teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lbllm.evaluation.export import vote_words
from lbllm.evaluation.parts import GivenAnswer
from lbllm.evaluation.results import (
    TextResult,
    answers_results,
    task_difference,
    task_results,
    text_difference,
    text_results,
)
from lbllm.evaluation.words import difference_text, range_text, with_range
from lbllm.models.catalogue import last_part
from lbllm.reporting.charts import Rows, Value, rows
from lbllm.reporting.evaluations import Stored
from lbllm.runs.listed import Listed
from lbllm.units import number_text, size

SHOWN_PROMPTS = 24
BOOTSTRAP = (
    "The line through a point is its 95% interval (paired bootstrap): how far the figure would move with other {} of "
    "the same kind. It says nothing of other kinds."
)


@dataclass(frozen=True)
class Table:
    """A table: ``heads``, and rows whose first cell says what a row is of. ``names``: the heads are names, which may be
    broken anywhere."""

    label: str
    heads: list[str]
    rows: list[list[str]]
    names: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the report: charts and a table, what was measured and how, and what to know of single figures."""

    title: str
    charts: list[Rows] = field(default_factory=list)
    table: Table | None = None
    how: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """Answers side by side, as the template of saved pages shows them."""

    exchanges: list[dict[str, Any]]
    how: list[str]


def on_text(stored: Stored, hues: Mapping[int, int]) -> Part:
    """Perplexity and KL on a text."""
    found = text_results(stored.job, stored.parts)
    heads = ["Model", "Perplexity", "95% interval", "From the teacher", "KL to the teacher", "Same top token"]
    table = [_text_row(stored, number, result) for number, result in found.items()]
    charts = [
        rows(
            "Perplexity: how many tokens the model hesitates between; lower is better",
            [_value(stored, n, one.perplexity, one.interval, hues) for n, one in found.items()],
        ),
        rows(
            "KL to the teacher, in nats per token: how far the predictions are from the teacher's; lower is better",
            [
                _value(stored, n, one.kl, one.kl_interval, hues)
                for n, one in found.items()
                if one.kl is not None and n != stored.reference
            ],
        ),
    ]
    windows = max(result.windows for result in found.values())
    first = found.get(stored.reference, next(iter(found.values())))
    length = first.tokens // first.windows + 1
    text = last_part(stored.job.text)
    how = [
        f"On the text {text}: {windows:,} windows of {length:,} tokens, each scored alone. {when(stored)}",
        BOOTSTRAP.format("windows of the text"),
    ]
    how += [f"{stored.titles[n]}: {caution}" for n, caution in cautions(stored).items()]
    return Part(f"On {text}", [chart for chart in charts if chart is not None], Table(f"On {text}", heads, table), how)


def _text_row(stored: Stored, number: int, result: TextResult) -> list[str]:
    name = stored.titles[number]
    bits = stored.baseline_bits(number)
    if bits is not None:
        name += f" ({bits:.2f} bits per weight)"
    row = [name, number_text(result.perplexity), range_text(result.interval) or "too few windows"]
    if number == stored.reference:
        return [*row, "–", "–", "–"]
    apart = difference_text(text_difference(stored.job, stored.parts, number, stored.reference))
    if result.kl is None or result.agreement is None:
        return [*row, apart, "not comparable", "not comparable"]
    kl = with_range(number_text(result.kl), range_text(result.kl_interval))
    return [*row, apart, kl, f"{100 * result.agreement:.1f}%"]


def _value(stored: Stored, number: int, value: float, interval: Any, hues: Mapping[int, int]) -> Value:
    text = with_range(number_text(value), range_text(interval))
    low, high = (interval.low, interval.high) if interval is not None else (None, None)
    return Value(stored.titles[number], text, value, low, high, hues.get(number, 0))


def in_tasks(stored: Stored, hues: Mapping[int, int]) -> Part:
    """Accuracy in zero-shot tasks."""
    found = task_results(stored.job, stored.parts)
    tasks = [task for task in stored.job.tasks if any(task in one for one in found.values())]
    heads = ["Model", *tasks, "Average", "From the teacher"]
    table, values = [], []
    for number, results in found.items():
        average = results.get("")
        cells = [f"{100 * results[task].accuracy:.1f}%" if task in results else "–" for task in tasks]
        apart = "–"
        if number != stored.reference:
            apart = difference_text(task_difference(stored.job, stored.parts, number, stored.reference), percent=True)
        within = range_text(average.interval, percent=True) if average is not None else ""
        shown = "–" if average is None else with_range(f"{100 * average.accuracy:.1f}%", within)
        table.append([stored.titles[number], *cells, shown, apart])
        if average is not None:
            ends = average.interval
            low, high = (100 * ends.low, 100 * ends.high) if ends is not None else (None, None)
            hue = hues.get(number, 0)
            values.append(Value(stored.titles[number], shown, 100 * average.accuracy, low, high, hue))
    chart = rows("Average accuracy in percent; higher is better", values)
    chance = max((one[""].chance for one in found.values() if "" in one), default=math.nan)
    questions = max((one[""].questions for one in found.values() if "" in one), default=0)
    guessing = "" if math.isnan(chance) else f" Guessing gives {100 * chance:.0f}%."
    how = [
        f"Multiple choice without examples, {questions:,} questions in all: a model's answer is the choice that it "
        f"finds most likely.{guessing} {when(stored)}",
        BOOTSTRAP.format("questions of these tasks"),
    ]
    return Part("Zero-shot tasks", [chart] if chart is not None else [], Table("Zero-shot tasks", heads, table), how)


def to_prompts(stored: Stored) -> Answers:
    """Answers to the same prompts, side by side."""
    job, order = stored.job, [stored.reference, *stored.numbers.values()]
    votes = stored.parts.votes()
    answers = {number: stored.parts.answers(number) for number in order}
    exchanges = [
        {
            "prompt": prompt,
            "answers": [
                (stored.titles[n], answers[n][number] if number < len(answers[n]) else GivenAnswer(error="no answer"))
                for n in order
            ],
            "vote": vote_words(job, votes.get(number)),
        }
        for number, prompt in enumerate(job.prompts[:SHOWN_PROMPTS])
    ]
    settings = job.settings
    how = [
        f"Temperature {settings.temperature:g}"
        + (" (always the most likely token)" if settings.temperature == 0 else "")
        + f", top-p {settings.top_p:g}, repetition penalty {settings.repetition_penalty:g}, seed {settings.seed}, "
        f"at most {settings.max_new_tokens} tokens"
        + (f", system prompt: {settings.system}" if settings.system else "")
        + f". {when(stored)}"
    ]
    if len(job.prompts) > SHOWN_PROMPTS:
        how.append(f"The first {SHOWN_PROMPTS} of {len(job.prompts):,} prompts are shown; the speed is that of all.")
    how.append(
        "KL below an answer: the mean over its tokens, in nats, of the distance from what the teacher expects there."
    )
    return Answers(exchanges, how)


def speed(stored: Stored | None, runs: list[tuple[str, Listed]], hues: Mapping[int, int]) -> Part | None:
    """How fast the models write: in the answers of an evaluation, and as runs have measured it of themselves."""
    values, table, how = [], [], []
    if stored is not None:
        order = [stored.reference, *stored.numbers.values()]
        found = answers_results(stored.job, stored.parts)
        teacher = found[stored.reference].tokens_per_second
        for number in order:
            result, opened = found[number], stored.parts.opened(number)
            if not result.tokens_per_second:
                continue
            first = [one.first_token_seconds for one in stored.parts.answers(number) if not one.error]
            rate, title = f"{result.tokens_per_second:.1f} tokens/s", stored.titles[number]
            values.append(Value(title, rate, result.tokens_per_second, hue=hues.get(number, 0)))
            times = f"{result.tokens_per_second / teacher:.2f} times" if teacher and number != stored.reference else "–"
            memory = size(opened.size) if opened is not None and opened.size else "–"
            memory += f" ({opened.kept})" if opened is not None and opened.kept else ""
            table.append([title, rate, times, f"{sum(first) / len(first):.2f} s", memory])
        how.append(
            f"While the answers were written, one model after the other, {len(stored.job.prompts)} answers each. First "
            f"token: the time from the prompt until it appears. {when(stored)}"
        )
    heads = ["Model", "Speed", "Beside the teacher", "First token", "Weights in memory"]
    for title, one in runs:
        if one.speed is not None:
            how.append(
                f"{title} after a short prompt, alone: {one.speed:.1f} tokens/s on {one.machine}, stored with the run."
            )
    if not how:
        return None
    chart = rows("Tokens per second; more is better", values, bars=True)
    charts = [chart] if chart is not None else []
    return Part("Speed", charts, Table("Speed", heads, table) if table else None, how)


def cautions(stored: Stored) -> dict[int, str]:
    """What an evaluation says to know of a model, or why it has no figures."""
    known = {number: stored.parts.opened(number) for number in range(len(stored.job.models))}
    return {n: said for n, one in known.items() if one is not None and (said := one.error or one.caution)}


def when(stored: Stored) -> str:
    """When and where an evaluation was made, as a sentence."""
    made = time.strftime("%-d %B %Y, %H:%M", time.localtime(stored.one.created))
    machine = stored.machine.replace(", 1 threads", ", 1 thread")
    return f"Measured {made}" + (f", on {machine}." if machine else "; the machine was not recorded.")
