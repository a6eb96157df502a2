"""The parts of a run's settings, as frozen pydantic models: the deployed format and one section for each stage.

Every value is checked when it is set, before anything is loaded; unknown keys are refused.
"""

from __future__ import annotations

import fnmatch
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

WHOLE_ROW = -1
ACT_GROUP_SIZE = 64  # inputs of a token that share a range, where neither the paper nor a checkpoint says another
# Settings of QuantConfig that only quantized activations read.
ACTIVATION_SETTINGS = ("act_group_size", "tail_steps")

Format = Literal["w1+1", "w1"]
Stage = Literal["ptq", "wat", "aar", "e2e"]
ParamBits = Literal[4, 8, 16]
LogitLoss = Literal["forward_kl", "reverse_kl", "cakld", "eakld", "concrete_score"]
Origin = Stage | Literal["start"]  # what a stage goes on from: one before it, or the checkpoint that a run starts from

STAGES: tuple[Stage, ...] = ("ptq", "wat", "aar", "e2e")
PAPER_STAGES = STAGES[:3]


def _no_empty_group(value: int) -> int:
    if value == 0:
        raise ValueError("a group has at least one member; -1 makes one group of a whole row")
    return value


GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_no_empty_group)]


class Section(BaseModel):
    # JSON has no infinity: settings with one could be written, but not read again.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerOverride(Section):
    """Settings of the layers whose name matches a pattern; ``None`` keeps the run's own value."""

    format: Format | None = None
    group_size: GroupSize | None = None
    param_bits: ParamBits | None = None
    act_bits: Literal[4, 8, 16] | None = None


class LayerFormat(Section):
    """The format of one linear layer after overrides."""

    format: Format
    group_size: int
    param_bits: ParamBits
    act_bits: Literal[4, 8, 16]
    act_group_size: int = WHOLE_ROW


class QuantConfig(Section):
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


class PtqConfig(Section):
    """Stage 1. ``tokens`` calibrate the Hessians; ``damping`` is relative to the mean of a Hessian's diagonal."""

    tokens: int = Field(24_576, gt=0)
    em_steps: int = Field(3, ge=1)
    damping: float = Field(0.1, gt=0)
    sweeps: int = Field(2, ge=0, description="coordinate-descent passes and level refits after the compensation")
    align: float = Field(
        1.0, ge=0, le=1, description="share of the drift of a layer's inputs that its weights make up for"
    )
    align_damping: float = Field(1.0, gt=0)


class WatConfig(Section):
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


class AarConfig(Section):
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


class E2eConfig(Section):
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
