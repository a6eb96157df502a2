"""The Quantize page's settings as a document, and the RunConfig made from them.

The settings live in the session as a document, ``DOCUMENT``, the JSON form of a RunConfig. A preset or an uploaded file
replaces it and every widget with it; each run of the page writes the widgets' values back.

What the page shows is also kept under a random name, which stands in the page's address: a reload begins a new session
and finds it there. Each session has a name of its own, so a copied address opens a copy of the settings.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Iterable
from typing import Any

import pandas
import streamlit as st

from app.paths import corpus_name, named_by_run, start_name, teacher_name
from app.quantize.settings import (
    ACT_BITS,
    ACTIVATIONS,
    FORMAT,
    KV_BITS,
    KV_FIRST,
    KV_GROUP,
    STAGE_SETTING,
    WIDGETS,
    Setting,
)
from app.view import store
from lbllm.config import (
    DEFAULT_PRESET,
    TO_ACTIVATIONS,
    RunConfig,
    label,
    leaves,
    make_config,
    parse_config,
    read_settings,
    setting_name,
)
from lbllm.errors import ConfigError, LbllmError
from lbllm.pipeline.start import settings_to_go_on
from lbllm.presets import PRESETS
from lbllm.runs.store import Run
from lbllm.sections import PAPER_STAGES, STAGES, WHOLE_ROW, LayerOverride

DOCUMENT, TABLE, UPLOAD_ERROR = "quantize document", "quantize table", "quantize upload error"
EDITED, NAME_KEY, METHODS_KEY = "quantize edited table", "quantize name", "quantize preview methods"
PROCESSES_KEY = "quantize processes"
PLAN_KEY = "quantize plan target"
BLOCK_KEY = "quantize block of "  # and the number of blocks
SWEEP_KEY = "quantize sweep "  # and what of the sweep a widget sets
KEPT, OWN_ADDRESS, ADDRESS = "quantize kept", "quantize address", "form"
KEPT_FORMS = 500
PRESET = "quantize preset"
COLUMNS = ("pattern", *LayerOverride.model_fields)
CORPUS_KEY, SKIP_KEY, EDITOR_KEY, MODEL_KEY = (f"quantize {name}" for name in ("corpus", "skip", "editor", "model"))


def start() -> str | None:
    """Before any widget is drawn: fill them, at the first visit and when the page is opened again. ``?from=`` a
    finished run makes a document that trains its checkpoint further, ``?again=`` a run gives its settings; returns why
    it can't, if so."""
    problem = None
    run, again = st.query_params.get("from"), st.query_params.get("again")
    if again is not None:
        del st.query_params["again"]
        try:
            load(settings_again(store().get(again)))
            return None
        except LbllmError as error:
            problem = str(error)
    elif run is not None:
        del st.query_params["from"]
        try:
            load(_further(run))
            return None
        except LbllmError as error:
            problem = str(error)
    if FORMAT.key not in st.session_state:
        kept = st.session_state.get(KEPT) or _kept_forms().get(st.query_params.get(ADDRESS, ""))
        if kept is None:
            load(make_config())
        else:
            st.session_state.update(copy.deepcopy(kept))
            st.session_state.pop(EDITOR_KEY, None)
    return problem


def _further(run: str) -> RunConfig:
    first = store().get(run)
    document = first.config.model_dump(mode="json") | settings_to_go_on(str(first.folder / "checkpoint"))
    # Another seed: another order of the text, and other parts of it.
    return parse_config(document | {"seed": first.config.seed + 1})


@st.cache_resource
def _kept_forms() -> dict[str, dict[str, Any]]:
    """The forms of this server's sessions by their names in addresses, the one that changed last at the end."""
    return {}


