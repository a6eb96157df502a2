"""The settings with a widget on the Quantize page, and how each is shown; label, help and bounds are its Field's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lbllm.config import SETTINGS, label
from lbllm.fields import bounds, choices
from lbllm.labels import FORMAT_CHOICES, stage_numbers
from lbllm.machine import devices
from lbllm.sections import STAGES, WHOLE_ROW, stage_name


@dataclass(frozen=True)
class Setting:
    """One setting by its path in the document. ``offered``: the values of its buttons, for a Field that allows more
    values or lists none; ``menu``: a menu instead of buttons; ``step``: the step of a number; ``alone``: its label
    names the stage, because no heading above it does."""

    path: str
    offered: tuple[Any, ...] = ()
    show: Callable[[Any], str] = str
    menu: bool = False
    step: float = 0
    alone: bool = False

    @property
    def key(self) -> str:
        return f"quantize {self.path}"

    @property
    def label(self) -> str:
        return str(label(self.path) if self.alone else SETTINGS[self.path].title)

    @property
    def help(self) -> str | None:
        return SETTINGS[self.path].description

    @property
    def choices(self) -> tuple[Any, ...]:
        return self.offered or choices(SETTINGS[self.path])

    @property
    def number(self) -> dict[str, Any]:
        """The arguments of a number's widget."""
        least, greatest = bounds(SETTINGS[self.path])
        if SETTINGS[self.path].annotation is int:
            return {"min_value": least, "max_value": greatest, "step": self.step}
        limits = {"min_value": least, "max_value": greatest}
        as_floats = {name: None if bound is None else float(bound) for name, bound in limits.items()}
        return as_floats | {"step": self.step, "format": "%g"}


def size_label(group_size: int) -> str:
    """A group size in words."""
    return "row" if group_size == WHOLE_ROW else str(group_size)


def tokens_label(group_size: int) -> str:
    """A group of tokens in words."""
    return "token" if group_size == WHOLE_ROW else str(group_size)


FORMAT = Setting("quant.format", show=FORMAT_CHOICES.__getitem__)
GROUP_SIZE = Setting("quant.group_size", (16, 32, 64, 128, WHOLE_ROW), size_label)
PARAM_BITS = Setting("quant.param_bits")
EMBEDDING_BITS = Setting("quant.embedding_bits")
ACT_BITS = Setting("quant.act_bits")
KV_BITS = Setting("quant.kv_bits")
KV_GROUP = Setting("quant.kv_group_size", (32, 64, WHOLE_ROW), tokens_label)
KV_FIRST = Setting("quant.kv_first", step=1)
ACTIVATIONS = (ACT_BITS, Setting("quant.act_group_size", (32, 64, WHOLE_ROW), size_label), KV_BITS, KV_GROUP)
# Of a run from the teacher; one from a checkpoint has those of CONTINUATIONS.
STAGE_CHOICES = (*(STAGES[:count] for count in (1, 2, 3)), (*STAGES[:2], STAGES[3]), STAGES)
STAGE_SETTING = Setting("stages", STAGE_CHOICES, stage_numbers, menu=True)
TOKENS = Setting("wat.tokens", step=4096, alone=True)

_TOKENS, _COUNT, _RATE = 1024, 1, 0.001
ADVANCED: dict[str, tuple[Setting, ...]] = {
    "All stages": (
        Setting("seq_len", step=64),
        Setting("seed", step=_COUNT),
        Setting("device", devices()),
        Setting("stream_dtype"),
        KV_FIRST,
    ),
    stage_name("ptq"): (
        Setting("ptq.tokens", step=_TOKENS),
        Setting("ptq.sweeps", step=_COUNT),
        Setting("ptq.damping", step=_RATE),
    ),
    stage_name("wat"): (
        Setting("wat.epochs", step=_COUNT),
        Setting("wat.batch_tokens", step=_TOKENS),
        Setting("wat.streams"),
        Setting("wat.bitmap"),
        Setting("wat.lr_weight", step=_RATE),
        Setting("wat.lr_levels", step=_RATE),
        Setting("wat.lr_bitmap", step=_RATE),
    ),
    stage_name("aar"): (
        Setting("aar.tokens", step=_TOKENS),
        Setting("aar.epochs", step=_COUNT),
        Setting("aar.batch_tokens", step=_TOKENS),
        Setting("aar.lr_levels", step=_RATE),
        Setting("aar.lr_act", step=_RATE),
    ),
    stage_name("e2e"): (
        Setting("e2e.tokens", step=_TOKENS),
        Setting("e2e.epochs", step=_COUNT),
        Setting("e2e.batch_tokens", step=_TOKENS),
        Setting("e2e.seq_len", step=_TOKENS),
        Setting("e2e.loss", menu=True),
        Setting("e2e.feature_weight", step=_RATE),
        Setting("e2e.gram_weight", step=_RATE),
        Setting("e2e.start_share", step=0.05),
        Setting("e2e.lr_weight", step=_RATE),
        Setting("e2e.lr_levels", step=_RATE),
        Setting("e2e.lr_act", step=_RATE),
        Setting("e2e.lr_embeddings", step=_RATE),
    ),
}
WIDGETS = (
    *(FORMAT, GROUP_SIZE, PARAM_BITS, EMBEDDING_BITS, *ACTIVATIONS, STAGE_SETTING, TOKENS),
    *(setting for group in ADVANCED.values() for setting in group),
)
