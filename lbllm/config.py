"""Every setting of a run, as frozen pydantic models: one JSON document describes and reproduces a run.

``RunConfig`` holds the model, the text and one section for each stage. Unknown keys are refused, and every value is
checked before anything is loaded.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from lbllm.errors import ConfigError
from lbllm.json_input import LARGEST, check_depth, decode_object, shortened, shown
from lbllm.presets import ABOUT, PRESETS
from lbllm.sections import (
    ACTIVATION_BITS,
    ACTIVATION_SETTINGS,
    GROUP_SETTINGS,
    PAPER_STAGES,
    STAGES,
    AarConfig,
    E2eConfig,
    LayerOverride,
    Origin,
    PtqConfig,
    QuantConfig,
    Section,
    Stage,
    StreamDtype,
    WatConfig,
    stage_name,
)

SCHEMA_VERSION = 1

DEFAULT_MODEL, DEFAULT_PRESET = "smollm2-135m-instruct", "quick"
SHIPPED = "shipped"  # names the checkpoint included with the project
# The stages of a run that starts from a packed checkpoint: to keep its format, or to lower its 16-bit activations.
FROM_CHECKPOINT: tuple[Stage, ...] = ("e2e",)
TO_ACTIVATIONS: tuple[Stage, ...] = ("aar", "e2e")
# What this run may change in the checkpoint's format: settings of QuantConfig, and those of a layer in ``overrides``.
CONTINUATIONS: dict[tuple[Stage, ...], tuple[str, ...]] = {
    FROM_CHECKPOINT: (*GROUP_SETTINGS, "embedding_bits", "overrides"),
    TO_ACTIVATIONS: (*GROUP_SETTINGS, "embedding_bits", *ACTIVATION_BITS, *ACTIVATION_SETTINGS, "overrides"),
}
# Options of the command line that set a setting; --set takes any.
OPTIONS = {
    "model": "--model",
    "preset": "--preset",
    "quant.format": "--format",
    "quant.group_size": "--group-size",
    "quant.act_bits": "--act-bits",
    "quant.kv_bits": "--kv-bits",
    "corpus": "--corpus",
    "device": "--device",
    "start": "--from",
}

_WHOLE = {"schema_version", "quant", "ptq", "wat", "aar"}  # the keys of a document as runs write it
_BEFORE = {"stream_dtype": "float32"}  # what runs did before there was a setting, where that is not its default


class RunConfig(Section):
    """A whole run: ``model`` from the catalogue, the hub, a folder or a GGUF file; ``corpus`` from the catalogue or
    a path. ``start`` is the folder of a packed checkpoint of this model and format, or "shipped": stage 4 then trains
    it further, after stage 3 if that checkpoint has 16-bit activations and KV cache and ``quant`` has fewer bits."""

    schema_version: Literal[1] = Field(1, title="Schema version", description="Version of this document's schema.")
    model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        title="Model",
        description="The model to binarize: a catalogue id, a hub id (owner/name), a folder or a .gguf file.",
    )
    corpus: str = Field(
        "embedded",
        min_length=1,
        title="Text",
        description="What the student learns from: a catalogue id, the path of a .txt or .jsonl file or of a folder of "
        "them, or several names joined by +.",
    )
    preset: str = Field(
        "custom",
        title="Preset",
        description=" ".join(["A start for all other settings.", *(f"{k}: {text}" for k, text in ABOUT.items())]),
    )
    stages: tuple[Stage, ...] = Field(
        PAPER_STAGES,
        title="Stages",
        description="1 (ptq): initialization, in closed form. 2 (wat): each block learns to give the teacher's output, "
        "by gradient descent. 3 (aar): the same with quantized activations and KV cache. 4 (e2e): the whole model "
        "learns the teacher's distribution of next tokens.",
    )
    start: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        title="Starting checkpoint",
        description="A packed checkpoint to train further, by stage 4 only: its folder, a finished run's id, or "
        "'shipped'. Model and format are the checkpoint's. If it has 16-bit activations and KV cache and "
        "the run has fewer bits, stage 3 comes first.",
    )
    seq_len: int = Field(512, ge=8, title="Sequence length", description="Tokens in a sequence of the text.")
    seed: int = Field(
        0, ge=0, lt=2**32, title="Seed", description="Decides the order of the text, and which parts of it."
    )
    device: str = Field(
        "auto",
        title="Device",
        description="auto, cpu, cuda, or cuda:N for one of several GPUs; auto is a GPU if there is one, else the CPU.",
    )
    stream_dtype: StreamDtype = Field(
        "bfloat16",
        title="Precision of hidden states",
        description="How stages 1 to 3 keep the outputs of a block, which are the inputs of the next block, for all "
        "tokens of the stage. bfloat16 takes half the memory; float32 gives the same results as version 0.1.",
    )
    quant: QuantConfig = Field(QuantConfig(), title="Format")
    ptq: PtqConfig = Field(PtqConfig(), title=stage_name("ptq"))
    wat: WatConfig = Field(WatConfig(), title=stage_name("wat"))
    aar: AarConfig = Field(AarConfig(), title=stage_name("aar"))
    e2e: E2eConfig = Field(E2eConfig(), title=stage_name("e2e"))

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_run(cls, document: object) -> object:
        return _BEFORE | document if isinstance(document, dict) and document.keys() >= _WHOLE else document

    @field_validator("stages")
    @classmethod
    def _in_order(cls, value: tuple[Stage, ...]) -> tuple[Stage, ...]:
        blockwise = value[:-1] if value[-1:] == ("e2e",) else value
        if value not in CONTINUATIONS and (not blockwise or blockwise != PAPER_STAGES[: len(blockwise)]):
            raise ValueError(
                f"stages run in the order {', '.join(PAPER_STAGES)}, each needs the one before it; e2e may follow any"
            )
        return value

    @field_validator("start")
    @classmethod
    def _with_later_stages(cls, value: str | None, info: ValidationInfo) -> str | None:
        stages = info.data.get("stages", ())
        if not stages or (value is not None) == (stages in CONTINUATIONS):
            return value
        if value is None:
            raise ValueError(f"stage {stages[0]} needs a stage before it, or a packed checkpoint here to start from")
        raise ValueError("a run from a checkpoint has only stage e2e, or aar and e2e")

    @field_validator("quant")
    @classmethod
    def _with_bits_to_lower(cls, value: QuantConfig, info: ValidationInfo) -> QuantConfig:
        if info.data.get("stages") == TO_ACTIVATIONS and value.weights_alone:
            raise ValueError(
                f"stage aar has no bits to lower: set {setting_name('quant.act_bits')} or "
                f"{setting_name('quant.kv_bits')} below 16, or run only e2e"
            )
        return value

    def precision(self, stage: Origin) -> QuantConfig:
        """The format of the model after a stage: activations and KV cache are quantized from stage 3 on, or as
        in the checkpoint that the run starts from."""
        if self.stages == FROM_CHECKPOINT:
            return self.quant
        after = self.origins[: self.origins.index(stage) + 1]
        return self.quant if "aar" in after else self.quant.weights_only()

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The binarized models of a finished run: the starting checkpoint if there is one, and after each stage."""
        return self.stages if self.start is None else ("start", *self.stages)

    def fixed_by_start(self) -> frozenset[str]:
        """The settings, by their path, that the starting checkpoint decides: its model, its format except for what
        ``CONTINUATIONS`` lists, and the settings of stages that this run doesn't have. Empty for a run from the
        teacher."""
        if self.start is None:
            return frozenset()
        free = {f"quant.{name}" for name in CONTINUATIONS[self.stages]}
        sections = {"quant", *(stage for stage in STAGES if stage not in self.stages)}
        return frozenset({"model", *(path for path in SETTINGS if path.partition(".")[0] in sections)} - free)

    @property
    def run_name(self) -> str:
        """What a run of these settings is called where nobody gives it a name."""
        return f"{Path(self.model).name} {self.quant.format} g{self.quant.group_size}"

    @property
    def e2e_seq_len(self) -> int:
        """Tokens of a sequence in stage 4."""
        return min(self.seq_len, self.e2e.seq_len)

    @property
    def tokens(self) -> int:
        """Calibration tokens that the run reads from its corpus: the most that any of its stages asks for."""
        return max(getattr(self, stage).tokens for stage in self.stages)


