"""The answers of an evaluation as files: CSV for a spreadsheet, and one HTML page that loads nothing."""

from __future__ import annotations

import csv
import io
import time

from lbllm.chat.votes import harmless
from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.parts import GivenAnswer, Parts
from lbllm.evaluation.results import answers_results
from lbllm.templates import environment

TIE, ALL_BAD = -1, -2  # votes that name no model
_TEMPLATES = environment(__file__)
_COLUMNS = (
    *("prompt_number", "prompt", "model", "answer", "error", "tokens", "tokens_per_second", "first_token_seconds"),
    *("cut_off", "kl_to_teacher", "vote"),
)


def vote_words(job: EvaluationJob, vote: int | None) -> str:
    """A vote in words; empty without one."""
    if vote is None:
        return ""
    known = {TIE: "tie", ALL_BAD: "all bad"} | dict(enumerate(job.shown_names))
    return known.get(vote, "")


def answers_csv(job: EvaluationJob, parts: Parts) -> str:
    """All answers, a row each; a cell that looks like a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_COLUMNS)
    votes = parts.votes()
    answers = [parts.answers(number) for number in range(len(job.models))]
    for number, prompt in enumerate(job.prompts):
        for model, name in enumerate(job.shown_names):
            if number >= len(answers[model]):
                continue
            given = answers[model][number]
            kl = "" if given.kl is None else f"{given.kl:.6g}"
            figures = (given.tokens, f"{given.tokens_per_second:.3f}", f"{given.first_token_seconds:.3f}")
            said = (harmless(prompt), harmless(name), harmless(given.text), harmless(given.error))
            vote = harmless(vote_words(job, votes.get(number)))
            writer.writerow([number + 1, *said, *figures, "yes" if given.cut else "no", kl, vote])
    return out.getvalue()


def answers_page(job: EvaluationJob, parts: Parts) -> str:
    """All answers side by side as one page, to save in UTF-8. Its template escapes every text."""
    votes = parts.votes()
    answers = [parts.answers(number) for number in range(len(job.models))]
    exchanges = [
        {
            "prompt": prompt,
            "answers": [
                (name, given[number] if number < len(given) else GivenAnswer(error="no answer yet"))
                for name, given in zip(job.shown_names, answers, strict=True)
            ],
            "vote": vote_words(job, votes.get(number)),
        }
        for number, prompt in enumerate(job.prompts)
    ]
    found = answers_results(job, parts)
    return _TEMPLATES.get_template("answers.html.jinja").render(
        title=job.title,
        when=time.strftime("%Y-%m-%d %H:%M"),
        settings=job.settings,
        teacher=job.shown_names[job.reference] if job.teacher is not None else "",
        models=[(name, found.get(number)) for number, name in enumerate(job.shown_names)],
        exchanges=exchanges,
    )
