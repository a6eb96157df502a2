"""The table of a finished run: its teacher, plain round-to-nearest at the same bits, and the model after each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lbllm.config import STAGE_NAMES, RunConfig, Stage
from lbllm.evaluate import divergence, round_to_nearest
from lbllm.models import Teacher
from lbllm.pipeline import stage_model

CODE_BITS = {"w1+1": 2, "w1": 1}


@dataclass(frozen=True)
class TableRow:
    """One model's figures; KL (nats a token) and agreement: to the teacher. ``what``: teacher, rtn, ptq, wat, aar."""

    what: str
    label: str
    perplexity: float
    kl: float
    top1_agreement: float
    tokens: int


def stages_table(
    config: RunConfig,
    folder: Path,
    teacher: Teacher,
    sequences: Tensor,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[TableRow]:
    """Evaluate the models of the run in ``folder`` on windows of token ids (n, T), one after another.

    Round-to-nearest has as many code bits and the group size of the run's default format and leaves activations alone.
    ``on_progress(what, done, total)`` counts windows. Only the teacher and one student are in memory at a time.
    """

    def watch(what: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(what, done, total) if on_progress is not None else None

    quant = config.quant
    bits = CODE_BITS[quant.format]
    student = round_to_nearest(teacher.model, bits, quant.group_size)
    result = divergence(teacher.model, student, sequences, on_progress=watch("rtn"))
    del student
    yield TableRow("teacher", f"Teacher, {teacher.precision}", result.teacher_perplexity, 0.0, 1.0, result.tokens)
    label = f"Round to nearest, W{bits}A16"
    yield TableRow("rtn", label, result.student_perplexity, result.kl, result.top1_agreement, result.tokens)
    for stage in config.stages:
        model = stage_model(config, folder, stage, teacher)
        result = divergence(teacher.model, model, sequences, on_progress=watch(stage))
        del model
        label = f"{STAGE_NAMES[stage]}, {_precision(config, stage)}"
        yield TableRow(stage, label, result.student_perplexity, result.kl, result.top1_agreement, result.tokens)


def _precision(config: RunConfig, stage: Stage) -> str:
    quant = config.quant
    weights = quant.format.upper() if quant.format == "w1" else "W(1+1)"
    return f"{weights}A{quant.act_bits}KV{quant.kv_bits}" if stage == "aar" else f"{weights}A16"