def _settings() -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, Section):
            found |= {f"{name}.{key}": inner for key, inner in type(field.default).model_fields.items()}
        else:
            found[name] = field
    return found


# Every setting by its path: a key of RunConfig, or section.key. Its Field has label (title), help and bounds.
SETTINGS: dict[str, FieldInfo] = _settings()


def label(path: str) -> str | None:
    """A setting's name for people: "Group size", "Stage 2, batch size in tokens"; None if no setting has that
    path. A path can also lead to a section, or into a list or the settings of single layers."""
    section = path.partition(".")[0]
    field = RunConfig.model_fields.get(path) or SETTINGS.get(path)
    if field is not None:
        title = str(field.title)
        return f"{label(section)}, {_in_a_sentence(title)}" if section in STAGES and path != section else title
    if path.startswith("quant.overrides."):
        layers = path.removeprefix("quant.overrides.")
        pattern, _, key = layers.rpartition(".")
        if key not in LayerOverride.model_fields:
            return f"Layers {layers}"
        return f"Layers {pattern}, {_in_a_sentence(str(label(f'quant.{key}')))}"
    above = path.rpartition(".")[0]
    return label(above) if above in SETTINGS else None


def _in_a_sentence(title: str) -> str:
    """A title with a small first letter; an abbreviation keeps its capitals."""
    return title[0].lower() + title[1:] if title[1].islower() else title


