"""A teacher quantized by another method, as one of the models of an evaluation.

    name = Baseline("gptq", "smollm2-135m-instruct", 3, 128).name      "gptq:3:128:smollm2-135m-instruct"
    load_any(name)

Its dense weights need memory as the teacher's do. It is no checkpoint: only evaluations know these names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lbllm.baselines.methods import METHODS, quantize_blocks
from lbllm.chat.pool import Loaded, load_model
from lbllm.labels import group_name
from lbllm.models.blocks import context_length, share_copy
from lbllm.texts.corpus import load_corpus

Kind = Literal["round-to-nearest", "gptq"]

# What a calibrated method learns from: text of this program, so that it can be had for every teacher.
CORPUS = "embedded"
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 8_192, 512
_METHODS: dict[Kind, str] = {"round-to-nearest": "rtn", "gptq": "gptq"}
_NAME = re.compile(rf"({'|'.join(get_args(Kind))}):([1-8]):(-1|[1-9]\d{{0,6}}):(.+)", re.DOTALL)
_USUAL_SIZES = ((2, 128), (2, 64), (2, 32), (3, 128), (4, 128))


@dataclass(frozen=True)
class Baseline:
    """``teacher`` with all linear layers of its blocks on 2^``bits`` even levels in each group of weights."""

    kind: Kind
    teacher: str
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """Its name in an evaluation."""
        return f"{self.kind}:{self.bits}:{self.group_size}:{self.teacher}"

    @property
    def title(self) -> str:
        """The model as people read it."""
        return f"{METHODS[_METHODS[self.kind]].name}, W{self.bits}A16, {group_name(self.group_size)}"


def baseline(name: str) -> Baseline | None:
    """What the name of a baseline says; None for the name of another model."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    kind = next(one for one in get_args(Kind) if one == found[1])
    return Baseline(kind, found[4], int(found[2]), int(found[3]))


def gptq_beside(teacher: str, bits: float) -> Baseline:
    """GPTQ in the usual size that is nearest to so many stored bits per weight."""
    code, group_size = min(_USUAL_SIZES, key=lambda one: abs(one[0] + (16 + one[0]) / one[1] - bits))
    return Baseline("gptq", teacher, code, group_size)


def load_any(name: str, on_block: Callable[[int, int], None] | None = None) -> Loaded:
    """``load_model``, also for the name of a baseline: the teacher is then quantized now, with the method's best known
    options, and ``on_block(done, all)`` is called after each block. Raises LbllmError."""
    found = baseline(name)
    if found is None:
        return load_model(name)
    loaded = load_model(found.teacher)
    length = min(CALIBRATION_LENGTH, context_length(loaded.model) or CALIBRATION_LENGTH)
    text = load_corpus(CORPUS, loaded.tokenizer, seq_len=length, tokens=CALIBRATION_TOKENS).sequences
    chosen, model = METHODS[_METHODS[found.kind]], share_copy(loaded.model)
    settings = chosen.settings(bits=found.bits, group_size=found.group_size)
    stored = quantize_blocks(model, text, chosen, settings, on_block=on_block)
    return replace(loaded, model=model, precision=found.title, bpw=stored.bpw)
