"""The controls of the Quantize page: one table of settings, each with its widget, and the RunConfig they add up to.

The settings live in the session as a document, ``DOCUMENT``, the JSON form of a RunConfig. A preset or an uploaded file
replaces it and every widget with it; each run of the page writes the widgets' values back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import pandas
import streamlit as st

from app.paths import corpus_name, teacher_name
from app.view import store
from lbllm.config import FROM_CHECKPOINT, TO_ACTIVATIONS, RunConfig, make_config, parse_config, read_settings
from lbllm.errors import ConfigError, LbllmError
from lbllm.labels import FORMAT_NAMES
from lbllm.pipeline.start import settings_to_go_on
from lbllm.presets import PRESETS
from lbllm.sections import STAGES, WHOLE_ROW, LogitLoss
from lbllm.texts.catalogue import TEXTS

DOCUMENT, TABLE, UPLOAD_ERROR = "quantize document", "quantize table", "quantize upload error"
PRESET = "quantize preset"
CHOICES = {
    STAGES[:1]: "1",
    STAGES[:2]: "1–2",
    STAGES[:3]: "1–3",
    (*STAGES[:2], STAGES[3]): "1–2, 4",
    STAGES: "1–4",
}
FURTHER_CHOICES = {FROM_CHECKPOINT: "4", TO_ACTIVATIONS: "3–4"}  # of a run that goes on from a checkpoint
COLUMNS = ("pattern", "format", "group_size", "param_bits", "act_bits")


def size_label(group_size: int) -> str:
    """A group size as people say it."""
    return "row" if group_size == WHOLE_ROW else str(group_size)


@dataclass(frozen=True)
class Setting:
    """One setting: its path in the document, and what its widget needs. Choices make buttons, or a menu where they
    have no room, others a number."""

    path: str
    label: str
    help: str
    choices: tuple[Any, ...] = ()
    show: Callable[[Any], str] = str
    number: dict[str, Any] = field(default_factory=dict)
    menu: bool = False

    @property
    def key(self) -> str:
        return f"quantize {self.path}"


FORMAT = Setting(
    "quant.format",
    "Weights",
    "W(1+1): a sign bit and a bitmap bit a weight, so four levels in a group. W1: the sign alone, two levels.",
    ("w1+1", "w1"),
    FORMAT_NAMES.__getitem__,
)
GROUP_SIZE = Setting(
    "quant.group_size",
    "Group size",
    "So many neighbouring weights of a row share one set of levels. Small groups fit better and cost more parameters.",
    (16, 32, 64, 128, WHOLE_ROW),
    size_label,
)
PARAM_BITS = Setting(
    "quant.param_bits",
    "Parameters, bits",
    "Each group's levels are given by parameters (alpha and mu). With 4 bits groups of 16 take what groups of 64 take "
    "with 16, and fit the weights much better.",
    (16, 8, 4),
)
ACT_BITS = Setting(
    "quant.act_bits",
    "Activations, bits",
    "What flows between the layers. Stage 3 learns where to clip it.",
    (16, 8, 4),
)
ACT_GROUP_SIZE = Setting(
    "quant.act_group_size",
    "Inputs a range",
    "So many of a token's inputs to a layer share one range of 4-bit or 8-bit steps. With one for the whole row, as in "
    "the paper, a single outlier makes the steps of all others coarse.",
    (32, 64, WHOLE_ROW),
    size_label,
)
KV_BITS = Setting(
    "quant.kv_bits", "KV cache, bits", "The memory of a conversation, keys and values of every token.", (16, 8, 4)
)
ACTIVATIONS = (ACT_BITS, ACT_GROUP_SIZE, KV_BITS)
STAGE_SETTING = Setting(
    "stages",
    "Stages",
    "1: initialization, closed form. 2: each block learns to give the teacher's output, by gradient descent. "
    "3: the same with quantized activations and KV cache. 4: the whole model at once learns the teacher's next words.",
    tuple(CHOICES),
    lambda stages: {**CHOICES, **FURTHER_CHOICES}[stages],
    menu=True,
)
TOKENS = Setting(
    "wat.tokens",
    "Tokens",
    "How much text stage 2 learns from. Time grows with it; Advanced has those of stages 1 and 3.",
    number={"min_value": 1, "step": 4096},
)

_RATE: dict[str, Any] = {"min_value": 0.0, "step": 0.001, "format": "%g"}
_TOKENS: dict[str, Any] = {"min_value": 1, "step": 1024}
_COUNT: dict[str, Any] = {"min_value": 0, "step": 1}
_AT_LEAST_1: dict[str, Any] = {"min_value": 1, "step": 1}
ADVANCED: dict[str, tuple[Setting, ...]] = {
    "All stages": (
        Setting("seq_len", "Sequence length", "Tokens in a sequence of the text.", number={"min_value": 8, "step": 64}),
        Setting("seed", "Seed", "Decides the order of the texts.", number=_COUNT),
        Setting("device", "Device", "auto takes a GPU where there is one.", ("auto", "cpu", "cuda")),
    ),
    "Stage 1": (
        Setting("ptq.tokens", "Tokens", "Text whose activations say which weights matter.", number=_TOKENS),
        Setting("ptq.sweeps", "Sweeps", "Passes of coordinate descent at the end.", number=_COUNT),
        Setting("ptq.damping", "Damping", "Relative to the mean of the Hessian's diagonal.", number=_RATE),
    ),
    "Stage 2": (
        Setting("wat.epochs", "Epochs", "How often the text is gone through.", number=_AT_LEAST_1),
        Setting("wat.batch_tokens", "Tokens a step", "", number=_TOKENS),
        Setting("wat.bitmap", "Bitmap", "coupled: weights decide it; relaxed: learned.", ("coupled", "relaxed")),
        Setting("wat.lr_weight", "Learning rate, weights", "Relative to a row's weight scale.", number=_RATE),
        Setting("wat.lr_levels", "Learning rate, levels", "", number=_RATE),
        Setting("wat.lr_bitmap", "Learning rate, bitmap", "Of the relaxed bitmap.", number=_RATE),
    ),
    "Stage 3": (
        Setting("aar.tokens", "Tokens", "", number=_TOKENS),
        Setting("aar.epochs", "Epochs", "", number=_COUNT),
        Setting("aar.batch_tokens", "Tokens a step", "", number=_TOKENS),
        Setting("aar.lr_levels", "Learning rate, levels", "", number=_RATE),
        Setting("aar.lr_act", "Learning rate, clips", "Of the activations' clips and knees.", number=_RATE),
    ),
    "Stage 4": (
        Setting("e2e.tokens", "Tokens", "", number=_TOKENS),
        Setting("e2e.epochs", "Epochs", "", number=_AT_LEAST_1),
        Setting("e2e.batch_tokens", "Tokens a step", "", number=_TOKENS),
        Setting("e2e.seq_len", "Tokens a sequence", "Memory goes with it.", number=_TOKENS),
        Setting("e2e.loss", "Loss", "What is compared of both models' next words.", get_args(LogitLoss), menu=True),
        Setting("e2e.feature_weight", "Weight, features", "Share of the blocks' outputs in the loss.", number=_RATE),
        Setting(
            "e2e.start_share",
            "Share of the start",
            "Of the weights and levels begun with, in the last ones.",
            number=_RATE | {"step": 0.05},
        ),
        Setting("e2e.lr_weight", "Learning rate, weights", "0 keeps the bits of the stages before.", number=_RATE),
        Setting("e2e.lr_levels", "Learning rate, levels", "", number=_RATE),
        Setting("e2e.lr_act", "Learning rate, clips", "Of the activations' clips and knees.", number=_RATE),
    ),
}
SETTINGS = (
    *(FORMAT, GROUP_SIZE, PARAM_BITS, *ACTIVATIONS, STAGE_SETTING, TOKENS),
    *(setting for group in ADVANCED.values() for setting in group),
)
CORPUS_KEY, SKIP_KEY, EDITOR_KEY, MODEL_KEY = (f"quantize {name}" for name in ("corpus", "skip", "editor", "model"))


def start() -> None:
    """Before any widget is drawn: fill them from the document, at the first visit and when the page is opened again.
    ``?from=`` a finished run makes a document that trains its checkpoint further. Raises LbllmError."""
    run = st.query_params.get("from")
    if run is not None:
        del st.query_params["from"]
        first = store().get(run)
        document = first.config.model_dump(mode="json") | settings_to_go_on(str(first.folder / "checkpoint"))
        # Another seed: another order of the text, and other parts of it.
        load(parse_config(document | {"seed": first.config.seed + 1}))
    elif DOCUMENT not in st.session_state:
        load(make_config())
    elif FORMAT.key not in st.session_state:
        load(parse_config(st.session_state[DOCUMENT]))


def load(config: RunConfig) -> None:
    """Set the document and every widget."""
    document = config.model_dump(mode="json")
    st.session_state[DOCUMENT] = document
    st.session_state[PRESET] = config.preset if config.preset in PRESETS else None
    st.session_state[MODEL_KEY] = config.model
    st.session_state[CORPUS_KEY] = config.corpus
    st.session_state[SKIP_KEY] = list(config.quant.skip)
    for setting in SETTINGS:
        value = _get(document, setting.path)
        st.session_state[setting.key] = tuple(value) if isinstance(value, list) else value
    rows = [{"pattern": name} | override for name, override in document["quant"]["overrides"].items()]
    st.session_state[TABLE] = pandas.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    # The editor keeps what was typed under its key; a new table begins with nothing typed.
    st.session_state.pop(EDITOR_KEY, None)


def goes_on() -> bool:
    """Whether the document is of a run that trains a checkpoint further: that has its model, its format but for the
    groups, and the stages before behind it."""
    return st.session_state[DOCUMENT].get("start") is not None


def free_to_lower() -> bool:
    """Whether the document's checkpoint has 16-bit activations and KV cache, so that stage 3 can bring them down."""
    return goes_on() and parse_config(st.session_state[DOCUMENT]).precision("start").weights_alone


