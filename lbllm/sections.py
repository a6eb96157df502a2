"""The parts of a run's settings, as frozen pydantic models: the deployed format and one section for each stage.

Every value is checked when it is set, before anything is loaded; unknown keys are refused. A setting's label
(``title``), help (``description``) and bounds are written only in its Field: pages, command line and docs/settings.md
read them from there.
"""

from __future__ import annotations

import fnmatch
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lbllm.section import Section

WHOLE_ROW = -1
LARGEST_KV_GROUP = 4_096  # tokens; that many stay in 16 bits until their group is whole
# Inputs of a token, and tokens of a key's channel, that share a range, unless the paper or a checkpoint says otherwise.
ACT_GROUP_SIZE, KV_GROUP_SIZE = 64, 64
# Settings of QuantConfig: of the groups, which can be made of larger ones; the bits that stage 3 lowers; and those that
# only quantized activations read.
GROUP_SETTINGS = ("group_size", "param_bits")
ACTIVATION_BITS = ("act_bits", "kv_bits")
ACTIVATION_SETTINGS = ("act_group_size", "tail_steps", "kv_group_size", "kv_first")

Format = Literal["w1+1", "w1", "w1+1+1"]
Stage = Literal["ptq", "wat", "aar", "e2e"]
ParamBits = Literal[4, 8, 16]
EmbeddingBits = Literal[4, 6, 8, 16]
BlockLoss = Literal["relative", "mse"]
InputStreams = Literal["student", "both"]
StreamDtype = Literal["bfloat16", "float32"]
LogitLoss = Literal["forward_kl", "reverse_kl", "cakld", "eakld", "concrete_score"]
Origin = Stage | Literal["start"]  # what a stage starts from: an earlier one, or the checkpoint that a run starts from

STAGES: tuple[Stage, ...] = ("ptq", "wat", "aar", "e2e")
PAPER_STAGES = STAGES[:3]


def stage_number(stage: Stage) -> int:
    """The number of a stage, counted from 1: 1 for ``ptq``."""
    return STAGES.index(stage) + 1


def stage_name(stage: Stage) -> str:
    """A stage by its number: "Stage 1"."""
    return f"Stage {stage_number(stage)}"


def _no_empty_group(value: int) -> int:
    if value == 0:
        raise ValueError("a group has at least one member; -1 makes one group of a whole row")
    return value


MOST_EPOCHS = 10_000
LayerPattern = Annotated[str, Field(max_length=300)]
GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_no_empty_group)]


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

    ``group_size`` counts weights along the input dimension; -1 is one group per row, and the last group of a row may
    be shorter. ``act_group_size`` counts the inputs of a token that share a range; -1, one range per token, is as in
    the paper. ``overrides`` maps name patterns (as in ``fnmatch``, e.g. ``*.down_proj``) to other settings; of several
    matching patterns the last one wins for each field. Layers whose name matches a pattern of ``skip`` stay dense.
    """

    format: Format = Field(
        "w1+1",
        title="Weights",
        description="w1+1, W(1+1): a sign and a bitmap bit for each weight, four levels a group. w1, W1: the sign, "
        "two. w1+1+1, W(1+1+1): three planes, not LBLLM's own format; eight levels of a layer, times a group's scale.",
    )
    group_size: GroupSize = Field(
        64,
        title="Group size",
        description="How many neighbouring weights of a row share one set of levels; -1: the whole row. Small groups "
        "fit better and cost more parameters.",
    )
    param_bits: ParamBits = Field(
        16,
        title="Bits of group parameters",
        description="Bits of each group parameter (alpha and mu), which give the levels of a group. Groups of 16 with "
        "4-bit parameters are as large as groups of 64 with 16-bit ones, and fit the weights much better.",
    )
    embedding_bits: EmbeddingBits = Field(
        16,
        title="Embedding bits",
        description="Bits of the token embeddings and of the output head. 16: bfloat16. 8: as Q8_0 in a GGUF file, so "
        "a teacher from such a file keeps its embeddings exactly. 6 and 4: a smaller file, at a small cost in quality.",
    )
    act_bits: Literal[4, 8, 16] = Field(
        4,
        title="Activation bits",
        description="Bits of the numbers that flow between the layers; 16: they are not quantized. Stage 3 learns "
        "where to clip them.",
    )
    kv_bits: Literal[4, 8, 16] = Field(
        4,
        title="KV cache bits",
        description="Bits of the KV cache, which holds the keys and values of every token of a conversation; 16: it is "
        "not quantized.",
    )
    kv_group_size: GroupSize = Field(
        WHOLE_ROW,
        le=LARGEST_KV_GROUP,
        title="KV cache group size",
        description="How many tokens share a range of 4-bit or 8-bit steps in each channel of the keys; values keep a "
        "range for each token. Tokens after the last whole group stay in 16 bits. -1: keys, too, have a range for each "
        "token, as in the paper. A few channels of the keys are large, and make the steps of such a range coarse.",
    )
    kv_first: int = Field(
        1,
        ge=0,
        le=LARGEST_KV_GROUP,
        title="First tokens in 16 bits",
        description="How many tokens at the start keep 16 bits in the KV cache. Their keys are of another size than "
        "all others. Only with a KV cache group size.",
    )
    act_group_size: GroupSize = Field(
        WHOLE_ROW,
        title="Activation group size",
        description="Inputs per activation range: how many neighbouring inputs of a token share one range of 4-bit or "
        "8-bit steps; -1: all of them, as in the paper. A single outlier makes the steps of its whole range coarse.",
    )
    tail_steps: int = Field(
        3,
        ge=0,
        le=6,
        title="Tail steps",
        description="How many of the steps of a 4-bit activation range each of its tails gets.",
    )
    skip: tuple[LayerPattern, ...] = Field(
        (),
        title="Layers to leave dense",
        description="Name patterns of layers that are not binarized and keep 16 bits, for example *.down_proj.",
    )
    overrides: dict[LayerPattern, LayerOverride] = Field(
        {},
        title="Settings per layer",
        description="Other settings for layers whose names match a pattern. If several patterns match a layer, the "
        "last one counts.",
    )

    def weights_only(self) -> QuantConfig:
        """The same weight format, with activations and KV cache not quantized."""
        overrides = {name: o.model_copy(update={"act_bits": None}) for name, o in self.overrides.items()}
        plain = {name: QuantConfig.model_fields[name].default for name in ACTIVATION_SETTINGS}
        return self.model_copy(update={"act_bits": 16, "kv_bits": 16, "overrides": overrides, **plain})

    @property
    def weights_alone(self) -> bool:
        """Whether activations and KV cache are not quantized."""
        return {self.act_bits, self.kv_bits, *(o.act_bits or 16 for o in self.overrides.values())} == {16}

    def layer(self, name: str) -> LayerFormat | None:
        """The format of the layer ``name`` (its full module path), or None if it stays dense."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        values = {"format": self.format, "group_size": self.group_size}
        values |= {"param_bits": self.param_bits, "act_bits": self.act_bits, "act_group_size": self.act_group_size}
        for pattern, override in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                values |= override.model_dump(exclude_none=True)
        return LayerFormat.model_validate(values)


