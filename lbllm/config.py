"""Every setting of a run, as frozen pydantic models: one JSON document describes and reproduces a run.

``RunConfig`` holds the model, the text and one section for each stage. Unknown keys are refused, every value is checked
before anything is loaded, and ``preset(name)`` gives the named starting points.
"""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from lbllm.errors import ConfigError
from lbllm.presets import PRESETS
from lbllm.sections import (
    ACTIVATION_SETTINGS,
    PAPER_STAGES,
    AarConfig,
    E2eConfig,
    Origin,
    PtqConfig,
    QuantConfig,
    Section,
    Stage,
    WatConfig,
)

SCHEMA_VERSION = 1

SHIPPED = "shipped"  # names the checkpoint that comes with the project
# The stages of a run that starts from a packed checkpoint: in its format, or from one with 16-bit activations to fewer.
FROM_CHECKPOINT: tuple[Stage, ...] = ("e2e",)
TO_ACTIVATIONS: tuple[Stage, ...] = ("aar", "e2e")
FURTHER = (FROM_CHECKPOINT, TO_ACTIVATIONS)


class RunConfig(Section):
    """A whole run: ``model`` from the catalogue, the hub, a folder or a GGUF file; ``corpus`` from the catalogue or
    a path. With ``start``, the folder of a packed checkpoint of this model and format or "shipped", stage 4 alone goes
    on from there; stages 3 and 4 do where that checkpoint has 16-bit activations and KV cache, and ``quant`` fewer."""

    schema_version: Literal[1] = 1
    model: str = Field("smollm2-135m-instruct", min_length=1)
    corpus: str = Field("embedded", min_length=1)
    preset: str = "custom"
    stages: tuple[Stage, ...] = PAPER_STAGES
    start: str | None = Field(None, min_length=1, validate_default=True)
    seq_len: int = Field(512, ge=8)
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    quant: QuantConfig = QuantConfig()
    ptq: PtqConfig = PtqConfig()
    wat: WatConfig = WatConfig()
    aar: AarConfig = AarConfig()
    e2e: E2eConfig = E2eConfig()

    @field_validator("stages")
    @classmethod
    def _in_order(cls, value: tuple[Stage, ...]) -> tuple[Stage, ...]:
        blockwise = value[:-1] if value[-1:] == ("e2e",) else value
        if value in FURTHER:
            return value
        if not blockwise or blockwise != PAPER_STAGES[: len(blockwise)]:
            raise ValueError(
                f"stages run in the order {', '.join(PAPER_STAGES)}, each needs the one before it; e2e may follow any"
            )
        return value

    @field_validator("start")
    @classmethod
    def _with_later_stages(cls, value: str | None, info: ValidationInfo) -> str | None:
        stages = info.data.get("stages", ())
        if not stages or (value is not None) == (stages in FURTHER):
            return value
        if value is None:
            raise ValueError(f"stage {stages[0]} needs a stage before it, or a packed checkpoint here to go on from")
        raise ValueError("a run goes on from a checkpoint with stage e2e alone, or with aar and e2e")

    @field_validator("quant")
    @classmethod
    def _with_bits_to_bring_down(cls, value: QuantConfig, info: ValidationInfo) -> QuantConfig:
        if info.data.get("stages") == TO_ACTIVATIONS and value.weights_alone:
            raise ValueError(
                "stage aar has nothing to bring down: give act_bits or kv_bits below 16, or take e2e alone"
            )
        return value

    def precision(self, stage: Origin) -> QuantConfig:
        """The format of the model after a stage: activations and KV cache are quantized from stage 3 on, or as they
        were in the checkpoint that the run starts from."""
        if self.stages == FROM_CHECKPOINT:
            return self.quant
        after = self.origins[: self.origins.index(stage) + 1]
        return self.quant if "aar" in after else self.quant.weights_only()

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The binarized models that the run has in the end: after each stage, and where it started from a
        checkpoint."""
        return self.stages if self.start is None else ("start", *self.stages)

    @property
    def e2e_seq_len(self) -> int:
        """Tokens of a sequence in stage 4."""
        return min(self.seq_len, self.e2e.seq_len)

    @property
    def tokens(self) -> int:
        """Calibration tokens that the run reads from its corpus: the most that any of its stages asks for."""
        return max(getattr(self, stage).tokens for stage in self.stages)


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
        raise ConfigError(f"--set {assignment!r}: expected key=value, for example wat.epochs=4")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, key = path.split(".")
    place = document
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {assignment!r}: {section!r} is not a section")
    place[key] = value


def make_config(
    preset: str = "quick", changes: dict[str, Any] | None = None, assignments: tuple[str, ...] = ()
) -> RunConfig:
    """The preset with nested ``changes`` and then ``key=value`` assignments applied. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    document = _merge(_merge({"preset": preset}, copy.deepcopy(PRESETS[preset])), copy.deepcopy(changes or {}))
    for assignment in assignments:
        _set(document, assignment)
    return parse_config(document)