def take_stages() -> None:
    """Stages of a run that goes on from a checkpoint were chosen: bits to bring down to, or the checkpoint's own."""
    bits = 4 if st.session_state[STAGE_SETTING.key] == TO_ACTIVATIONS else 16
    for setting in (ACT_BITS, KV_BITS):
        st.session_state[setting.key] = bits


def begin_anew() -> None:
    """From a checkpoint back to a run from the teacher."""
    load(make_config())


def read(overrides: pandas.DataFrame) -> RunConfig:
    """The settings as the widgets have them. Raises ConfigError."""
    document = json.loads(json.dumps(st.session_state[DOCUMENT]))
    for setting in SETTINGS:
        value = st.session_state[setting.key]
        if value is None:
            raise ConfigError(f"{setting.label} has no value")
        _put(document, setting.path, list(value) if isinstance(value, tuple) else value)
    document["model"] = teacher_name(st.session_state[MODEL_KEY] or "")
    document["corpus"] = corpus_name(st.session_state[CORPUS_KEY] or "")
    document["quant"]["skip"] = list(st.session_state[SKIP_KEY])
    document["quant"]["overrides"] = _overrides(overrides)
    config = parse_config(document)
    st.session_state[DOCUMENT] = config.model_dump(mode="json")
    return config


def _overrides(table: pandas.DataFrame) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(table.to_dict("records"), 1):
        values = {name: row[name] for name in COLUMNS if not pandas.isna(row[name]) and row[name] != ""}
        pattern = str(values.pop("pattern", "")).strip()
        if not pattern and not values:
            continue
        if not pattern:
            raise ConfigError(f"line {number} of the table per layer has no pattern; *.down_proj would be one")
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
    """A settings file was given: it becomes the document, or its fault a message on the page."""
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
        config = make_config(named or "quick", document)
        load(config if named else config.model_copy(update={"preset": "custom"}))
    except LbllmError as error:
        st.session_state[UPLOAD_ERROR] = f"{upload.name}: {error}"


