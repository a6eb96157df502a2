"""The table of a finished run: its teacher, plain round-to-nearest at the same bits, and the model after each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lbllm.baselines.rtn import round_to_nearest
from lbllm.config import FORMAT_NAMES, STAGE_NAMES, Origin, RunConfig
from lbllm.evaluate import divergences
from lbllm.models import Teacher
from lbllm.pipeline import stage_model

CODE_BITS = {"w1+1": 2, "w1": 1}


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


def row_labels(config: RunConfig, teacher_precision: str) -> dict[str, str]:
    """The names of a run's models for people: its teacher, round-to-nearest, and what each stage gives."""
    labels = {"teacher": f"Teacher, {teacher_precision}"}
    labels["rtn"] = f"Round to nearest, W{CODE_BITS[config.quant.format]}A16"
    return labels | {stage: f"{STAGE_NAMES[stage]}, {format_name(config, stage)}" for stage in config.origins}


def format_name(config: RunConfig, stage: Origin) -> str:
    """What is quantized after a stage, and to how many bits: W(1+1)A4KV4."""
    quant = config.precision(stage)
    weights = f"{FORMAT_NAMES[quant.format]}A{quant.act_bits}"
    return weights if quant.kv_bits == 16 else f"{weights}KV{quant.kv_bits}"
