"""The table of a finished run: its teacher, plain round-to-nearest at the same bits, and the model after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from lbllm.baselines.rtn import round_to_nearest
from lbllm.config import RunConfig
from lbllm.labels import CODE_BITS, row_labels
from lbllm.measure.perplexity import divergences
from lbllm.models.teacher import Teacher
from lbllm.sections import Origin


@dataclass(frozen=True)
class TableRow:
    """One model's figures; KL (nats per token) and agreement are to the teacher. ``what``: teacher, rtn, start, or
    a stage."""

    what: str
    label: str
    perplexity: float
    kl: float
    top1_agreement: float
    tokens: int


def stages_table(
    config: RunConfig,
    teacher: Teacher,
    stages: Mapping[Origin, PreTrainedModel],
    sequences: Tensor,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TableRow]:
    """Evaluate the models of a run on windows of token ids (n, T), side by side. ``stages``: its packed models.

    Round-to-nearest has as many code bits and the group size of the run's default format and does not quantize
    activations. Its dense weights need memory besides the teacher's; the models of the stages are packed.
    """
    quant = config.quant
    labels = row_labels(config, teacher.precision)
    rounded = round_to_nearest(teacher.model, CODE_BITS[quant.format], quant.group_size)
    students = {"rtn": rounded} | {str(stage): model for stage, model in stages.items()}
    found = divergences(teacher.model, list(students.values()), sequences, on_progress=on_progress)
    rows = [TableRow("teacher", labels["teacher"], found[0].teacher_perplexity, 0.0, 1.0, found[0].tokens)]
    for what, result in zip(students, found, strict=True):
        figures = (result.student_perplexity, result.kl, result.top1_agreement, result.tokens)
        rows.append(TableRow(what, labels[what], *figures))
    return rows