def control(setting: Setting, *, disabled: bool = False) -> None:
    """Draw a setting's widget; its value is in the session."""
    disabled = disabled or brought(setting)
    if setting.number:
        st.number_input(setting.label, key=setting.key, help=setting.help or None, disabled=disabled, **setting.number)
        return
    value = st.session_state[setting.key]
    further = setting is STAGE_SETTING and free_to_lower()
    choices = _with(_choices(setting), value)
    draw: Callable[..., Any] = st.selectbox if setting.menu else partial(st.segmented_control, required=True)
    draw(
        setting.label,
        choices,
        format_func=setting.show,
        key=setting.key,
        help=setting.help or None,
        on_change=take_stages if further else None,
        disabled=disabled,
    )


def _choices(setting: Setting) -> tuple[Any, ...]:
    """A setting's choices, of a run that goes on from a checkpoint those that it leaves."""
    if setting is STAGE_SETTING and free_to_lower():
        return tuple(FURTHER_CHOICES)
    if setting is GROUP_SIZE and goes_on():
        try:
            own = settings_to_go_on(st.session_state[DOCUMENT]["start"])["quant"]["group_size"]
        except LbllmError:
            return setting.choices  # the run itself says what is wrong with its checkpoint
        return tuple(size for size in setting.choices if size == own or (size > 0 and own % size == 0))
    return setting.choices


