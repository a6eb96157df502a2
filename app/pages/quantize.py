"""Quantize: choose a model and a format, see the estimated size and cost at once, try one block, start the run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas
import streamlit as st
import torch
from streamlit.delta_generator import DeltaGenerator
from transformers import PreTrainedModel

from app.components.shown import with_default, with_index, with_value
from app.paths import teacher_name
from app.quantize import form
from app.quantize import settings as shown
from app.quantize.controls import control, corpus_picker, layers_table
from app.quantize.facts import (
    await_facts,
    bar,
    estimated,
    layer_names,
    model_facts,
    show_experts,
    show_figures,
    show_model,
    show_unknown,
)
from app.quantize.planner import show_planner
from app.quantize.preview import show_preview
from app.quantize.sweep import show_sweep
from app.view import guard, plain, sentence, store
from lbllm.checkpoints.record import checkpoint_name
from lbllm.config import SETTINGS, RunConfig, arguments
from lbllm.errors import LbllmError
from lbllm.measure.estimate import Estimate, check_disk, check_memory
from lbllm.models.catalogue import MODELS
from lbllm.places import root
from lbllm.presets import ABOUT, PRESETS
from lbllm.runs.store import ACTIVE
from lbllm.texts.catalogue import check_available

STYLE = Path(__file__).parents[1] / "quantize" / "style.css"


def page() -> None:
    """The whole page. The settings are drawn first: what is known of the model may take a while."""
    st.html(STYLE)
    problem = form.start()
    form.keep()  # at once: another page may be opened before the rest is drawn
    if problem is not None:
        st.error(sentence(problem))
    left, right = st.columns([11, 14], gap="large")
    with left:
        if form.continues():
            _checkpoint()
        name = _picker()
        preset = _controls()
    right = right.container(key="quantize_outlook")
    with right:
        model = _described(name)
    with left:
        with st.expander("Per layer"):
            table = layers_table(layer_names(model) if model else [])
        form.keep()
    with right:
        config, problems = _outlook(table, model)
    if config is not None:
        with preset:
            _changes(config)
    with left:
        if config is not None and model is not None and not problems:
            if config.start is None:
                show_planner(config, model)
            show_sweep(config, model)
        _exchange(config if not problems else None)


def _checkpoint() -> None:
    """What is trained further, and the button to go back."""
    said, button = st.columns([3, 1], vertical_alignment="center")
    name = plain(checkpoint_name(st.session_state[form.DOCUMENT]["start"]))
    ways = "only stage 4, in that checkpoint's format"
    if form.free_to_lower():
        ways += ", or stages 3–4, with fewer bits for its activations"
    said.info(f"Trains {name} further: {ways}. Its groups can be cut into smaller ones.")
    button.button("Start over", on_click=form.start_over, width="stretch", key="quantize anew")


def _picker() -> str:
    """The model's name as it was chosen or typed."""
    known = [entry.id for entry in MODELS]
    chosen = st.session_state[form.MODEL_KEY]
    names = known if chosen is None or chosen in known else [chosen, *known]
    picked = st.selectbox(
        str(SETTINGS["model"].title),
        names,
        **with_index(form.MODEL_KEY, names),
        accept_new_options=True,
        disabled=form.continues(),
        help=f"{SETTINGS['model'].description} Folders and files must be under {root()}.",
    )
    return picked or ""


def _described(text: str) -> PreTrainedModel | None:
    """What is known of the model; returns its skeleton."""
    try:
        name = teacher_name(text)
    except LbllmError as error:
        st.error(sentence(error))
        return None
    found = model_facts(name)
    if found is None:
        await_facts(name)
        return None
    if isinstance(found, str):
        show_unknown(name, found)
        return None
    show_model(found[0])
    return found[1]


def _controls() -> DeltaGenerator:
    """All settings but those per layer; returns the place below the presets."""
    st.segmented_control(
        str(SETTINGS["preset"].title),
        list(PRESETS),
        format_func=str.capitalize,
        **with_default(form.PRESET),
        on_change=form.take_preset,
        disabled=form.continues(),
        help="\n".join(f"- **{name.capitalize()}**: {words}" for name, words in ABOUT.items()),
    )
    below = st.container()
    if (preset := st.session_state[form.PRESET]) is not None and not form.continues():
        below.caption(ABOUT[preset])
    control(shown.FORMAT)
    for pair in ((shown.GROUP_SIZE, shown.PARAM_BITS), (shown.EMBEDDING_BITS, shown.STAGE_SETTING)):
        for column, setting in zip(st.columns([8, 5]), pair, strict=True):
            with column:
                control(setting)
    for pair in (shown.ACTIVATIONS[:2], shown.ACTIVATIONS[2:]):
        for column, setting in zip(st.columns([4, 5], vertical_alignment="bottom"), pair, strict=True):
            with column:
                control(setting)
    text, tokens = st.columns([8, 5])
    with text:
        corpus_picker()
    with tokens:
        control(shown.TOKENS)
    with st.expander("Advanced", expanded=form.continues()):
        # The settings that can be changed come first.
        for title, settings in sorted(shown.ADVANCED.items(), key=lambda item: all(map(form.fixed, item[1]))):
            st.markdown(f"**{title}**")
            reasons = {form.fixed(setting) for setting in settings}
            if len(reasons) == 1 and (reason := reasons.pop()) is not None:
                st.caption(f"Not used: {reason}")
            for first in range(0, len(settings), 2):
                for column, setting in zip(st.columns(2), settings[first : first + 2], strict=False):
                    with column:
                        control(setting)
    return below