class PtqConfig(Section):
    """Stage 1."""

    tokens: int = Field(
        24_576,
        gt=0,
        title="Calibration tokens",
        description="How much text shows which weights matter: the Hessians of the layers are computed from it.",
    )
    em_steps: int = Field(
        3,
        ge=1,
        title="EM steps",
        description="How often the levels of a group are fitted and its weights assigned to them.",
    )
    damping: float = Field(
        0.1,
        gt=0,
        title="Damping",
        description="What is added to the diagonal of a layer's Hessian, relative to the mean of the diagonal.",
    )
    sweeps: int = Field(
        2,
        ge=0,
        title="Sweeps",
        description="Passes of coordinate descent after the error compensation; each also fits the levels again.",
    )
    align: float = Field(
        1.0,
        ge=0,
        le=1,
        title="Drift correction",
        description="Share of the drift of a layer's inputs that its weights correct. The layers before it, which are "
        "binarized already, cause the drift.",
    )
    align_damping: float = Field(
        1.0,
        gt=0,
        title="Drift damping",
        description="Damping of the drift correction, relative to the mean of the Hessian's diagonal.",
    )


class WatConfig(Section):
    """Stage 2. Learning rates of weights and levels are relative to the standard deviation of a layer's weights."""

    tokens: int = Field(
        24_576, gt=0, title="Training tokens", description="How much text stage 2 learns from. Its time grows with it."
    )
    epochs: int = Field(1, ge=1, le=MOST_EPOCHS, title="Epochs", description="How many times the text is used.")
    batch_tokens: int = Field(
        512, gt=0, title="Batch size in tokens", description="Tokens in one step of the optimizer."
    )
    lr_weight: float = Field(
        2e-2,
        ge=0,
        title="Learning rate of weights",
        description="Of the latent weights, relative to the standard deviation of a layer's weights.",
    )
    lr_levels: float = Field(
        5e-3,
        ge=0,
        title="Learning rate of levels",
        description="Of the group parameters, relative to the standard deviation of a layer's weights.",
    )
    lr_bitmap: float = Field(
        0.1, ge=0, title="Learning rate of the bitmap", description="Of the relaxed bitmap; a coupled one has none."
    )
    bitmap: Literal["coupled", "relaxed"] = Field(
        "coupled",
        title="Bitmap",
        description="coupled: sign and bitmap follow from the latent weight. relaxed: the bitmap is trained as numbers "
        "between 0 and 1, as in the paper.",
    )
    reg_weight: float = Field(
        30.0,
        ge=0,
        title="Polarization weight",
        description="Weight of the loss that pushes a relaxed bitmap to 0 or 1: lambda in the paper.",
    )
    beta_start: float = Field(
        20.0,
        gt=0,
        title="First polarization power",
        description="Power in the polarization loss (beta in the paper) at the first step; it then changes evenly.",
    )
    beta_end: float = Field(
        2.0, gt=0, title="Last polarization power", description="Power in the polarization loss at the last step."
    )
    loss: BlockLoss = Field(
        "relative",
        title="Loss",
        description="relative: each token's squared error, divided by the larger squared norm of output and target. "
        "mse: the mean squared error, as in the paper.",
    )
    streams: InputStreams = Field(
        "student",
        title="Input streams",
        description="student: a block trains on what comes through the binarized blocks before it. both: also on what "
        "comes through the teacher's blocks, in the same step (Lillama); this takes twice the time.",
    )
    grad_clip: float = Field(0.3, gt=0, title="Gradient clip", description="Largest norm of a step's gradient.")


