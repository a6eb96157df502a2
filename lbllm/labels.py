"""The names that people read: of formats, stages and models."""

from __future__ import annotations

from pathlib import Path

from lbllm.config import SETTINGS, RunConfig, label
from lbllm.sections import WHOLE_ROW, Format, Origin, Stage, stage_name, stage_number

FORMAT_NAMES: dict[Format, str] = {"w1+1": "W(1+1)", "w1": "W1", "w1+1+1": "W(1+1+1)"}


def group_name(size: int) -> str:
    """A group size for people: "groups of 64"."""
    return "whole rows" if size == WHOLE_ROW else f"groups of {size}"


STAGE_NAMES: dict[Origin, str] = {
    "start": str(SETTINGS["start"].title),
    "ptq": f"{stage_name('ptq')}: PTQ initialization",
    "wat": f"{stage_name('wat')}: weight-aware training",
    "aar": f"{stage_name('aar')}: activation-aware refinement",
    "e2e": f"{stage_name('e2e')}: end to end",
}

# The formats as the buttons of a setting; its help says more.
FORMAT_CHOICES: dict[Format, str] = FORMAT_NAMES | {"w1+1+1": "W(1+1+1), not LBLLM's own"}
THREE_PLANES = (
    "W(1+1+1), which is not LBLLM's own format, has three bits for each weight. They select one of eight levels: a "
    "table for the whole layer, times a scale for each group."
)

# Bits of a weight's code: the planes of a format.
CODE_BITS: dict[Format, int] = {"w1+1": 2, "w1": 1, "w1+1+1": 3}
# What ``bits_per_weight`` counts: the binarized layers alone, group parameters included.
BINARIZED_BITS = "bits per binarized weight"


def bits_name(*, packed: bool) -> str:
    """What the bits of a loaded model (``Loaded.bpw``) are counted per."""
    return BINARIZED_BITS if packed else "bits per weight in memory"


def stage_numbers(stages: tuple[Stage, ...]) -> str:
    """Stages by their numbers: "1–3", "1–2, 4"."""
    runs: list[list[int]] = []
    for number in map(stage_number, stages):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def row_labels(config: RunConfig, teacher_precision: str) -> dict[str, str]:
    """The names of a run's models for people: its teacher, round-to-nearest, and what each stage gives."""
    labels = {"teacher": f"Teacher, {teacher_precision}"}
    labels["rtn"] = f"Round to nearest, W{CODE_BITS[config.quant.format]}A16"
    return labels | {stage: f"{STAGE_NAMES[stage]}, {format_name(config, stage)}" for stage in config.origins}


def run_facts(config: RunConfig) -> dict[str, str]:
    """What a run makes from what, by the labels of the settings; a path is shortened to its last part."""
    quant = config.quant

    def short(name: str) -> str:
        return Path(name).name if Path(name).is_absolute() else name

    def size(value: int) -> str:
        return "whole row" if value == WHOLE_ROW else str(value)

    facts = {"model": short(config.model), "quant": format_name(config, config.stages[-1])}
    facts |= {"quant.group_size": size(quant.group_size), "quant.param_bits": str(quant.param_bits)}
    if quant.embedding_bits < 16:
        facts["quant.embedding_bits"] = str(quant.embedding_bits)
    facts |= {"corpus": short(config.corpus), "tokens": f"{config.tokens:,}", "stages": stage_numbers(config.stages)}
    facts |= {"seed": str(config.seed)}
    if config.start is not None:
        facts["start"] = short(config.start)
    return {label(path) or path.capitalize(): text for path, text in facts.items()}


def format_name(config: RunConfig, stage: Origin) -> str:
    """What is quantized after a stage, and to how many bits: W(1+1)A4KV4."""
    quant = config.precision(stage)
    weights = f"{FORMAT_NAMES[quant.format]}A{quant.act_bits}"
    return weights if quant.kv_bits == 16 else f"{weights}KV{quant.kv_bits}"