def setting_name(path: str) -> str:
    """A setting as messages name it, "quant.group_size (Group size)"; pages show only the label
    (``labels_alone``), and the command line the option (``options_named``)."""
    known = label(path)
    return path if known is None else f"{path} ({known})"


def labels_alone(text: str) -> str:
    """The message with every name from ``setting_name`` shortened to its label, as pages show settings."""
    return _NAMED.sub(r"\2", text)


def options_named(text: str) -> str:
    """The message with every name from ``setting_name`` as the command line takes it: its option, "--group-size", or
    the name for ``--set`` with the label, where it has no option of its own."""
    return _NAMED.sub(lambda found: OPTIONS.get(found[1], found[0]), text)


_NAMED = re.compile(
    rf"(?<![^\s(])((?:{'|'.join(RunConfig.model_fields)})(?:\.\S+)?) "
    rf"\((Layers [^()]+|{'|'.join(re.escape(str(label(path))) for path in [*SETTINGS, *RunConfig.model_fields])})\)"
)


def _merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "overrides"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(document: dict[str, Any], assignment: str) -> None:
    """Apply ``section.key=value`` (the value as JSON, else as a plain string) to a nested dict."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {shown(assignment)}: expected key=value, for example wat.epochs=4")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    except RecursionError:
        raise ConfigError(f"--set {shown(assignment)}: the value is nested too deeply") from None
    *sections, key = path.split(".")
    place = document
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {shown(assignment)}: {shown(section)} is not a section")
    place[key] = value


def make_config(
    preset: str = DEFAULT_PRESET, changes: dict[str, Any] | None = None, assignments: tuple[str, ...] = ()
) -> RunConfig:
    """The preset with nested ``changes`` and then ``key=value`` assignments applied. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    _check_depth(changes or {})
    document = _merge(_merge({"preset": preset}, copy.deepcopy(PRESETS[preset])), copy.deepcopy(changes or {}))
    for assignment in assignments:
        _set(document, assignment)
    return parse_config(document)


