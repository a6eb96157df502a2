"""One run in full: its state, its actions, its figures and charts.

While the run is active the browser calls ``follow`` every second: one small fragment that reads the new events and
draws the curve of the current block and the line with the time left. The rest of the page stays as it is until a block
is finished or something else has changed that it shows. This keeps the page's cost to a few percent of one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.components.live_chart import encode, live_chart
from app.runs import charts
from app.runs.actions import header
from app.runs.charts import STAGE_LABELS, Chosen, Figure, place_name
from app.runs.experts import show_experts
from app.runs.export import show_export
from app.runs.facts import show_legend, show_note, show_settings, teacher_of
from app.runs.report import show_report
from app.runs.state import badge, stage_seconds, state_text
from app.view import guard, number_text, path_text, plain, sentence, size_text
from lbllm.config import CONTINUATIONS, FROM_CHECKPOINT
from lbllm.events import stage_parts
from lbllm.labels import BINARIZED_BITS
from lbllm.runs.notes import note_of
from lbllm.runs.store import ACTIVE, Run, RunStore
from lbllm.runs.view import RunView
from lbllm.sections import PAPER_STAGES, STAGES, stage_number

POLL_SECONDS = 1.0
LINES = ("Raw", "Smoothed", "Both")


@st.cache_resource(max_entries=16, show_spinner="Reading the run")
def watched(root: Path, run_id: str) -> RunView:
    """The run's view, shared by all tabs of this server."""
    return RunView(run_id)


def remembered(run_id: str, chart: str, version: object, make: Callable[[], bytes]) -> bytes:
    """An encoded chart; ``make`` is called only when its ``version`` isn't the last one of this session."""
    known = st.session_state.setdefault("run_charts", {})
    last = known.get(chart)
    if last is None or last[0] != (run_id, version):
        known[chart] = last = ((run_id, version), make())
    encoded: bytes = last[1]
    return encoded


def one_loss(view: RunView) -> bool:
    """Whether the run has only stage 4: it trains all blocks at once, so single blocks have no losses."""
    return view.started is not None and view.started.stages == FROM_CHECKPOINT


def outcome(run: Run, view: RunView) -> None:
    """How the run ended and what can be done about it."""
    if run.is_missing:
        st.error(
            f"The run's folder {path_text(run.folder)} was moved or deleted, with settings, blocks and checkpoint. "
            "What follows is kept elsewhere. Put the folder back to use the run again."
        )
    elif run.state == "failed":
        st.error(sentence(view.failure or "The run failed.") + "  \n*Resume* continues from the finished blocks.")
    elif run.state == "interrupted" and run.failure is not None:
        st.error(sentence(run.failure) + "  \n*Resume* continues from the finished blocks.")
    elif run.state == "interrupted":
        st.error(
            "The worker process ended without a message: it was killed, or the machine was shut down. *Resume* "
            f"continues from the finished blocks. The worker's log is {path_text(run.folder / 'worker.log')}."
        )
    elif run.state == "cancelled":
        if view.started is None:
            st.info("This run was cancelled before its model was loaded, so it has no charts. It can't be resumed.")
        else:
            st.info("This run was cancelled and its finished blocks are deleted. The charts show what it had done.")
    elif run.state == "stopped":
        before = " before its model was loaded" if view.started is None else ""
        st.info(f"This run was stopped{before}. *Resume* continues from its finished blocks.")
    elif run.state == "done" and view.result is not None:
        done, links = st.columns([5, 2], vertical_alignment="center")
        done.success(
            f"Finished: {size_text(view.result.disk_bytes)} on disk at {view.result.bpw:.2f} {BINARIZED_BITS}, in "
            f"{path_text(run.folder / 'checkpoint')}"
        )
        teacher = teacher_of(run)
        links.page_link(
            "pages/compare.py",
            label="Talk to it beside its teacher",
            icon=":material/forum:",
            query_params={"right": run.id} | ({"left": teacher} if teacher is not None else {}),
            width="stretch",
        )
        links.page_link(
            "pages/evaluate.py",
            label="Measure it beside its teacher",
            icon=":material/monitoring:",
            query_params={"models": ",".join([teacher, run.id] if teacher is not None else [run.id])},
            width="stretch",
        )
        links.page_link(
            "pages/quantize.py",
            label="Train it further",
            icon=":material/model_training:",
            query_params={"from": run.id},
            width="stretch",
        )
    diverged = view.diverged
    if diverged:
        names = ", ".join(
            f"{'the whole model' if block.stage == 'e2e' else f'block {block.block + 1}'} ({STAGE_LABELS[block.stage]})"
            for block in diverged[:8]
        )
        more = f" and {len(diverged) - 8} more" if len(diverged) > 8 else ""
        st.warning(
            f"Training made these blocks worse, or their loss became NaN, so each keeps the state it had before: "
            f"{names}{more}. A lower learning rate often helps."
        )


