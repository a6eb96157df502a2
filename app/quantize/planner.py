"""A plan on the Quantize page: a format for each layer within some bits, a size of the file or of memory."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import streamlit as st
from transformers import PreTrainedModel

from app.components.shown import with_default, with_value
from app.quantize import form
from app.view import COLOURS, guard, number_text, plain, sentence
from lbllm.config import RunConfig, parse_config
from lbllm.errors import LbllmError
from lbllm.labels import BINARIZED_BITS
from lbllm.planning.candidates import format_words
from lbllm.planning.plan import Choice, Overridden, Plan, with_formats
from lbllm.planning.target import parse_target
from lbllm.planning.words import chosen_words, format_counts
from lbllm.planning.work import Job

JOB, FILLED, PROBLEM = "quantize plan job", "quantize planned overrides", "quantize plan problem"
REDRAW = "quantize plan redraw"
WAYS_KEY, CHECK_KEY = "quantize plan ways", "quantize plan check"
_GREY: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off"}
WAYS: dict[Overridden, str] = {"keep": "Keep them", "replace": "Choose for them too"}


def show_planner(config: RunConfig, model: PreTrainedModel) -> None:
    """The section, folded until a plan is made."""
    job: Job | None = st.session_state.get(JOB)
    with st.expander("Plan by size: a format for each layer", expanded=job is not None):
        running = job is not None and not job.ended
        st.fragment(_section, run_every=1.0 if running else None)(config, running)


def _section(config: RunConfig, running: bool) -> None:
    with guard():
        if st.session_state.pop(REDRAW, False):
            st.rerun()  # the whole page: the button is part of this section alone
        st.caption(
            "Say how large the model may be. The program measures once what each layer costs, some minutes on the "
            "embedded model, and chooses format, group size and parameter bits layer by layer."
        )
        left, right = st.columns([3, 2], vertical_alignment="bottom")
        text = left.text_input(
            "At most", placeholder="2.6 bits, 70 MB or 4 GB of memory", disabled=running, **with_value(form.PLAN_KEY)
        )
        form.keep()
        ways = _ways(config, running)
        st.session_state.setdefault(CHECK_KEY, True)
        check = st.toggle(
            "Measure the plan, too",
            **with_value(CHECK_KEY),
            disabled=running,
            help="Stage 1 of the whole model in the plan's formats and in the best format for all layers, some minutes "
            "each. If the plan is worse, it is one format for all. Without this its figures are predicted.",
        )
        job: Job | None = st.session_state.get(JOB)
        if running and job is not None:
            right.button("Cancel", key="quantize plan cancel", on_click=job.cancel, width="stretch")
            if job.ended:
                st.rerun()
            st.progress(min(1.0, job.share), plain(job.what))
            return
        if right.button("Plan", key="quantize plan", width="stretch", disabled=not text.strip()):
            _begin(config, text, ways, check)
        if PROBLEM in st.session_state:
            st.error(sentence(st.session_state[PROBLEM]))
        if job is None:
            return
        if job.error is not None:
            st.warning(sentence(job.error))
        if job.plan is not None:
            _show(job.plan)


def _begin(config: RunConfig, text: str, ways: Overridden, check: bool) -> None:
    """Start to make a plan, or keep what is wrong with the target, which is shown until the next one."""
    st.session_state.pop(PROBLEM, None)
    try:
        target = parse_target(text)
    except LbllmError as error:
        st.session_state[PROBLEM] = str(error)
        return
    st.session_state[JOB] = Job(config, target, ways, check)
    st.session_state[JOB].wait(1.0)
    st.rerun()


def _ways(config: RunConfig, running: bool) -> Overridden:
    """What happens to layers with a format of their own; asked only where there are some."""
    own = config.quant.model_dump(mode="json")["overrides"]
    if not any(rule.get(key) is not None for rule in own.values() for key in ("format", "group_size", "param_bits")):
        return "refuse"
    # What an earlier plan has filled in is planned anew.
    st.session_state.setdefault(WAYS_KEY, "replace" if st.session_state.get(FILLED) == own else "keep")
    chosen: Overridden | None = st.segmented_control(
        "Layers with settings of their own",
        list(WAYS),
        format_func=WAYS.__getitem__,
        **with_default(WAYS_KEY),
        required=True,
        disabled=running,
        help="The table below, Per layer, has settings for some layers.",
    )
    return chosen or "keep"


def _show(plan: Plan) -> None:
    first, *others = chosen_words(plan)
    left, right = st.columns(2)
    left.metric("Expected KL of the plan", number_text(plan.chosen.kl), _how(plan.chosen), **_GREY)
    if plan.uniform is not None:
        right.metric("Best format for all", number_text(plan.uniform.kl), _how(plan.uniform), **_GREY)
    st.markdown(plain(first))
    st.plotly_chart(chart(plan), config={"displayModeBar": False}, key="quantize plan chart")
    for line in others:
        st.caption(plain(line))
    rows = [{"Layers": count, "Format": words} for words, count in format_counts(plan).items()]
    st.dataframe(rows, hide_index=True, height=min(38 + 35 * len(rows), 220))
    st.button("Fill the form with this plan", key="quantize plan fill", on_click=_fill, args=(plan,), type="primary")
    st.caption(
        "KL after stage 1 on little of the chosen text, without the later stages: good to compare formats, higher than "
        "what a run ends with. Filled points of the chart were measured, the others and the line are predicted."
    )


def _fill(plan: Plan) -> None:
    """Put the plan's formats into the settings as they are now."""
    config = with_formats(parse_config(st.session_state[form.DOCUMENT]), plan.formats)
    form.load(config)
    st.session_state[FILLED] = config.quant.model_dump(mode="json")["overrides"]
    st.session_state.pop(WAYS_KEY, None)
    st.session_state[REDRAW] = True