def read_settings(text: str | bytes, source: str) -> tuple[str | None, dict[str, Any]]:
    """The preset that a settings file names, if it is a known one, and its other settings. Raises ConfigError naming
    ``source``. A whole document, as runs write it, gets missing settings from the defaults, or from ``_BEFORE``, not
    from a preset: these settings did not exist when it was written, and such a value is what that run did."""
    document = _decode(text, source)
    named = document.pop("preset", None)
    if document.keys() >= _WHOLE:
        document = _merge(RunConfig().model_dump(mode="json", exclude={"preset"}) | _BEFORE, document)
    return (named if isinstance(named, str) and named in PRESETS else None), document


def read_config(path: Path) -> RunConfig:
    """The settings in a run's ``config.json``. Raises OSError, and ConfigError naming the file."""
    with path.open("rb") as file:
        return parse_config(_decode(file.read(LARGEST + 1), str(path)))


def read_settings_file(path: Path) -> tuple[str | None, dict[str, Any]]:
    """``read_settings`` of a file. Raises OSError, too."""
    with path.open("rb") as file:
        return read_settings(file.read(LARGEST + 1), str(path))


def _decode(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        return decode_object(text)
    except ValueError as error:
        raise ConfigError(f"{source} {error}") from None


def _check_depth(document: object) -> None:
    try:
        check_depth(document)
    except ValueError as error:
        raise ConfigError(f"the settings document {error}") from None


_MOST_PROBLEMS = 8  # that one message names
# Replaces a message in pydantic's own terms.
_PROBLEMS = {"extra_forbidden": "is not a setting", "model_type": "a JSON object of settings is needed"}


def parse_config(document: object) -> RunConfig:
    """Check a settings document, e.g. one read from a file. Raises ConfigError naming each bad key and its value."""
    _check_depth(document)
    if not isinstance(document, dict):
        raise ConfigError(f"settings are a {type(document).__name__}; a JSON object of settings is needed")
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ConfigError(f"settings of schema version {shown(version)}: this program reads version {SCHEMA_VERSION}")
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = []
        for problem in problems[:_MOST_PROBLEMS]:
            place = setting_name(".".join(shortened(str(part)) for part in problem["loc"]) or "a name")
            said = _PROBLEMS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] == "extra_forbidden" else f" (given: {shown(problem['input'])})"
            lines.append(f"{place}: {said}{given}")
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"and {len(problems) - _MOST_PROBLEMS:,} more")
        raise ConfigError("bad settings: " + "; ".join(lines)) from None


def arguments(config: RunConfig) -> list[str]:
    """The options that make ``run_config`` give ``config``: its preset, then each setting that differs from it."""
    preset = config.preset if config.preset in PRESETS else DEFAULT_PRESET
    plain, given = leaves(make_config(preset)), leaves(config)
    words = ["--model", config.model, "--preset", preset]
    if config.start is not None:
        # Stages and format come from the checkpoint; what a run can change of them is always given.
        for name in CONTINUATIONS[config.stages]:
            words += _option(f"quant.{name}", given[f"quant.{name}"])
        given = {key: value for key, value in given.items() if key != "stages" and not key.startswith("quant.")}
    for key, value in given.items():
        if key not in ("model", "preset") and plain[key] != value:
            words += _option(key, value)
    return words


def _option(path: str, value: Any) -> list[str]:
    return [OPTIONS[path], str(value)] if path in OPTIONS else ["--set", f"{path}={json.dumps(value)}"]


def leaves(config: RunConfig) -> dict[str, Any]:
    """Every setting by its path, section.key."""
    leaves: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            leaves |= {f"{key}.{name}": setting for name, setting in value.items()}
        else:
            leaves[key] = value
    overrides = config.quant.model_dump(mode="json", exclude_none=True)["overrides"]
    return leaves | {"quant.overrides": overrides}
