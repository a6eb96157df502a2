"""What a run makes from what, and its labelled figures, as HTML of the page's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Literal

import streamlit as st

from app.paths import named_by_run
from app.runs.charts import HATCH, WORKING
from app.view import COLOURS, sentence
from lbllm.errors import RunError
from lbllm.labels import run_facts
from lbllm.runs.notes import Note
from lbllm.runs.store import Run
from lbllm.sections import Stage
from lbllm.templates import environment

_TEMPLATES = environment(__file__)


def style() -> None:
    """The styles of what this module and the charts show; once on a page."""
    st.html(_TEMPLATES.get_template("style.html.jinja").render())


def show_facts(facts: Mapping[str, str], kind: Literal["figures", "settings"]) -> None:
    """Values with their labels: ``figures`` in columns, ``settings`` in lines."""
    st.html(_TEMPLATES.get_template("facts.html.jinja").render(facts=facts, kind=kind))


def show_note(note: Note) -> None:
    """A run's tags and its note, as it was written."""
    if note != Note():
        st.html(_TEMPLATES.get_template("note.html.jinja").render(note=note))


def show_compared(
    runs: Sequence[tuple[str, int, str]],
    parts: Sequence[tuple[str, Mapping[str, Sequence[str]]]],
    best: Set[tuple[str, int]],
) -> None:
    """A table with a column for each run (colour, number, name). ``parts``: a heading, and rows of one value for each
    run by their labels; ``best``: the cells (label, column) that stand out."""
    template = _TEMPLATES.get_template("compared.html.jinja")
    heads = [{"colour": colour, "number": number, "name": name} for colour, number, name in runs]
    shown = [{"title": title, "rows": rows} for title, rows in parts if title or rows]
    st.html(template.render(runs=heads, parts=shown, best=best))


def show_settings(run: Run) -> None:
    """The run's settings in a line or two, or why they can't be read."""
    try:
        config = run.config
    except RunError as error:
        st.caption("Its settings are gone with its folder." if run.is_missing else sentence(error))
        return
    show_facts(run_facts(config), "settings")


def show_legend(stages: tuple[Stage, ...]) -> None:
    """What the colours of the timeline mean."""
    finished = [COLOURS[stage] for stage in stages]
    template = _TEMPLATES.get_template("legend.html.jinja")
    st.html(template.render(working=WORKING, finished=finished, hatch=HATCH))


def teacher_of(run: Run) -> str | None:
    """The run's model as another page takes it; None if the settings can't be read."""
    try:
        return named_by_run(run, run.config.model)
    except RunError:
        return None
