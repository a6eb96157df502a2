"""The results of an evaluation on a text: perplexity and KL of each model, by position and by kind of token."""

from __future__ import annotations

import streamlit as st

from app.components.live_chart import encode, live_chart
from app.evaluate.figures import Card, show_cards, show_table
from app.runs.charts import Figure
from app.runs.overlay import colour, literal
from app.view import number_text, plain
from lbllm.evaluation.baseline import baseline
from lbllm.evaluation.job import EvaluationJob
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.results import (
    Part,
    TextResult,
    by_kind,
    by_position,
    kl_difference,
    text_difference,
    text_results,
)
from lbllm.evaluation.words import difference_text, range_text, with_range
from lbllm.labels import BINARIZED_BITS


def show_text(job: EvaluationJob, parts: Parts) -> None:
    """Cards, then the perplexity taken apart."""
    found = text_results(job, parts)
    if not found:
        st.caption("The first figures come when the models are loaded and a window is measured.")
        return
    other = compared_with(job, list(found))
    keys = {opened.key for n in found if (opened := parts.opened(n)) is not None}
    show_cards([_card(job, parts, n, result, other, bytes_matter=len(keys) > 1) for n, result in found.items()])
    windows = sorted({result.windows for result in found.values()})
    count = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
    st.caption(
        plain(
            f"On {job.text}, {count} {'window' if windows == [1] else 'windows'}. In brackets: 95% intervals of "
            "the paired bootstrap, for other windows of the same kind of text."
        )
    )
    places, kinds = by_position(job, parts), by_kind(job, parts)
    shown = list(kinds[0].perplexity) if kinds else []
    left, right = st.columns([6, 5], gap="medium")
    with left:
        st.markdown("**Perplexity by kind of token**")
        heads = ["Kind", "Share", *(job.shown_names[n] for n in shown)]
        show_table("Perplexity by kind of token", heads, [_row(part, shown) for part in kinds])
    with right:
        st.markdown("**Perplexity by tokens read before**")
        live_chart(encode(_chart(job, places), label="Perplexity by tokens read before"), key="evaluation positions")


def compared_with(job: EvaluationJob, known: list[int]) -> int:
    """The model that differences are from: the teacher; of more than two models the user chooses."""
    first = job.reference if job.reference in known else known[0]
    if len(known) < 3:
        return first
    chosen: int = st.selectbox(
        "Differences from",
        known,
        index=known.index(first),
        format_func=lambda n: job.shown_names[n],
        key="evaluation other",
        width=340,
    )
    return chosen


def _card(job: EvaluationJob, parts: Parts, number: int, result: TextResult, other: int, *, bytes_matter: bool) -> Card:
    within = range_text(result.interval)
    rows = {}
    if number != other:
        rows[f"From {job.shown_names[other]}"] = difference_text(text_difference(job, parts, number, other))
        if job.reference not in (number, other) and (apart := kl_difference(job, parts, number, other)) is not None:
            rows["KL, difference"] = difference_text(apart)
    if result.kl is not None and number != job.reference:
        rows["KL to the teacher"] = with_range(number_text(result.kl), range_text(result.kl_interval))
        rows["Same top token"] = f"{100 * (result.agreement or 0):.1f}%"
    opened = parts.opened(number)
    if opened is not None and opened.bits:
        binarized = baseline(job.models[number]) is None
        rows[BINARIZED_BITS.capitalize() if binarized else "Bits per quantized weight"] = f"{opened.bits:.2f}"
    note = opened.caution if opened is not None else ""
    figure, unit = number_text(result.perplexity), with_range("perplexity", within)
    if bytes_matter:
        # Perplexities count tokens, which differ: the figure that stands out is the one that can be compared.
        rows = {"Perplexity": with_range(figure, within)} | rows
        figure, unit = number_text(result.bits_per_byte), "bits per byte"
    return Card(number, job.shown_names[number], figure, unit, rows, note)


def _row(part: Part, shown: list[int]) -> list[str]:
    values = [number_text(part.perplexity[n]) if n in part.perplexity else "–" for n in shown]
    return [part.label.capitalize(), f"{100 * part.share:.1f}%", *values]


def _chart(job: EvaluationJob, places: list[Part]) -> Figure:
    data = [
        {
            "uid": f"model {n}",
            "type": "scatter",
            "mode": "lines+markers",
            "name": literal(job.shown_names[n]),
            "x": [part.label for part in places],
            "y": [part.perplexity[n] if part.perplexity[n] < float("inf") else None for part in places],
            "line": {"color": colour(n), "width": 2},
            "marker": {"size": 8},
        }
        for n in (places[0].perplexity if places else ())
    ]
    return {
        "data": data,
        "layout": {
            "height": 320,
            "xaxis": {"title": {"text": "tokens read before", "standoff": 8}, "type": "category", "automargin": True},
            "yaxis": {"type": "log", "title": {"text": "perplexity"}},
        },
    }
