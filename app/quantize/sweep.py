"""A sweep: one run for each combination of some settings' values, with its cost before it starts."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st
from transformers import PreTrainedModel

from app.components.shown import with_default, with_value
from app.quantize import form
from app.quantize.facts import rate
from app.quantize.settings import WIDGETS, Setting
from app.view import guard, sentence, size_text, store, time_text
from lbllm.config import RunConfig, label
from lbllm.errors import LbllmError
from lbllm.measure.estimate import Estimate
from lbllm.measure.sweep import SweepEstimate, estimate_sweep
from lbllm.runs.compared import setting_text
from lbllm.runs.notes import LONGEST_TAG, notes
from lbllm.runs.store import ACTIVE
from lbllm.runs.sweep import MOST_RUNS, Planned, free_name, parse_axis, planned, queue

SETTINGS_KEY, NAME_KEY = f"{form.SWEEP_KEY}settings", f"{form.SWEEP_KEY}name"
_BY_PATH = {setting.path: setting for setting in WIDGETS}


def show_sweep(config: RunConfig, model: PreTrainedModel) -> None:
    """The section, folded until a setting is chosen."""
    with st.expander("Several runs: try out values", expanded=bool(st.session_state.get(SETTINGS_KEY))):
        st.fragment(_section)(config, model)


def _section(config: RunConfig, model: PreTrainedModel) -> None:
    with guard():
        st.caption(
            "Choose settings and the values to try: each combination is one run, with all other settings as they are "
            "here. The runs work one after the other, and a tag keeps them together."
        )
        offered = [setting.path for setting in WIDGETS if form.fixed(setting) is None]
        st.session_state.setdefault(SETTINGS_KEY, [])
        st.session_state[SETTINGS_KEY] = [path for path in st.session_state[SETTINGS_KEY] if path in offered]
        paths = st.multiselect(
            "Settings to vary",
            offered,
            format_func=lambda path: str(label(path)),
            **with_default(SETTINGS_KEY),
            max_selections=4,
            placeholder="Group size, bits of group parameters, epochs and so on",
        )
        axes = {path: _values(_BY_PATH[path], config) for path in paths}
        form.keep()
        if not paths:
            return
        try:
            runs = planned(config, axes)
        except LbllmError as error:
            st.warning(sentence(error))
            return
        found = _estimated(config, runs, model)
        _outlook(runs, found)
        _start(runs, found)


def _values(setting: Setting, config: RunConfig) -> list[Any]:
    """The values of a setting that are tried, from buttons where it has a few, else from a line of numbers."""
    key = f"{form.SWEEP_KEY}{setting.path}"
    name = str(label(setting.path))
    own = form.value_of(config.model_dump(mode="json"), setting)
    if setting.choices and not setting.step:
        choices = list(setting.choices) if own in setting.choices else [*setting.choices, own]
        st.session_state.setdefault(key, [own])
        chosen = st.pills(
            name, choices, format_func=setting.show, selection_mode="multi", help=setting.help, **with_default(key)
        )
        return [list(value) if isinstance(value, tuple) else value for value in chosen or []]
    st.session_state.setdefault(key, str(own))
    text = st.text_input(
        f"{name}: values, with commas between them", **with_value(key), help=setting.help, placeholder=f"{own}, …"
    )
    return parse_axis(f"{setting.path}={text}")[1] if text.strip() else []


def _estimated(config: RunConfig, runs: list[Planned], model: PreTrainedModel) -> SweepEstimate:
    """The estimate, made again only when the runs are others."""
    asked = json.dumps([one.config.model_dump(mode="json") for one in runs])
    known = st.session_state.get("swept estimate")
    if known is None or known[0] != asked:
        with st.spinner("Estimating"):
            found = estimate_sweep(runs, store().root, model=model, rate=rate(config.device))
        st.session_state["swept estimate"] = known = (asked, found)
    result: SweepEstimate = known[1]
    return result


def _outlook(runs: list[Planned], found: SweepEstimate) -> None:
    st.markdown(
        f"**{len(runs)} {'run' if len(runs) == 1 else 'runs'}, about {time_text(found.seconds)}** one after the other, "
        f"**{size_text(found.disk_bytes)}** of disk space for all their files"
    )
    rows = [_row(one, result) for one, result in zip(runs, found.runs, strict=True)]
    st.dataframe(rows, hide_index=True, height=min(38 + 35 * len(rows), 260))
    for problem in found.problems:
        st.warning(sentence(problem))


def _row(one: Planned, result: Estimate | None) -> dict[str, Any]:
    """A run's own values and its figures, by the headings of the table."""
    row: dict[str, Any] = {str(label(path)): setting_text(path, value) for path, value in one.choice.items()}
    row["Bits"] = None if result is None else round(result.bpw, 3)
    row["Size"] = "–" if result is None else size_text(result.disk_bytes)
    row["Time"] = "–" if result is None else time_text(result.seconds)
    return row


def _start(runs: list[Planned], found: SweepEstimate) -> None:
    free = free_name(notes(store()))
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    name = left.text_input("Tag of these runs", placeholder=free, max_chars=LONGEST_TAG, **with_value(NAME_KEY))
    form.keep()
    ahead = sum(run.state in ACTIVE for run in store().all())
    if ahead:
        st.caption(f"{ahead} {'run is' if ahead == 1 else 'runs are'} ahead of them.")
    pressed = right.button(
        f"Start {len(runs)} {'run' if len(runs) == 1 else 'runs'}",
        type="primary",
        key="quantize start sweep",
        disabled=bool(found.problems),
        help=f"At most {MOST_RUNS} at once.",
        width="stretch",
    )
    if pressed:
        tag = name.strip() or free
        queue(store(), runs, tag)
        st.session_state.pop("swept estimate", None)
        st.switch_page("pages/runs.py", query_params={"tag": tag})
