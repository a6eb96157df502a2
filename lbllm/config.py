"""Every setting of a run, as frozen pydantic models: one JSON document describes and reproduces a run.

``RunConfig`` holds the model, the text and one section for each stage. Unknown keys are refused, every value is checked
before anything is loaded, and ``preset(name)`` gives the named starting points.
"""

from __future__ import annotations

import copy
import fnmatch
import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from lbllm.errors import ConfigError

SCHEMA_VERSION = 1
WHOLE_ROW = -1
ACT_GROUP_SIZE = 64  # inputs of a token that share a range, where neither the paper nor a checkpoint says another
# Settings of QuantConfig that only quantized activations read.
ACTIVATION_SETTINGS = ("act_group_size", "tail_steps")

Format = Literal["w1+1", "w1"]
Stage = Literal["ptq", "wat", "aar", "e2e"]
ParamBits = Literal[4, 8, 16]
LogitLoss = Literal["forward_kl", "reverse_kl", "cakld", "eakld", "concrete_score"]
Origin = Stage | Literal["start"]  # what a stage goes on from: one before it, or the checkpoint that a run starts from
FORMAT_NAMES: dict[Format, str] = {"w1+1": "W(1+1)", "w1": "W1"}
STAGES: tuple[Stage, ...] = ("ptq", "wat", "aar", "e2e")
PAPER_STAGES = STAGES[:3]
STAGE_NAMES: dict[Origin, str] = {
    "start": "The checkpoint gone on from",
    "ptq": "Stage 1: PTQ initialization",
    "wat": "Stage 2: weight-aware training",
    "aar": "Stage 3: activation-aware refinement",
    "e2e": "Stage 4: end to end",
}
SHIPPED = "shipped"  # names the checkpoint that comes with the project
# The stages of a run that starts from a packed checkpoint: in its format, or from one with 16-bit activations to fewer.
FROM_CHECKPOINT: tuple[Stage, ...] = ("e2e",)
TO_ACTIVATIONS: tuple[Stage, ...] = ("aar", "e2e")
FURTHER = (FROM_CHECKPOINT, TO_ACTIVATIONS)


def _no_empty_group(value: int) -> int:
    if value == 0:
        raise ValueError("a group has at least one member; -1 makes one group of a whole row")
    return value


GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_no_empty_group)]


class _Section(BaseModel):
    # JSON has no infinity: settings with one could be written, but not read again.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerOverride(_Section):
    """Settings of the layers whose name matches a pattern; ``None`` keeps the run's own value."""

    format: Format | None = None
    group_size: GroupSize | None = None
    param_bits: ParamBits | None = None
    act_bits: Literal[4, 8, 16] | None = None


class LayerFormat(_Section):
    """The format of one linear layer after overrides."""

    format: Format
    group_size: int
    param_bits: ParamBits
    act_bits: Literal[4, 8, 16]
    act_group_size: int = WHOLE_ROW


class QuantConfig(_Section):
    """The deployed format: W(1+1) or W1 weights, group parameters, activations, KV cache.

    ``group_size`` counts weights along the input dimension; -1 is one group a row, and the last group of a row may be
    shorter. ``act_group_size`` counts the inputs of a token that share a range likewise; -1, one range a token, is the
    paper's. ``overrides`` maps name patterns (as in ``fnmatch``, e.g. ``*.down_proj``) to other settings; of several
    matching patterns the last one wins for each field. Layers whose name matches a pattern of ``skip`` stay dense.
    """

    format: Format = "w1+1"
    group_size: GroupSize = Field(64, description="weights that share one set of levels; -1: the whole row")
    param_bits: ParamBits = 16
    act_bits: Literal[4, 8, 16] = 4
    kv_bits: Literal[4, 8, 16] = 4
    act_group_size: GroupSize = Field(WHOLE_ROW, description="inputs of a token that share a range; -1: all of them")
    tail_steps: int = Field(3, ge=0, le=6, description="steps of the 16-level activation grid spent on each tail")
    skip: tuple[str, ...] = ()
    overrides: dict[str, LayerOverride] = {}

    def weights_only(self) -> QuantConfig:
        """The same format of the weights with activations and KV cache left as they are."""
        overrides = {name: o.model_copy(update={"act_bits": None}) for name, o in self.overrides.items()}
        plain = {name: QuantConfig.model_fields[name].default for name in ACTIVATION_SETTINGS}
        return self.model_copy(update={"act_bits": 16, "kv_bits": 16, "overrides": overrides, **plain})

    @property
    def weights_alone(self) -> bool:
        """Whether activations and KV cache are left as they are already."""
        return {self.act_bits, self.kv_bits, *(o.act_bits or 16 for o in self.overrides.values())} == {16}

    def layer(self, name: str) -> LayerFormat | None:
        """The format of the layer ``name`` (its full module path), or None where it stays dense."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        values = {"format": self.format, "group_size": self.group_size}
        values |= {"param_bits": self.param_bits, "act_bits": self.act_bits, "act_group_size": self.act_group_size}
        for pattern, override in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                values |= override.model_dump(exclude_none=True)
        return LayerFormat.model_validate(values)


class PtqConfig(_Section):
    """Stage 1. ``tokens`` calibrate the Hessians; ``damping`` is relative to the mean of a Hessian's diagonal."""

    tokens: int = Field(24_576, gt=0)
    em_steps: int = Field(3, ge=1)
    damping: float = Field(0.1, gt=0)
    sweeps: int = Field(2, ge=0, description="coordinate-descent passes and level refits after the compensation")
    align: float = Field(
        1.0, ge=0, le=1, description="share of the drift of a layer's inputs that its weights make up for"
    )
    align_damping: float = Field(1.0, gt=0)


