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
from app.runs.charts import STAGE_LABELS, Chosen, Figure, place_name
from app.runs.export import show_export
from app.runs.state import BADGES, stage_seconds, state_text
from app.view import guard, number_text, path_text, plain, sentence, size_text
from lbllm.config import CONTINUATIONS, FROM_CHECKPOINT
from lbllm.labels import BINARIZED_BITS
from lbllm.runs.store import ACTIVE, RESUMABLE, Run, RunStore
from lbllm.runs.view import RunView
from lbllm.sections import PAPER_STAGES, STAGES, stage_number

POLL_SECONDS = 1.0


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


def header(runs: RunStore, run: Run, view: RunView) -> DeltaGenerator:
    """The run's name and its buttons; returns the place of the state line, which changes every second."""
    back, title, buttons = st.columns([0.35, 5, 4], vertical_alignment="center")
    if back.button("", icon=":material/arrow_back:", type="tertiary", help="All runs", key="all runs"):
        st.query_params.clear()
        st.rerun()
    title.markdown(f"#### {plain(run.name)}")
    line = title.empty()
    stop, cancel, resume = buttons.columns(3)
    ending = view.asked is not None and run.state == "running"
    over = run.state in ("done", "cancelled")
    confirm = f"cancel {run.id}"
    if stop.button("Save and stop", disabled=run.state not in ACTIVE or ending, width="stretch"):
        runs.request(run.id, "stop")
        st.rerun()
    if cancel.button("Cancel", disabled=over or (ending and view.asked == "cancel"), width="stretch"):
        st.session_state[confirm] = True
    if resume.button("Resume", disabled=run.state not in RESUMABLE, type="primary", width="stretch"):
        runs.resume(run.id)
        st.rerun()
    # This container is always there, so its content doesn't move what follows.
    with st.container():
        if st.session_state.get(confirm) and not over:
            ask_cancel(runs, run, view, confirm)
    return line


def ask_cancel(runs: RunStore, run: Run, view: RunView, confirm: str) -> None:
    """Ask for a second click: a cancelled run can't be resumed."""
    with st.container(border=True):
        count = len(view.finished)
        kept = f"its {count} finished blocks" if count != 1 else "its finished block"
        st.markdown(f"Cancel this run and delete {kept}? You can't resume it then. *Save and stop* keeps them.")
        yes, no = st.columns([1, 3])
        if yes.button("Cancel and delete", type="primary", width="stretch"):
            st.session_state[confirm] = False
            runs.request(run.id, "cancel")
            st.rerun()
        if no.button("Keep the run"):
            st.session_state[confirm] = False
            st.rerun()


def one_loss(view: RunView) -> bool:
    """Whether the run has only stage 4: it trains all blocks at once, so single blocks have no losses."""
    return view.started is not None and view.started.stages == FROM_CHECKPOINT


