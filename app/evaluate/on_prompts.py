"""The results of an evaluation by prompts: answers side by side, votes, and the files to take along."""

from __future__ import annotations

from functools import partial

import streamlit as st

from app.evaluate.figures import answer_html, prompt_html, show_table
from app.view import number_text, plain
from lbllm.evaluation.export import ALL_BAD, TIE, answers_csv, answers_page
from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.parts import GivenAnswer, Parts
from lbllm.evaluation.results import answers_results

PAGE = 6  # prompts


def show_prompts(job: EvaluationJob, parts: Parts) -> None:
    """A line of figures for each model, then the prompts with all answers."""
    found = answers_results(job, parts)
    if not found:
        st.caption("The first answers come when a model is loaded.")
        return
    rows = []
    for number, result in found.items():
        speed = f"{result.tokens_per_second:.1f}" if result.tokens_per_second else "–"
        kl = number_text(result.kl) if result.kl is not None else "–"
        count = f"{result.answers:,}" + (f", {result.errors:,} without" if result.errors else "")
        rows.append([job.shown_names[number], count, f"{result.tokens:.0f}", speed, kl, f"{result.best}"])
    heads = ["Model", "Answers", "Tokens each", "Tokens per second", "KL to the teacher", "Voted best"]
    show_table("The models", heads, rows)
    _files(job, parts)
    pages = (len(job.prompts) + PAGE - 1) // PAGE
    page = 1
    if pages > 1:
        page = int(st.number_input(f"Page of {pages}", 1, pages, 1, key="evaluation prompts page", width=150))
    answers = {number: parts.answers(number) for number in range(len(job.models))}
    votes = parts.votes()
    for number in range((page - 1) * PAGE, min(page * PAGE, len(job.prompts))):
        with st.container(border=True, key=f"evaluated prompt {number}"):
            _exchange(job, parts, number, answers, votes.get(number))


def _exchange(
    job: EvaluationJob, parts: Parts, number: int, answers: dict[int, list[GivenAnswer]], vote: int | None
) -> None:
    st.html(prompt_html(f"{number + 1}. {job.prompts[number]}"))
    for model, column in zip(range(len(job.models)), st.columns(len(job.models), gap="medium"), strict=True):
        given = answers[model][number] if number < len(answers[model]) else None
        column.markdown(f"**{plain(job.shown_names[model])}**")
        if given is None:
            column.caption("No answer yet.")
        elif given.error:
            column.caption(plain(f"No answer: {given.error}"))
        else:
            with column:
                st.html(answer_html(given.text))
            column.caption(plain(figures_text(given)))
    if sum(number < len(given) for given in answers.values()) > 1:
        key = f"evaluation vote {number}"
        options = [*range(len(job.models)), TIE, ALL_BAD]
        st.segmented_control(
            f"Best answer to prompt {number + 1}",
            options,
            default=vote if vote in options else None,
            format_func=lambda choice: vote_text(job, choice),
            key=key,
            label_visibility="collapsed",
            on_change=_cast,
            args=(parts, number, key),
        )


def _cast(parts: Parts, number: int, key: str) -> None:
    parts.vote(number, st.session_state[key])


def vote_text(job: EvaluationJob, choice: int) -> str:
    """A vote as the page names it."""
    return {TIE: "Tie", ALL_BAD: "All bad"}.get(choice) or f"{plain(job.shown_names[choice])} is best"


def figures_text(given: GivenAnswer) -> str:
    """A line of figures of an answer."""
    said = [f"{given.tokens} tokens"]
    if given.tokens_per_second:
        said.append(f"{given.tokens_per_second:.1f} tokens/s")
    if given.kl is not None:
        said.append(f"KL {number_text(given.kl)}")
    if given.cut:
        said.append("cut off at the limit")
    return " · ".join(said)


def _files(job: EvaluationJob, parts: Parts) -> None:
    with st.container(horizontal=True):
        st.download_button(
            "As CSV", partial(answers_csv, job, parts), "answers.csv", "text/csv", on_click="ignore", key="answers csv"
        )
        st.download_button(
            "As page",
            partial(answers_page, job, parts),
            "answers.html",
            "text/html",
            on_click="ignore",
            key="answers page",
            help="One HTML file with all prompts, answers, figures and votes.",
        )