class AarConfig(Section):
    """Stage 3. The mask's temperature is relative to the body's step."""

    tokens: int = Field(
        8_192, gt=0, title="Training tokens", description="How much text stage 3 learns from. Its time grows with it."
    )
    epochs: int = Field(
        2,
        ge=0,
        le=MOST_EPOCHS,
        title="Epochs",
        description="How many times the text is used; 0: only the first knees are chosen.",
    )
    batch_tokens: int = Field(
        512, gt=0, title="Batch size in tokens", description="Tokens in one step of the optimizer."
    )
    search_tokens: int = Field(
        1_024, gt=0, title="Knee search tokens", description="How much of the text chooses each layer's first knee."
    )
    lr_levels: float = Field(
        5e-3,
        ge=0,
        title="Learning rate of levels",
        description="Of the group parameters, relative to the standard deviation of a layer's weights.",
    )
    lr_act: float = Field(
        1e-2, ge=0, title="Learning rate of clips", description="Of the clips and knees of the activations."
    )
    temperature: float = Field(
        0.5,
        gt=0,
        title="Mask temperature",
        description="How softly body and tails of a range meet in training, relative to a step of the body.",
    )
    loss: BlockLoss = Field(
        "relative",
        title="Loss",
        description="relative: each token's squared error, divided by the larger squared norm of output and target. "
        "mse: the mean squared error, as in the paper.",
    )
    grad_clip: float = Field(0.3, gt=0, title="Gradient clip", description="Largest norm of a step's gradient.")


class E2eConfig(Section):
    """Stage 4, which is optional. Learning rates as in stages 2 and 3; the loss compares the logits of both models.

    Bits stay as they are while ``lr_weight`` is 0; above it latent weights train too, from where stage 1 left them."""

    tokens: int = Field(
        65_536, gt=0, title="Training tokens", description="How much text stage 4 learns from. Its time grows with it."
    )
    seq_len: int = Field(
        256,
        ge=8,
        title="Tokens per sequence",
        description="Longer sequences of the text are cut to this length. Memory grows with it.",
    )
    epochs: int = Field(1, ge=1, le=MOST_EPOCHS, title="Epochs", description="How many times the text is used.")
    batch_tokens: int = Field(1_024, gt=0, title="Batch size in tokens", description="Of one step of the optimizer.")
    lr_weight: float = Field(
        0.0,
        ge=0,
        title="Learning rate of weights",
        description="Of the latent weights, relative to the standard deviation of a layer's weights. 0: all weights "
        "keep their bits.",
    )
    lr_levels: float = Field(
        4e-3,
        ge=0,
        title="Learning rate of levels",
        description="Of the group parameters, relative to the standard deviation of a layer's weights.",
    )
    lr_act: float = Field(
        2e-3, ge=0, title="Learning rate of clips", description="Of the clips and knees of the activations."
    )
    lr_embeddings: float = Field(
        4e-3,
        ge=0,
        title="Learning rate of embeddings",
        description="Of the scales of embeddings with 4 bits, which move by 15% at most. 0: they stay fixed.",
    )
    loss: LogitLoss = Field(
        "forward_kl",
        title="Loss",
        description="How the student's distribution of next tokens is compared with the teacher's.",
    )
    feature_weight: float = Field(
        0.0,
        ge=0,
        title="Feature loss weight",
        description="Weight of the difference between the blocks' outputs of student and teacher in the loss.",
    )
    gram_weight: float = Field(
        0.0,
        ge=0,
        title="Token similarity loss weight",
        description="Weight of the difference between student and teacher in how similar the tokens of a text are to "
        "each other, after each block (MedAlign).",
    )
    start_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        title="Share of the starting weights",
        description="At the end this share of the weights and levels before training is blended into the trained ones.",
    )
    grad_clip: float = Field(1.0, gt=0, title="Gradient clip", description="Largest norm of a step's gradient.")
