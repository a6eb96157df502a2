"""Quantize: choose a model and a format, see the estimated size and cost at once, try one block, start the run."""

from __future__ import annotations

import shlex

import pandas
import streamlit as st
from transformers import PreTrainedModel

from app.paths import teacher_name
from app.quantize import form
from app.quantize import settings as shown
from app.quantize.controls import control, corpus_picker, layers_table
from app.quantize.facts import bar, estimated, layer_names, model_facts, show_figures, show_model, show_unknown
from app.quantize.preview import show_preview
from app.view import guard, plain, sentence, store
from lbllm.checkpoints.record import checkpoint_name
from lbllm.config import SETTINGS, RunConfig, arguments
from lbllm.errors import LbllmError
from lbllm.measure.estimate import Estimate, check_memory
from lbllm.models.catalogue import MODELS
from lbllm.places import root
from lbllm.presets import PRESETS
from lbllm.runs.store import ACTIVE
from lbllm.texts.catalogue import check_available


def page() -> None:
    """The whole page."""
    form.start()
    left, right = st.columns([11, 14], gap="large")
    with left:
        if form.continues():
            _checkpoint()
        name = _picker()
    with right:
        model = _described(name)
    with left:
        table = _controls(layer_names(model) if model else [])
    with right:
        config = _outlook(table, model)
    with left:
        _exchange(config)


def _checkpoint() -> None:
    """What is trained further, and the button to go back."""
    said, button = st.columns([3, 1], vertical_alignment="center")
    name = plain(checkpoint_name(st.session_state[form.DOCUMENT]["start"]))
    ways = "only stage 4, in that checkpoint's format"
    if form.free_to_lower():
        ways += ", or stages 3–4, with fewer bits for its activations"
    said.info(f"Trains {name} further: {ways}. Its groups can be cut into smaller ones.")
    button.button("Begin anew", on_click=form.begin_anew, width="stretch", key="quantize anew")


def _picker() -> str:
    """The model's name as it was chosen or typed."""
    known = [entry.id for entry in MODELS]
    value = st.session_state[form.MODEL_KEY]
    chosen = st.selectbox(
        str(SETTINGS["model"].title),
        known if value is None or value in known else [value, *known],
        key=form.MODEL_KEY,
        accept_new_options=True,
        disabled=form.continues(),
        help=f"{SETTINGS['model'].description} Folders and files must be under {root()}.",
    )
    return chosen or ""


def _described(text: str) -> PreTrainedModel | None:
    """What is known of the model; returns its skeleton."""
    try:
        name = teacher_name(text)
    except LbllmError as error:
        st.error(sentence(error))
        return None
    found = model_facts(name)
    if isinstance(found, str):
        show_unknown(name, found)
        return None
    show_model(found[0])
    return found[1]


def _controls(names: list[str]) -> pandas.DataFrame:
    """All settings; returns the table per layer."""
    st.segmented_control(
        str(SETTINGS["preset"].title),
        list(PRESETS),
        format_func=str.capitalize,
        key=form.PRESET,
        on_change=form.take_preset,
        disabled=form.continues(),
        help=SETTINGS["preset"].description,
    )
    quantized = "aar" in st.session_state[shown.STAGE_SETTING.key]
    for pair in ((shown.FORMAT, shown.STAGE_SETTING), (shown.GROUP_SIZE, shown.PARAM_BITS)):
        for column, setting in zip(st.columns([8, 5]), pair, strict=True):
            with column:
                control(setting)
    for column, setting in zip(st.columns([4, 5, 4], vertical_alignment="bottom"), shown.ACTIVATIONS, strict=True):
        with column:
            control(setting, disabled=not quantized)
    text, tokens = st.columns([8, 5])
    with text:
        corpus_picker()
    with tokens:
        control(shown.TOKENS)
    with st.expander("Advanced", expanded=form.continues()):
        # The settings that can be changed come first.
        for title, settings in sorted(
            shown.ADVANCED.items(), key=lambda item: all(map(form.fixed_by_checkpoint, item[1]))
        ):
            st.markdown(f"**{title}**")
            for first in range(0, len(settings), 2):
                for column, setting in zip(st.columns(2), settings[first : first + 2], strict=False):
                    with column:
                        control(setting)
    with st.expander("Per layer"):
        return layers_table(names)


def _outlook(table: pandas.DataFrame, model: PreTrainedModel | None) -> RunConfig | None:
    """Figures, Start with reasons against it, and the preview; returns the settings if they are valid."""
    if model is None:
        st.caption("The estimated size and cost are shown as soon as the model can be read.")
        _start(None, [])
        return None
    try:
        config = form.read(table)
        result = estimated(config, model)
    except LbllmError as error:
        st.error(sentence(error))
        _start(None, [])
        return None
    show_figures(config, result)
    st.html(bar(result))
    _start(config, _objections(config, result))
    st.divider()
    if config.start is None:
        show_preview(config, result.blocks)
    else:
        st.caption("A preview binarizes a block of the teacher; this run starts from a checkpoint.")
    return config


def _objections(config: RunConfig, result: Estimate) -> list[str]:
    """The reasons not to start."""
    said = []
    for check in (lambda: check_memory(result, config.device), lambda: check_available(config.corpus)):
        try:
            check()
        except LbllmError as error:
            said.append(str(error))
    return said


def _start(config: RunConfig | None, objections: list[str]) -> None:
    name, button = st.columns([3, 1], vertical_alignment="bottom")
    wanted = name.text_input("Name of the run", placeholder="optional", key="quantize name")
    impossible = config is None or bool(objections)
    pressed = button.button("Start", type="primary", disabled=impossible, width="stretch", key="quantize start")
    for objection in objections:
        st.warning(sentence(objection))
    ahead = sum(run.state in ACTIVE for run in store().all())
    if ahead and not impossible:
        st.caption(f"{ahead} {'run is' if ahead == 1 else 'runs are'} ahead of it; this one waits for its turn.")
    if pressed and config is not None:
        run = store().create(config, wanted.strip() or None)
        store().start(run.id)
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