def keep() -> None:
    """Keep what the page shows, for a reload and for when it is opened again."""
    if DOCUMENT not in st.session_state:
        return
    own = (DOCUMENT, PRESET, MODEL_KEY, CORPUS_KEY, SKIP_KEY, NAME_KEY, METHODS_KEY, PROCESSES_KEY, PLAN_KEY)
    keys = (*own, *(setting.key for setting in WIDGETS))
    blocks = [key for key in st.session_state if str(key).startswith((BLOCK_KEY, SWEEP_KEY))]
    values = {key: st.session_state[key] for key in (*keys, *blocks) if key in st.session_state}
    st.session_state[KEPT] = values | {TABLE: st.session_state.get(EDITED, st.session_state[TABLE])}
    name = st.session_state.setdefault(OWN_ADDRESS, secrets.token_urlsafe(12))
    forms = _kept_forms()
    forms.pop(name, None)
    forms[name] = copy.deepcopy(st.session_state[KEPT])
    for oldest in list(forms)[:-KEPT_FORMS]:
        forms.pop(oldest, None)
    if st.query_params.get(ADDRESS) != name:
        st.query_params[ADDRESS] = name


def settings_again(run: Run) -> RunConfig:
    """The settings of a run, for another one that is started here."""
    config = run.config
    named = {name: getattr(config, name) for name in ("model", "corpus", "start")}
    return config.model_copy(update={key: named_by_run(run, name) for key, name in named.items() if name is not None})


def load(config: RunConfig) -> None:
    """Set the document and every widget."""
    document = config.model_dump(mode="json")
    st.session_state[DOCUMENT] = document
    st.session_state[PRESET] = config.preset if config.preset in PRESETS else None
    st.session_state[MODEL_KEY] = config.model
    st.session_state[CORPUS_KEY] = config.corpus
    st.session_state[SKIP_KEY] = list(config.quant.skip)
    for setting in WIDGETS:
        st.session_state[setting.key] = value_of(document, setting)
    rows = [{"pattern": name} | override for name, override in document["quant"]["overrides"].items()]
    st.session_state[TABLE] = pandas.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    # The editor keeps the user's changes under its key; a new table must begin without changes.
    st.session_state.pop(EDITOR_KEY, None)
    st.session_state.pop(EDITED, None)


def value_of(document: dict[str, Any], setting: Setting) -> Any:
    """A setting's value in a document as its widget has it."""
    value = _get(document, setting.path)
    return tuple(value) if isinstance(value, list) else value


def continues() -> bool:
    """Whether the document is of a run that trains a checkpoint further."""
    return st.session_state[DOCUMENT].get("start") is not None


def fixed_by_checkpoint(setting: Setting) -> bool:
    """Whether the checkpoint that the run starts from decides a setting."""
    if not continues():
        return False
    if setting is STAGE_SETTING:
        return not free_to_lower()
    # The stages of the widget: the document still has those of the page's last run.
    chosen = {"stages": st.session_state[STAGE_SETTING.key]}
    return setting.path in parse_config(st.session_state[DOCUMENT]).model_copy(update=chosen).fixed_by_start()


def fixed(setting: Setting) -> str | None:
    """Why a setting can't be changed, or would change nothing; None if it can."""
    return "The starting checkpoint decides this." if fixed_by_checkpoint(setting) else not_read(setting)


def free_to_lower() -> bool:
    """Whether the document's checkpoint has 16-bit activations and KV cache, so that stage 3 can lower their bits."""
    return continues() and parse_config(st.session_state[DOCUMENT]).precision("start").weights_alone


def take_stages() -> None:
    """Stages of a run from a checkpoint were chosen: lower the bits for stage 3, or take the checkpoint's own."""
    bits = 4 if st.session_state[STAGE_SETTING.key] == TO_ACTIVATIONS else 16
    for setting in (ACT_BITS, KV_BITS):
        st.session_state[setting.key] = bits


def start_over() -> None:
    """Return from a checkpoint to a run from the teacher."""
    load(make_config())


