"""The results of an evaluation in tasks: accuracy of each model, and the questions that only one gets right."""

from __future__ import annotations

import streamlit as st

from app.evaluate.figures import Card, question_html, show_cards, show_table
from app.evaluate.on_text import compared_with
from app.view import plain
from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.results import Disputed, TaskResult, disputed, task_difference, task_results
from lbllm.evaluation.words import difference_text, range_text, with_range

PAGE = 8  # questions


def show_tasks(job: EvaluationJob, parts: Parts) -> None:
    """Cards, a table of the tasks, and the questions that two models do not agree on."""
    found = task_results(job, parts)
    if not found:
        st.caption("The first figures come when a model has answered all questions of a task.")
        return
    other = compared_with(job, list(found))
    show_cards([_card(job, parts, number, tasks, other) for number, tasks in found.items()])
    st.caption("In brackets: 95% intervals of the paired bootstrap, for other questions of the same kind.")
    tasks = [task for task in job.tasks if any(task in results for results in found.values())]
    heads = ["Task", "Questions", "Guessing", *(job.shown_names[number] for number in found)]
    show_table("Accuracy in each task", heads, [_row(task, found) for task in tasks])
    if len(found) > 1:
        _only_one(job, parts, list(found))


def _card(job: EvaluationJob, parts: Parts, number: int, tasks: dict[str, TaskResult], other: int) -> Card:
    name = job.shown_names[number]
    whole = tasks.get("")
    if whole is None:
        return Card(number, name, "…", f"{len(tasks)} of {len(job.tasks)} tasks done")
    within = range_text(whole.interval, percent=True)
    rows = {}
    if number != other:
        difference = task_difference(job, parts, number, other)
        rows[f"From {job.shown_names[other]}"] = difference_text(difference, percent=True) + (
            " points" if difference is not None else ""
        )
    rows["Guessing"] = f"{100 * whole.chance:.0f}%"
    unit = with_range("right" + (" on average" if len(tasks) > 2 else ""), within)
    opened = parts.opened(number)
    return Card(number, name, f"{100 * whole.accuracy:.1f}%", unit, rows, opened.caution if opened is not None else "")


def _row(task: str, found: dict[int, dict[str, TaskResult]]) -> list[str]:
    one = next(results[task] for results in found.values() if task in results)
    cells = []
    for results in found.values():
        result = results.get(task)
        within = range_text(result.interval, percent=True) if result is not None else ""
        cells.append("–" if result is None else with_range(f"{100 * result.accuracy:.1f}%", within))
    return [task, f"{one.questions:,}", f"{100 * one.chance:.0f}%", *cells]


def _only_one(job: EvaluationJob, parts: Parts, known: list[int]) -> None:
    """The questions that only one of two models gets right."""
    st.subheader("Only one gets it right")
    name = job.shown_names.__getitem__
    left, right, which = st.columns([4, 4, 3])
    start = job.reference if job.reference in known else known[0]
    first = left.selectbox("This model", known, index=known.index(start), format_func=name, key="evaluation first")
    others = [number for number in known if number != first]
    second = right.selectbox("and this one", others, format_func=name, key=f"evaluation second of {first}")
    found = disputed(job, parts, first, second)
    sides = {
        "Either": found,
        name(first): [one for one in found if one.winner == first],
        name(second): [one for one in found if one.winner == second],
    }
    side = which.selectbox("Who is right", list(sides), key="evaluation winner") or "Either"
    listed = sides.get(side, found)
    won, lost = len(sides[name(first)]), len(sides[name(second)])
    st.markdown(
        f"{plain(name(first))} alone is right on **{won}**, {plain(name(second))} alone on **{lost}** of the questions."
    )
    if not listed:
        return
    pages = (len(listed) + PAGE - 1) // PAGE
    page = 1
    if pages > 1:
        page = int(st.number_input(f"Page of {pages}", 1, pages, 1, key="evaluation page", width=150))
    for one in listed[(page - 1) * PAGE : page * PAGE]:
        with st.container(border=True, gap="xsmall"):
            st.caption(plain(f"{one.task}, question {one.number + 1}: only {name(one.winner)} is right"))
            st.html(_question(job, one))


def _question(job: EvaluationJob, one: Disputed) -> str:
    choices = [
        {
            "text": text,
            "right": n == one.question.right,
            "chosen_by": [job.shown_names[number] for number, chosen in one.chosen.items() if chosen == n],
        }
        for n, text in enumerate(one.question.choices)
    ]
    return question_html(one.question.text, choices)