def outcome(run: Run, view: RunView) -> None:
    """How the run ended and what can be done about it."""
    if run.state == "failed":
        st.error(sentence(view.failure or "The run failed.") + "  \n*Resume* continues from the finished blocks.")
    elif run.state == "interrupted":
        st.error(
            "The worker process ended without a message: it was killed, or the machine was shut down. *Resume* "
            f"continues from the finished blocks. The worker's log is {path_text(run.folder / 'worker.log')}."
        )
    elif run.state == "done" and view.result is not None:
        done, links = st.columns([5, 2], vertical_alignment="center")
        done.success(
            f"Finished: {size_text(view.result.disk_bytes)} on disk at {view.result.bpw:.2f} {BINARIZED_BITS}, in "
            f"{path_text(run.folder / 'checkpoint')}"
        )
        links.page_link(
            "pages/compare.py",
            label="Talk to it beside its teacher",
            icon=":material/forum:",
            query_params={"right": run.id},
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
    """The numbers that become known during the run."""
    known = view.perplexities
    stages = view.started.stages if view.started is not None else ()
    before = ("start",) if stages in CONTINUATIONS else PAPER_STAGES
    measured = ("teacher", *dict.fromkeys((*before, *stages)))
    columns = st.columns([1] * len(measured) + [1.2, 1.2, 1])
    for column, what in zip(columns, measured, strict=False):
        label = {"teacher": "Teacher", "start": "At the start"}.get(what) or f"After stage {stage_number(what)}"
        column.metric(label, number_text(known[what].perplexity) if what in known else "–")
    rate = view.tokens_per_second
    columns[-3].metric("Tokens per second", f"{rate:,.0f}" if rate is not None else "–")
    columns[-2].metric("Peak memory", size_text(view.memory_bytes) if view.memory_bytes else "–")
    columns[-1].metric("Bits per binarized weight", f"{view.started.bpw:.2f}" if view.started is not None else "–")
    text = f" on {plain(view.evaluations[-1].text)}" if view.evaluations else ""
    st.caption(
        f"The first {len(measured)} figures are perplexities{text}. Lower is better; the teacher's is the target."
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


def curve(run: Run, view: RunView, chosen: Chosen) -> None:
    """The chosen block's curve as far as it is known."""
    smooth = st.session_state.get("loss_line") or "Both"
    log = bool(st.session_state.get("loss_log"))
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
    elif block is not None and block.layers:
        text = f"{len(block.layers)} layers, each computed once; lower is better"
    st.caption(text or "Not started yet")


def show_run(runs: RunStore, run_id: str) -> None:
    """One run in full, as it is now."""
    run = runs.get(run_id)
    view = watched(runs.root, run_id)
    with view.caught_up(runs):
        # Read the state after the events: a run that ended in between is shown as ended.
        run = runs.get(run_id)
        line = header(runs, run, view)
        with st.container():
            outcome(run, view)
        show_export(runs, run)
        drawn = (run.state, view.news)
        live = POLL_SECONDS if run.state in ACTIVE else None
        if view.started is None:
            st.fragment(follow, run_every=live)(runs, run_id, None, drawn, line)
            st.caption("The charts begin when the model is loaded.")
            return
        chosen: Chosen = st.session_state.get(f"block {run.id}") or view.latest or (view.started.stages[0], 0)
        count = len(view.finished)
        choose(
            run,
            show_chart(
                run.id,
                "timeline",
                (count, view.working, chosen),
                "Blocks in each stage",
                view.seq,
                lambda: charts.timeline(view, chosen),
            ),
        )
        if one_loss(view):
            above, lines, scale = st.columns([5, 2, 1], vertical_alignment="center")
            below = st.container()
        else:
            above, right = st.columns(2, gap="medium")
            below = above
        with above:
            block_heading(run, chosen)
        with below:
            st.fragment(follow, run_every=live)(runs, run_id, chosen, drawn, line)
        if not one_loss(view):
            with right:
                st.markdown("**All finished blocks: loss after each stage**, dotted before it")
                log = bool(st.session_state.get("loss_log"))
                show_chart(
                    run.id,
                    "blocks",
                    (count, log),
                    "Loss of all blocks",
                    view.seq,
                    lambda: charts.before_after(view, log=log),
                )
                lines, scale = st.columns([2, 1], vertical_alignment="center")
        lines.segmented_control(
            "Line", ["Raw", "Smoothed", "Both"], default="Both", key="loss_line", label_visibility="collapsed"
        )
        scale.toggle("Log axis", key="loss_log")
        figures(view)
        if one_loss(view):
            return
        st.markdown("**Every block, every step: how far the loss is from the block's first step**")
        choose(
            run,
            show_chart(
                run.id,
                "heat",
                (count, len(view.steps), view.heated),
                "Loss by block and step",
                view.seq,
                lambda: charts.heat_map(view),
            ),
        )


def follow(runs: RunStore, run_id: str, chosen: Chosen | None, drawn: tuple[object, ...], line: DeltaGenerator) -> None:
    """Draw what changes every second. If ``drawn`` is no longer the run's state, redraw the whole page."""
    with guard():
        view = watched(runs.root, run_id)
        with view.caught_up(runs):
            run = runs.get(run_id)
            if (run.state, view.news) != drawn:
                st.rerun()
            expected = stage_seconds(runs.root, run_id) if run.state == view.phase == "running" else {}
            line.markdown(f"{BADGES[run.state]} {state_text(runs, run, view, time.time(), expected)}")
            if chosen is not None:
                curve(run, view, chosen)