def read(overrides: pandas.DataFrame) -> tuple[RunConfig, list[str]]:
    """The settings in the widgets, and the reasons why a run can't be started with them: a text that can't be read, a
    number without a value. In their place are the last ones that could be used, so that the other figures are shown.
    Raises ConfigError if the settings are wrong in another way."""
    document = json.loads(json.dumps(st.session_state[DOCUMENT]))
    problems = []
    for setting in WIDGETS:
        value = st.session_state[setting.key]
        if value is None:
            problems.append(f"{setting_name(setting.path)} has no value")
            continue
        _put(document, setting.path, list(value) if isinstance(value, tuple) else value)
    document["model"] = teacher_name(st.session_state[MODEL_KEY] or "")
    try:
        document["corpus"] = corpus_name(st.session_state[CORPUS_KEY] or "")
    except LbllmError as error:
        problems.append(str(error))
    document["quant"]["skip"] = list(st.session_state[SKIP_KEY])
    document["quant"]["overrides"] = _overrides(overrides)
    config = parse_config(document)
    st.session_state[DOCUMENT] = config.model_dump(mode="json")
    return config, problems


def changed_settings(config: RunConfig) -> list[str]:
    """The labels of the settings that differ from the chosen preset's; empty without a preset or from a checkpoint."""
    if config.preset not in PRESETS or config.start is not None:
        return []
    usual, own = leaves(make_config(config.preset, {"model": config.model})), leaves(config)
    return [str(label(path)) for path, value in own.items() if value != usual[path]]


def not_read(setting: Setting) -> str | None:
    """Why the run doesn't read a setting; None if it does."""
    stages: Iterable[str] = st.session_state[STAGE_SETTING.key]
    section = setting.path.partition(".")[0]
    if section in STAGES and section not in stages:
        return f"Stage {STAGES.index(section) + 1} is not among the chosen stages."
    quantized = "aar" in stages or (continues() and not free_to_lower())
    if setting.path == "stream_dtype" and not set(PAPER_STAGES) & {*stages}:
        return "Stage 4 takes the whole model at once."
    if setting in (*ACTIVATIONS, KV_FIRST) and not quantized:
        return "Stage 3, which quantizes activations and KV cache, is not among the chosen stages."
    if setting in (KV_GROUP, KV_FIRST) and st.session_state[KV_BITS.key] == 16:
        return "A KV cache in 16 bits has no ranges."
    if setting == KV_FIRST and st.session_state[KV_GROUP.key] == WHOLE_ROW:
        return "A KV cache with a range for each token keeps none of them in 16 bits."
    if setting.path == "e2e.lr_act" and not quantized:
        return "Without stage 3 there are no clips."
    if setting.path == "wat.lr_bitmap" and st.session_state["quantize wat.bitmap"] == "coupled":
        return "A coupled bitmap has no learning rate."
    return None


def _overrides(table: pandas.DataFrame) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(table.to_dict("records"), 1):
        values = {name: row[name] for name in COLUMNS if not pandas.isna(row[name]) and row[name] != ""}
        pattern = str(values.pop("pattern", "")).strip()
        if not pattern and not values:
            continue
        if not pattern:
            raise ConfigError(f"line {number} of the table per layer has no pattern; give one, for example *.down_proj")
        if pattern in found:
            raise ConfigError(f"the table per layer has the pattern {pattern!r} twice")
        found[pattern] = {name: value if name == "format" else int(value) for name, value in values.items()}
    return found


def take_preset() -> None:
    """The preset's button was pressed: everything but the model becomes the preset's."""
    name = st.session_state[PRESET]
    if name is None:
        return
    load(make_config(name, {"model": st.session_state[MODEL_KEY]}))


def take_upload(key: str) -> None:
    """A settings file was given: it becomes the document; an error becomes a message on the page."""
    st.session_state.pop(UPLOAD_ERROR, None)
    upload = st.session_state[key]
    if upload is None:
        return
    try:
        named, document = read_settings(upload.getvalue(), upload.name)
    except LbllmError as error:
        st.session_state[UPLOAD_ERROR] = str(error)
        return
    try:
        config = make_config(named or DEFAULT_PRESET, document)
        if config.start is not None:
            config = config.model_copy(update={"start": start_name(config.start)})
        load(config if named else config.model_copy(update={"preset": "custom"}))
    except LbllmError as error:
        st.session_state[UPLOAD_ERROR] = f"{upload.name}: {error}"


def _get(document: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        document = document[part]
    return document


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for part in sections:
        document = document[part]
    document[name] = value