def figures(view: RunView) -> None:
    """The numbers that become known during the run: perplexities under one heading, then all others."""
    known = view.perplexities
    stages = view.started.stages if view.started is not None else ()
    before = ("start",) if stages in CONTINUATIONS else PAPER_STAGES
    measured = ("teacher", *dict.fromkeys((*before, *stages)))
    text = f" on {plain(view.evaluations[-1].text)}" if view.evaluations else ""
    st.markdown("**Perplexity**, lower is better: the teacher's is the target")
    row = st.container(horizontal=True, gap="medium")
    for what in measured:
        label = {"teacher": "Teacher", "start": "At the start"}.get(what) or f"After stage {stage_number(what)}"
        row.metric(label, number_text(known[what].perplexity) if what in known else "–", width="content")
    if text:
        st.caption(f"Measured{text}.")
    st.markdown("**Speed and size**")
    row = st.container(horizontal=True, gap="medium")
    rate = view.tokens_per_second
    row.metric("Tokens per second", f"{rate:,.0f}" if rate is not None else "–", width="content")
    row.metric("Peak memory", size_text(view.memory_bytes) if view.memory_bytes else "–", width="content")
    row.metric(
        "Bits per binarized weight", f"{view.started.bpw:.2f}" if view.started is not None else "–", width="content"
    )


def show_chart(
    run_id: str, name: str, version: object, label: str, stamp: int, make: Callable[[], Figure]
) -> Chosen | None:
    """Draw a chart; returns the block that was clicked on it, if any."""
    encoded = remembered(run_id, name, version, lambda: encode(make(), label=label, stamp=stamp))
    clicked = live_chart(encoded, key=f"{name} {run_id}")
    if clicked is None:
        return None
    if name == "timeline":
        stage = next(stage for stage, label in STAGE_LABELS.items() if label == clicked["y"].strip())
        return stage, 0 if stage == "e2e" else int(clicked["x"]) - 1
    heat = [stage for stage in STAGES if clicked["trace"] == f"heat {stage}"]
    return (heat[0], int(clicked["y"]) - 1) if heat else None


def choose(run: Run, clicked: Chosen | None) -> None:
    """Show the clicked block's curve from now on."""
    if clicked is not None and clicked != st.session_state.get(f"block {run.id}"):
        st.session_state[f"block {run.id}"] = clicked
        st.rerun()


def block_heading(run: Run, chosen: Chosen) -> None:
    """The name of the block whose curve follows, and the button to return to the current block."""
    head, follow = st.columns([3, 2], vertical_alignment="center")
    what = "output error of its layers" if chosen[0] == "ptq" else "loss"
    head.markdown(f"**{place_name(chosen)}: {what}**")
    fixed = f"block {run.id}"
    if fixed in st.session_state and run.state == "running" and follow.button("Follow the run", width="stretch"):
        del st.session_state[fixed]
        st.rerun()


def block_picker(run: Run, view: RunView, chosen: Chosen) -> None:
    """The way of the keyboard to a block's curve; a click on a chart is the other one."""
    assert view.started is not None
    stages, blocks = view.started.stages, view.started.blocks
    places = [(stage, number) for stage in stages for number in range(stage_parts(stage, blocks))]
    picker = f"picker {run.id}"
    st.session_state[picker] = chosen

    def pick() -> None:
        st.session_state[f"block {run.id}"] = st.session_state[picker]

    st.selectbox("Choose a block", places, format_func=place_name, key=picker, on_change=pick)


