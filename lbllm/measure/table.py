"""The table of a finished run: its teacher, plain round-to-nearest at the same bits, and the model after each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lbllm.baselines.rtn import round_to_nearest
from lbllm.config import RunConfig
from lbllm.labels import CODE_BITS, row_labels
from lbllm.measure.perplexity import divergences
from lbllm.models.teacher import Teacher
from lbllm.pipeline.packed_model import stage_model


@dataclass(frozen=True)
class TableRow:
    """One model's figures; KL (nats a token) and agreement: to the teacher. ``what``: teacher, rtn, start, or
    a stage."""

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
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TableRow]:
    """Evaluate the models of the run in ``folder`` on windows of token ids (n, T), side by side.

    Round-to-nearest has as many code bits and the group size of the run's default format and leaves activations alone.
    Its dense weights are what this needs in memory besides the teacher; the stages' models are packed.
    """
    quant = config.quant
    labels = row_labels(config, teacher.precision)
    students = {"rtn": round_to_nearest(teacher.model, CODE_BITS[quant.format], quant.group_size)}
    for stage in config.origins:
        students[stage] = stage_model(config, folder, stage, teacher)
    found = divergences(teacher.model, list(students.values()), sequences, on_progress=on_progress)
    rows = [TableRow("teacher", labels["teacher"], found[0].teacher_perplexity, 0.0, 1.0, found[0].tokens)]
    for what, result in zip(students, found, strict=True):
        figures = (result.student_perplexity, result.kl, result.top1_agreement, result.tokens)
        rows.append(TableRow(what, labels[what], *figures))
    return rows