def chart(plan: Plan) -> go.Figure:
    """Bits against KL: what plans reach as a line, formats for all layers as points, the plan itself."""
    figure = go.Figure()
    figure.add_scatter(
        x=[one.bits for one in plan.curve],
        y=[one.kl for one in plan.curve],
        mode="lines",
        name="plans",
        line={"color": COLOURS["student"], "width": 2.5},
        hovertemplate="a plan: %{x:.2f} bits, KL %{y:.3f}<extra></extra>",
    )
    uniforms = [one for one in plan.uniforms if _shown(plan, one)]
    figure.add_scatter(
        x=[one.bits for one in uniforms],
        y=[one.kl for one in uniforms],
        customdata=[_point_words(one) for one in uniforms],
        mode="markers",
        name="one format for all",
        marker={
            "color": COLOURS["ptq"],
            "size": 8,
            "symbol": ["circle" if one.measured is not None else "circle-open" for one in uniforms],
        },
        hovertemplate="%{customdata}<br>%{x:.2f} bits, KL %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=[plan.chosen.bits],
        y=[plan.chosen.kl],
        mode="markers",
        name="this plan",
        marker={"color": COLOURS["bad"], "size": 14, "symbol": "star"},
        hovertemplate="this plan: %{x:.3f} bits, KL %{y:.3f}<extra></extra>",
    )
    figure.update_layout(
        height=290,
        margin={"l": 8, "r": 8, "t": 14, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": BINARIZED_BITS, "fixedrange": True},
        yaxis={"title": "KL, nats per token", "type": "log", "fixedrange": True} | _ticks(),
    )
    return figure


def _ticks() -> dict[str, list[Any]]:
    """Labels of a logarithmic axis in full: 0.05, 0.1, 0.2."""
    values = [figure * 10.0**power for power in range(-4, 3) for figure in (1, 2, 5)]
    return {"tickvals": values, "ticktext": [f"{value:g}" for value in values]}


def _how(one: Choice) -> str:
    return "predicted" if one.measured is None else "measured"


def _shown(plan: Plan, one: Choice) -> bool:
    """Whether a format for all layers is near what plans reach; the others would only stretch the chart."""
    bits = [point.bits for point in plan.curve]
    return min(bits) <= one.bits <= max(bits) and one.kl <= max(point.kl for point in plan.curve)


def _point_words(one: Choice) -> str:
    assert one.uniform is not None
    return f"{format_words(one.uniform)}, {_how(one)}"