def brought(setting: Setting) -> bool:
    """Whether a setting is decided by the checkpoint that the run goes on from."""
    if not goes_on():
        return False
    if setting is STAGE_SETTING:
        return not free_to_lower()
    if setting in (GROUP_SIZE, PARAM_BITS):
        return False
    lowers = st.session_state[STAGE_SETTING.key] == TO_ACTIVATIONS
    if lowers and (setting in ACTIVATIONS or setting.path.startswith("aar.")):
        return False
    return setting.path.partition(".")[0] in ("quant", "ptq", "wat", "aar")


def corpus_picker() -> None:
    """The text to train on: from the catalogue, or a path that is typed."""
    notes = {entry.id: entry.note for entry in TEXTS}
    value = st.session_state[CORPUS_KEY]
    st.selectbox(
        "Text",
        _with(tuple(notes), value),
        key=CORPUS_KEY,
        accept_new_options=True,
        help="What the student learns from. Or type the path of a .txt or .jsonl file or folder, or several names "
        "joined by +.\n\n" + "\n".join(f"- **{name}**: {note}" for name, note in notes.items()),
    )


def layers_table(names: Iterable[str]) -> pandas.DataFrame:
    """The editable table of settings per layer, and the layers to leave dense. ``names``: the model's layers."""
    names = list(names)
    ends = list(dict.fromkeys("*." + name.rpartition(".")[2] for name in names))
    blocks = list(dict.fromkeys(".".join(name.split(".")[:3]) + ".*" for name in names))
    example = f"`{ends[0]}` or `{blocks[0]}`" if names else "`*.down_proj`"
    st.caption(
        f"A pattern names layers, for example {example}; empty cells keep the settings above, and of several "
        "patterns that match the last one counts. Add a line at the bottom of the table."
    )
    table = st.data_editor(
        st.session_state[TABLE],
        key=EDITOR_KEY,
        num_rows="dynamic",
        hide_index=True,
        column_config={
            "pattern": st.column_config.TextColumn("Layers", width=115),
            "format": st.column_config.SelectboxColumn("Format", options=list(FORMAT_NAMES), width=70),
            "group_size": st.column_config.NumberColumn(
                "Group", min_value=-1, step=1, width=65, help="-1: the whole row"
            ),
            "param_bits": st.column_config.SelectboxColumn(
                "Param.", options=[4, 8, 16], width=70, help="Bits of the group parameters"
            ),
            "act_bits": st.column_config.SelectboxColumn(
                "Act.", options=[4, 8, 16], width=60, help="Bits of the activations"
            ),
        },
    )
    st.multiselect(
        "Layers to leave dense",
        list(dict.fromkeys((*st.session_state[SKIP_KEY], *ends, *blocks))),
        key=SKIP_KEY,
        accept_new_options=True,
        placeholder="none",
        help="Their weights keep 16 bits.",
    )
    return pandas.DataFrame(table)


def _with(choices: tuple[Any, ...], value: Any) -> list[Any]:
    """The choices, and a value from a file that is none of them."""
    return list(choices) if value is None or value in choices else [*choices, value]


def _get(document: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        document = document[part]
    return document


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for part in sections:
        document = document[part]
    document[name] = value