def curve_controls() -> None:
    """How the losses are drawn. The address keeps it, so that a reload does."""
    lines, scale = st.columns([2, 1], vertical_alignment="center")
    lines.segmented_control(
        "Loss of single steps",
        LINES,
        default="Both",
        key="line",
        required=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    scale.toggle("Log axis", key="log", bind="query-params")


def looks() -> tuple[str, bool]:
    """How single steps are drawn, and whether the axis of losses is logarithmic."""
    return st.session_state.get("line") or "Both", bool(st.session_state.get("log"))


def curve(run: Run, view: RunView, chosen: Chosen) -> None:
    """The chosen block's curve as far as it is known."""
    smooth, log = looks()
    block = view.blocks.get(chosen)
    seq = block.seq if block is not None else 0
    show_chart(
        run.id,
        "curve",
        (chosen, seq, smooth, log),
        place_name(chosen),
        seq,
        lambda: charts.curve(view, chosen, smooth=smooth, log=log),
    )
    text = ""
    if block is not None and block.losses:
        text = f"Step {len(block.losses)} of {view.steps.get(block.stage, 0)}, loss {number_text(block.losses[-1])}"
        text += f", {block.rates[-1]:,.0f} tokens per second"
        if block.probes:
            text += f"; on held-out tokens {number_text(list(block.probes.values())[-1])}"
    elif block is not None and block.layers:
        text = f"{len(block.layers)} layers, each computed once; lower is better"
    st.caption(text or "Not started yet")


def show_run(runs: RunStore, run_id: str) -> None:
    """One run in full, as it is now. A part that can't be shown is a message and hides no other part."""
    run = runs.get(run_id)
    view = watched(runs.root, run_id)
    with view.caught_up(runs):
        # Read the state after the events: a run that ended in between is shown as ended.
        run = runs.get(run_id)
        line = header(runs, run, view)
        with st.container(), guard():
            if not run.is_missing:
                show_settings(run)
            show_note(note_of(runs, run.id))
            outcome(run, view)
        with guard():
            show_export(runs, run)
        show_report(runs, [run.id])
        drawn = (run.state, run.is_missing, view.news)
        live = POLL_SECONDS if run.state in ACTIVE else None
        if view.started is None:
            st.fragment(follow, run_every=live)(runs, run_id, None, drawn, line)
            if run.state in ACTIVE:
                st.caption("The charts begin when the model is loaded.")
            return
        chosen: Chosen = st.session_state.get(f"block {run.id}") or view.latest or (view.started.stages[0], 0)
        with guard():
            time_line(run, view, chosen)
        left, right = st.columns(2, gap="medium")
        if any(stage in ("wat", "aar") for stage in view.started.stages):
            with left, guard():
                steps_map(run, view)
        with left, guard():
            block_picker(run, view, chosen)
        with right:
            block_heading(run, chosen)
            st.fragment(follow, run_every=live)(runs, run_id, chosen, drawn, line)
            curve_controls()
            with guard():
                show_experts(view, chosen)
        if one_loss(view):
            with left, guard():
                figures(view)
            return
        left, right = st.columns(2, gap="medium")
        with left, guard():
            all_blocks(run, view)
        with right, guard():
            figures(view)


def time_line(run: Run, view: RunView, chosen: Chosen) -> None:
    """Where each block is in each stage, and what the colours mean."""
    assert view.started is not None
    choose(
        run,
        show_chart(
            run.id,
            "timeline",
            (len(view.finished), view.working, chosen),
            "Blocks in each stage",
            view.seq,
            lambda: charts.timeline(view, chosen),
        ),
    )
    show_legend(view.started.stages)


def steps_map(run: Run, view: RunView) -> None:
    """How the loss of each block falls, and how to see one of them."""
    st.markdown("**Every block, every step: how far the loss is from the block's first step**")
    choose(
        run,
        show_chart(
            run.id,
            "heat",
            (len(view.finished), len(view.steps), view.heated),
            "Loss by block and step",
            view.seq,
            lambda: charts.heat_map(view),
        ),
    )
    st.caption("Click a block, here or in the stages above, or choose it below: its curve is drawn.")


def all_blocks(run: Run, view: RunView) -> None:
    """The loss of all blocks after each stage."""
    st.markdown("**All finished blocks: loss after each stage**, dotted before it")
    _, log = looks()
    show_chart(
        run.id,
        "blocks",
        (len(view.finished), log),
        "Loss of all blocks",
        view.seq,
        lambda: charts.before_after(view, log=log),
    )


def follow(runs: RunStore, run_id: str, chosen: Chosen | None, drawn: tuple[object, ...], line: DeltaGenerator) -> None:
    """Draw what changes every second. If ``drawn`` is no longer the run's state, redraw the whole page."""
    with guard():
        view = watched(runs.root, run_id)
        with view.caught_up(runs):
            run = runs.get(run_id)
            if (run.state, run.is_missing, view.news) != drawn:
                st.rerun()
            expected = stage_seconds(runs.root, run_id) if run.state == view.phase == "running" else {}
            line.markdown(f"{badge(run)} {state_text(runs, run, view, time.time(), expected)}")
            if chosen is not None:
                curve(run, view, chosen)
