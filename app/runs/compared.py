"""Runs side by side, ``?compare=ID,ID``: curves over each other, the settings that differ, cost against quality."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

import streamlit as st

from app.components.live_chart import encode, live_chart
from app.runs import overlay
from app.runs.charts import STAGE_LABELS
from app.runs.detail import watched
from app.runs.facts import show_compared
from app.runs.listing import expected_of, summary
from app.runs.report import show_report
from app.view import guard, number_text, plain, size_text, time_text
from lbllm.events import stage_parts
from lbllm.measure.finished import measure_finished
from lbllm.runs.compared import (
    COSTS,
    QUALITIES,
    Cost,
    Group,
    Quality,
    cautions,
    differing,
    frontier,
    groups,
    loss_caution,
    missing,
    points,
    setting_label,
)
from lbllm.runs.listed import Listed, describe
from lbllm.runs.notes import Note, notes
from lbllm.runs.store import ACTIVE, Run, RunStore
from lbllm.runs.view import RunView
from lbllm.sections import STAGES, Stage

POLL_SECONDS = 3.0
ADDRESS = "compare"
CURVES = ("Every block", "One block", "Each stage")
MOST = 40
_COST_NAMES: dict[Cost, str] = {"bits": "Bits", "size": "Size", "speed": "Speed"}
_QUALITY_NAMES: dict[Quality, str] = {"perplexity": "Perplexity", "kl": "KL"}


def named(address: str) -> list[str]:
    """The ids in an address, each once."""
    return list(dict.fromkeys(part for part in address.split(",") if part))[:MOST]


def show_compared_runs(runs: RunStore, address: str) -> None:
    """The page of a comparison."""
    known = {run.id: run for run in runs.all()}
    wanted = named(address)
    if st.button("All runs", icon=":material/arrow_back:", type="tertiary", key="all runs"):
        del st.query_params[ADDRESS]
        st.rerun()
    st.header("Runs side by side")
    unknown = [run_id for run_id in wanted if run_id not in known]
    if unknown:
        st.error(f"There is no run {plain(', '.join(unknown)[:200])}. Choose others below.")
    chosen = _picker(known, [run_id for run_id in wanted if run_id in known])
    if not chosen:
        st.caption("Choose two runs or more. The address keeps the choice, so it can be sent to others.")
        return
    live = POLL_SECONDS if any(known[run_id].state in ACTIVE for run_id in chosen) else None
    with st.container(), guard():
        _controls(known, chosen)
    st.fragment(_body, run_every=live)(runs, chosen)
    with guard():
        _measure(runs, [known[run_id] for run_id in chosen])
    show_report(runs, chosen)


def _picker(known: dict[str, Run], chosen: list[str]) -> list[str]:
    """Which runs are compared; the address keeps it."""
    key = "compared runs"
    names = [run.name for run in known.values()]

    def name(run_id: str) -> str:
        run = known[run_id]
        return run.name if names.count(run.name) == 1 else f"{run.name} ({run_id})"

    if st.session_state.get("compared address") != chosen:
        st.session_state[key] = chosen
    picked: list[str] = st.multiselect(
        "Runs",
        list(reversed(known)),
        format_func=name,
        key=key,
        placeholder="Choose runs",
        max_selections=MOST,
    )
    st.session_state["compared address"] = list(picked)
    if picked != chosen:
        st.query_params[ADDRESS] = ",".join(picked)
    return picked


def _controls(known: dict[str, Run], chosen: list[str]) -> None:
    """How curves and plot are drawn; the address keeps it."""
    left, right = st.columns(2, gap="medium")
    with left.container(horizontal=True, vertical_alignment="bottom"):
        kind = st.segmented_control(
            "Curves", CURVES, default=CURVES[0], key="curves", required=True, bind="query-params", width="content"
        )
        if kind != CURVES[2]:
            stages = [STAGE_LABELS[stage] for stage in STAGES]
            st.selectbox("Stage", stages, index=1, key="stage", bind="query-params", width=190)
        if kind == CURVES[1]:
            st.number_input("Block", 1, 10_000, 1, key="block", bind="query-params", width=110)
        st.toggle("Log axis", key="log", bind="query-params")
    with right.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("Cost", list(_COST_NAMES.values()), key="cost", bind="query-params", width=170)
        st.selectbox("Quality", list(_QUALITY_NAMES.values()), key="quality", bind="query-params", width=170)


def _chosen_stage() -> Stage:
    label = st.session_state.get("stage")
    return next((stage for stage in STAGES if STAGE_LABELS[stage] == label), "wat")


def _body(runs: RunStore, chosen: list[str]) -> None:
    """Charts and table; drawn again every few seconds while a run works."""
    with guard(), ExitStack() as held:
        written = notes(runs)
        found = [run for run in runs.all() if run.id in chosen]
        found.sort(key=lambda run: chosen.index(run.id))
        one_block = st.session_state.get("curves") == CURVES[1]
        # Single steps are read only for the curve of one block.
        views = [(watched if one_block else summary)(runs.root, run.id) for run in found]
        for view in views:
            held.enter_context(view.caught_up(runs))
        now = time.time()
        listed = [
            describe(run, view, written.get(run.id, Note()), now, expected_of(runs, run, view))
            for run, view in zip(found, views, strict=True)
        ]
        for caution in cautions(listed):
            st.info(plain(caution))
        measured = groups(listed)
        left, right = st.columns(2, gap="medium")
        with left, guard():
            _curves(listed, views, measured)
        with right, guard():
            group = _group(measured)
            best = _pareto(listed, group)
        _table(listed, group, best)


def _group(measured: list[Group]) -> Group | None:
    """The teacher and the text of the plot."""
    if len(measured) < 2:
        return measured[0] if measured else None
    names = {f"{group.model}: {group.text} ({len(group.runs)} runs)": group for group in measured}
    name = st.selectbox("Teacher and text", list(names), key="compared group")
    return names.get(name or "", measured[0])


def _curves(listed: Sequence[Listed], views: Sequence[RunView], measured: list[Group]) -> None:
    stage, log = _chosen_stage(), bool(st.session_state.get("log"))
    what = st.session_state.get("curves")
    number = int(st.session_state.get("block") or 1) - 1
    caution = None
    if what == CURVES[2]:
        text = measured[0].text if measured else None
        figure, label = overlay.by_stage(listed, views, text, log=log), "Perplexity after each stage"
        caution = f"Perplexity on {text}, lower is better." if text else None
    elif what == CURVES[1]:
        block = 0 if stage == "e2e" else number
        figure = overlay.one_block(listed, views, stage, block, log=log)
        label = f"Loss of block {block + 1} in {STAGE_LABELS[stage]}, smoothed"
        caution = loss_caution(listed, stage)
    else:
        figure = overlay.blocks_after(listed, views, stage, log=log)
        label = f"Loss of every block after {STAGE_LABELS[stage]}"
        caution = loss_caution(listed, stage)
    st.markdown(f"**{plain(label)}**")
    live_chart(encode(figure, label=label, stamp=sum(view.seq for view in views)), key="compared curves")
    known = [view.started.blocks for view in views if view.started is not None]
    if what == CURVES[1] and known and number >= max(stage_parts(stage, count) for count in known):
        st.caption(f"These runs have at most {max(stage_parts(stage, count) for count in known)} blocks in this stage.")
    if caution:
        st.caption(plain(caution))


def _pareto(listed: Sequence[Listed], group: Group | None) -> set[str]:
    """The plot; returns the runs on the frontier."""
    cost: Cost = next((name for name, label in _COST_NAMES.items() if label == st.session_state.get("cost")), "bits")
    quality: Quality = next(
        (name for name, label in _QUALITY_NAMES.items() if label == st.session_state.get("quality")), "perplexity"
    )
    made = points(listed, group, cost, quality) if group is not None else []
    teacher = None
    if group is not None and quality == "perplexity":
        known = [one.teachers[group.text] for one in listed if one.run.id in group.runs and group.text in one.teachers]
        teacher = known[-1].perplexity if known else None
    st.markdown(f"**{COSTS[cost]} against {QUALITIES[quality].lower() if quality == 'perplexity' else 'KL'}**")
    label = f"{COSTS[cost]} against {QUALITIES[quality]}"
    live_chart(encode(overlay.pareto(listed, made, cost, quality, teacher), label=label), key="compared plot")
    without = missing(listed, made)
    if group is not None and made:
        said = f"On {group.text}. Framed points are on the frontier: no other run here is better in both."
        if without:
            said += f" {len(without)} of the runs {'has' if len(without) == 1 else 'have'} no place in it."
        st.caption(plain(said))
    elif group is not None:
        st.caption("Measure the finished runs below, or choose other figures.")
    return {point.run for point in frontier(made, more_is_better=cost == "speed")}


def _table(listed: Sequence[Listed], group: Group | None, best: set[str]) -> None:
    def text(value: float | None, words: str = "") -> str:
        return "–" if value is None else f"{number_text(value)}{words}"

    events = [
        one.measured.get(group.text) if group is not None and one.run.id in group.runs else None for one in listed
    ]
    figures = {
        "Model": [one.model or "?" for one in listed],
        "Format": [one.format or "?" for one in listed],
        "State": [_state(one) for one in listed],
        COSTS["bits"]: [text(one.bits) for one in listed],
        "Checkpoint": ["–" if one.size is None else size_text(one.size) for one in listed],
        "Perplexity": [text(event.perplexity if event is not None else None) for event in events],
        "KL to the teacher": [text(event.kl if event is not None else None) for event in events],
        "Tokens per second": ["–" if one.speed is None else f"{one.speed:.1f}" for one in listed],
        "Time used": [time_text(one.seconds) for one in listed],
    }
    if any(one.note.tags for one in listed):
        figures["Tags"] = [", ".join(one.note.tags) or "–" for one in listed]
    rows, same = differing(listed)
    readable = sum(one.config is not None for one in listed)
    if readable < 2:
        title = "Settings: two runs with readable settings are needed"
    elif rows:
        title = f"{len(rows)} {'setting differs' if len(rows) == 1 else 'settings differ'}, {same} are the same"
    else:
        title = f"All {same} settings are the same"
    on_frontier = {(label, n) for n, one in enumerate(listed) if one.run.id in best for label in ("Perplexity",)}
    show_compared(
        [(overlay.colour(number), number + 1, one.run.name) for number, one in enumerate(listed)],
        [("", figures), (title, {setting_label(path): values for path, values in rows.items() if path != "model"})],
        on_frontier,
    )


def _state(one: Listed) -> str:
    if one.run.state != "running" or not one.parts[1]:
        return one.run.state
    left = f", about {time_text(one.left)} left" if one.left is not None else ""
    return f"running, {one.progress:.0%}{left}"


def _measure(runs: RunStore, chosen: list[Run]) -> None:
    """The button that measures what runs don't measure themselves."""
    finished = [run for run in chosen if run.state == "done" and not run.is_missing]
    if not finished:
        return
    busy = any(run.state == "running" for run in runs.all())
    said, button = st.columns([5, 2], vertical_alignment="center")
    said.caption(
        f"Runs measure their perplexity themselves. KL and speed of the {len(finished)} finished "
        f"{'run' if len(finished) == 1 else 'runs'} are measured here, on the text that the first one held out."
        + (" A run is at work: the speed measured now is lower than usual." if busy else "")
    )
    if button.button("Measure KL and speed", key="measure finished", width="stretch"):
        bar = st.progress(0.0, "Loading the teacher")

        def show(done: int, what: str) -> None:
            bar.progress(done / len(finished), plain(what))

        measure_finished(runs, finished, on_progress=show)
        st.rerun()