def read_settings(text: str | bytes, source: str) -> tuple[str | None, dict[str, Any]]:
    """The preset that a settings file names, if it is a known one, and its other settings. Raises ConfigError naming
    ``source``. A whole document, as runs write it, does not get what it lacks from a preset: a setting that there was
    not when it was written has its default, which is what that run did."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{source} holds a {type(document).__name__}; a JSON object of settings is needed")
    named = document.pop("preset", None)
    if {"schema_version", "quant", "ptq", "wat", "aar"} <= document.keys():
        document = _merge(RunConfig().model_dump(mode="json", exclude={"preset"}), document)
    return (named if named in PRESETS else None), document


def parse_config(document: dict[str, Any]) -> RunConfig:
    """Check a settings document, e.g. one read from a file. Raises ConfigError naming each bad key and its value."""
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ConfigError(f"settings of schema version {version!r}: this program reads version {SCHEMA_VERSION}")
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            given = "" if problem["type"] == "extra_forbidden" else f" (given: {problem['input']!r})"
            known = (
                "is not a setting"
                if problem["type"] == "extra_forbidden"
                else problem["msg"].removeprefix("Value error, ")
            )
            lines.append(f"{place}: {known}{given}")
        raise ConfigError("bad settings: " + "; ".join(lines)) from None


def arguments(config: RunConfig) -> list[str]:
    """The options that make ``run_config`` give ``config``: its preset, then each setting that differs from it."""
    preset = config.preset if config.preset in PRESETS else "quick"
    plain, given = _leaves(make_config(preset)), _leaves(config)
    options = {
        "model": "--model",
        "quant.format": "--format",
        "quant.group_size": "--group-size",
        "quant.act_bits": "--act-bits",
        "quant.kv_bits": "--kv-bits",
        "corpus": "--corpus",
        "device": "--device",
        "start": "--from",
    }
    words = ["--model", config.model, "--preset", preset]
    if config.start is not None:
        # Stages and format come along with the checkpoint, but for its groups and for bits that are brought down.
        overrides = json.dumps(given["quant.overrides"])
        given = {key: value for key, value in given.items() if key != "stages" and not key.startswith("quant.")}
        words += ["--group-size", str(config.quant.group_size), "--set", f"quant.param_bits={config.quant.param_bits}"]
        if config.stages == TO_ACTIVATIONS:
            words += ["--act-bits", str(config.quant.act_bits), "--kv-bits", str(config.quant.kv_bits)]
            for name in ACTIVATION_SETTINGS:
                words += ["--set", f"quant.{name}={getattr(config.quant, name)}"]
        words += ["--set", f"quant.overrides={overrides}"]  # left out they would be the checkpoint's own
    for key, value in given.items():
        if key == "model" or plain[key] == value:
            continue
        if key in options:
            words += [options[key], str(value)]
        else:
            words += ["--set", f"{key}={json.dumps(value)}"]
    return words


def _leaves(config: RunConfig) -> dict[str, Any]:
    """Every setting by its path, section.key."""
    leaves: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            leaves |= {f"{key}.{name}": setting for name, setting in value.items()}
        else:
            leaves[key] = value
    overrides = config.quant.model_dump(mode="json", exclude_none=True)["overrides"]
    return leaves | {"quant.overrides": overrides}