class WatConfig(_Section):
    """Stage 2. Learning rates are relative: a step moves a latent weight by ``lr_weight`` times its row's weight
    scale."""

    tokens: int = Field(24_576, gt=0)
    epochs: int = Field(1, ge=1)
    batch_tokens: int = Field(512, gt=0)
    lr_weight: float = Field(2e-2, ge=0)
    lr_levels: float = Field(5e-3, ge=0)
    lr_bitmap: float = Field(0.1, ge=0)
    bitmap: Literal["coupled", "relaxed"] = "coupled"
    reg_weight: float = Field(30.0, ge=0, description="lambda of the paper's bitmap polarization")
    beta_start: float = Field(20.0, gt=0, description="power of the polarization, which goes evenly to beta_end")
    beta_end: float = Field(2.0, gt=0)
    loss: Literal["relative", "mse"] = "relative"
    grad_clip: float = Field(0.3, gt=0)


class AarConfig(_Section):
    """Stage 3. ``search_tokens`` choose each layer's first knee; the mask's temperature is relative to the body's
    step."""

    tokens: int = Field(8_192, gt=0)
    epochs: int = Field(2, ge=0)
    batch_tokens: int = Field(512, gt=0)
    search_tokens: int = Field(1_024, gt=0)
    lr_levels: float = Field(5e-3, ge=0)
    lr_act: float = Field(1e-2, ge=0)
    temperature: float = Field(0.5, gt=0)
    grad_clip: float = Field(0.3, gt=0)


class E2eConfig(_Section):
    """Stage 4, which is optional. Learning rates as in stages 2 and 3; the loss compares the logits of both models.

    Bits stay as they are while ``lr_weight`` is 0; above it latent weights train too, from where stage 1 left them.
    ``feature_weight`` adds that much of the difference of the blocks' outputs to the loss. Memory goes with
    ``seq_len``: the activations of the whole model are kept for one sequence."""

    tokens: int = Field(65_536, gt=0)
    seq_len: int = Field(256, ge=8, description="longer sequences of the run are cut to this length")
    epochs: int = Field(1, ge=1)
    batch_tokens: int = Field(1_024, gt=0)
    lr_weight: float = Field(0.0, ge=0)
    lr_levels: float = Field(4e-3, ge=0)
    lr_act: float = Field(2e-3, ge=0)
    loss: LogitLoss = "forward_kl"
    feature_weight: float = Field(0.0, ge=0)
    start_share: float = Field(0.0, ge=0, lt=1, description="of the parameters begun with, in those that it ends with")
    grad_clip: float = Field(1.0, gt=0)


class RunConfig(_Section):
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


# Weights: as many bits as groups of 64 with float16 parameters, and about half their error.
_FINE = {"group_size": 16, "param_bits": 4, "act_group_size": ACT_GROUP_SIZE}
PRESETS: dict[str, dict[str, Any]] = {
    "preview": {
        "seq_len": 256,
        "ptq": {"tokens": 2_048, "sweeps": 1},
        "wat": {"tokens": 2_048, "epochs": 1},
        "aar": {"tokens": 2_048, "search_tokens": 1_024},
    },
    # The last minutes do more in stage 4 than in a second pass of stage 3.
    "quick": {"stages": STAGES, "quant": _FINE, "aar": {"epochs": 1}, "e2e": {"tokens": 8_192}},
    "standard": {
        "stages": STAGES,
        "quant": _FINE,
        "seq_len": 1_024,
        "ptq": {"tokens": 65_536},
        "wat": {"tokens": 262_144, "epochs": 2, "batch_tokens": 2_048},
        "aar": {"tokens": 131_072, "epochs": 2, "batch_tokens": 2_048},
    },
    "paper": {
        "seq_len": 2_048,
        "corpus": "redpajama",
        "quant": {"group_size": 128},
        "ptq": {"tokens": 262_144},
        "wat": {"tokens": 16_777_216, "epochs": 1, "batch_tokens": 4_096},
        "aar": {"tokens": 16_777_216, "epochs": 1, "batch_tokens": 4_096},
    },
}


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