def _changes(config: RunConfig) -> None:
    """What was changed since the preset was chosen, and the way back."""
    labels = form.changed_settings(config)
    if not labels:
        return
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"Changed from {config.preset.capitalize()}: {plain(', '.join(labels[:3]))}{more}")
        st.button(
            f"Back to {config.preset.capitalize()}", type="tertiary", on_click=form.take_preset, key="quantize back"
        )


def _outlook(table: pandas.DataFrame, model: PreTrainedModel | None) -> tuple[RunConfig | None, list[str]]:
    """Figures, Start with reasons against it, and the preview; returns the settings if they can be read, and what
    keeps a run from having them."""
    if model is None:
        with _bar():
            st.caption("The estimated size and cost are shown as soon as the model can be read.")
            _start(None, [])
        return None, []
    config = None
    try:
        config, problems = form.read(table)
        result = estimated(config, model)
    except LbllmError as error:
        st.error(sentence(error))
        with _bar():
            _start(None, [])
        return config, [str(error)]
    objections = problems + _objections(config, result)
    with _bar():
        show_figures(config, result)
        _start(config, objections)
    for objection in objections:
        st.warning(sentence(objection))
    st.html(bar(result))
    show_experts(result)
    st.divider()
    if config.start is not None:
        st.caption("A preview binarizes a block of the teacher; this run starts from a checkpoint.")
    elif problems:
        st.caption("A block can be tried when the settings above can be used.")
    else:
        show_preview(config, result.blocks)
    return config, problems


def _bar() -> DeltaGenerator:
    """The part that stays in sight, on a phone at the bottom of the screen."""
    return st.container(key="quantize_bar")


def _objections(config: RunConfig, result: Estimate) -> list[str]:
    """The reasons not to start."""
    said = []
    checks = (
        lambda: check_memory(result, config.device),
        lambda: check_disk(result, store().root),
        lambda: check_available(config.corpus),
    )
    for check in checks:
        try:
            check()
        except LbllmError as error:
            said.append(str(error))
    return said


def _start(config: RunConfig | None, objections: list[str]) -> None:
    gpus = torch.cuda.device_count()
    name, *between, button = st.columns([3, 1, 1] if gpus > 1 else [3, 1], vertical_alignment="bottom")
    wanted = name.text_input("Name of the run", placeholder="Name of the run, optional", **with_value(form.NAME_KEY))
    processes = 1
    if between and config is not None and config.device in ("auto", "cuda"):
        how = "Share the run among this many processes, each on a GPU of its own."
        processes = between[0].number_input("GPUs", 1, gpus, **with_value(form.PROCESSES_KEY), help=how)
    impossible = config is None or bool(objections)
    pressed = button.button("Start", type="primary", disabled=impossible, width="stretch", key="quantize start")
    ahead = sum(run.state in ACTIVE for run in store().all())
    if ahead and not impossible:
        st.caption(f"{ahead} {'run is' if ahead == 1 else 'runs are'} ahead of it; this one waits for its turn.")
    if pressed and config is not None:
        run = store().create(config, wanted.strip() or None)
        store().start(run.id, processes)
        st.switch_page("pages/runs.py", query_params={"run": run.id})


def _exchange(config: RunConfig | None) -> None:
    """The settings as a command and as a file; and the upload of a settings file."""
    with st.expander("As a command, as a file"):
        if config is not None:
            _give(config)
        st.file_uploader(
            "Take settings from a file",
            type="json",
            key="quantize upload",
            on_change=form.take_upload,
            args=("quantize upload",),
            help="A file from here, or a run's config.json.",
        )
        if form.UPLOAD_ERROR in st.session_state:
            st.error(sentence(st.session_state[form.UPLOAD_ERROR]))


def _give(config: RunConfig) -> None:
    words = ["python", "-m", "lbllm", "quantize", *arguments(config), "--out", "runs/mine"]
    st.code(shlex.join(words), language="bash", wrap_lines=True)
    text = config.model_dump_json(indent=2) + "\n"
    with st.container(horizontal=True):
        st.download_button("Download as file", text, "lbllm-settings.json", "application/json", on_click="ignore")
        with st.popover("Show the file"):
            st.code(text, language="json", height=320)


with guard():
    page()
