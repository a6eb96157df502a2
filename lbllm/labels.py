"""The names that people read: of formats, stages and models."""

from __future__ import annotations

from lbllm.config import RunConfig
from lbllm.sections import Format, Origin

FORMAT_NAMES: dict[Format, str] = {"w1+1": "W(1+1)", "w1": "W1"}

STAGE_NAMES: dict[Origin, str] = {
    "start": "The checkpoint gone on from",
    "ptq": "Stage 1: PTQ initialization",
    "wat": "Stage 2: weight-aware training",
    "aar": "Stage 3: activation-aware refinement",
    "e2e": "Stage 4: end to end",
}

CODE_BITS = {"w1+1": 2, "w1": 1}


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
