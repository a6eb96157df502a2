"""Runs laid side by side: the settings that differ, and which are the best at their size.

Perplexity and KL mean something beside those of the same teacher on the same text, and nowhere else: ``groups`` says
which runs share both, and ``points`` takes one group at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lbllm.config import RunConfig, label, leaves
from lbllm.errors import RunError
from lbllm.json_input import shortened
from lbllm.labels import BINARIZED_BITS, FORMAT_NAMES, stage_numbers
from lbllm.runs.listed import Listed
from lbllm.sections import STAGES, WHOLE_ROW, Stage, stage_name

Cost = Literal["bits", "size", "speed"]
Quality = Literal["perplexity", "kl"]
COSTS: dict[Cost, str] = {
    "bits": BINARIZED_BITS[0].upper() + BINARIZED_BITS[1:],
    "size": "Size of the checkpoint, MB",
    "speed": "Tokens per second",
}
QUALITIES: dict[Quality, str] = {"perplexity": "Perplexity", "kl": "KL to the teacher, nats per token"}
NOT_USED = "not used"
# What says nothing of a result.
_HIDDEN = ("schema_version", "preset")
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class Group:
    """Runs whose perplexities can be compared: of one ``teacher`` (as ``Listed.teacher``), measured on one ``text``."""

    teacher: str
    text: str
    model: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A run's place in a plot: what it costs and how good it is, in the units of ``COSTS`` and ``QUALITIES``."""

    run: str
    x: float
    y: float


def find(listed: Sequence[Listed], run_ids: Sequence[str]) -> list[Listed]:
    """The runs of these ids, each once, in the order of the ids. Raises RunError for an unknown one."""
    known = {one.run.id: one for one in listed}
    for run_id in run_ids:
        if run_id not in known:
            raise RunError(f"no run {shortened(run_id)!r}; `python -m lbllm runs list` shows all runs")
    return [known[run_id] for run_id in dict.fromkeys(run_ids)]


def setting_text(path: str, value: Any) -> str:
    """A setting's value as people read it."""
    if value is None:
        return "none"
    if path.endswith("group_size") and value == WHOLE_ROW:
        return "whole row"
    if path == "quant.format":
        return FORMAT_NAMES[value]
    if path == "stages":
        return stage_numbers(tuple(value))
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if not value:
        return "none"
    if isinstance(value, list):
        return shortened(", ".join(map(str, value)), _LONGEST_VALUE)
    count = f"{len(value)} {'pattern' if len(value) == 1 else 'patterns'}: "
    return count + shortened(json.dumps(value, ensure_ascii=False)[1:-1], _LONGEST_VALUE)


def used(config: RunConfig) -> dict[str, str]:
    """Every setting that decides a run's result by its path, as people read it; ``NOT_USED`` where no stage of the run
    reads it."""
    values = leaves(config.model_copy(update={"quant": config.precision(config.stages[-1])}))
    unread = {f"{stage}." for stage in STAGES if stage not in config.stages}

    def text(path: str, value: Any) -> str:
        return NOT_USED if any(path.startswith(stage) for stage in unread) else setting_text(path, value)

    return {path: text(path, value) for path, value in values.items() if path not in _HIDDEN}


def differing(listed: Sequence[Listed]) -> tuple[dict[str, list[str]], int]:
    """The settings that differ between the runs, by their paths, with each run's value ("?" where its settings can't
    be read); and how many are the same in all."""
    found = [used(one.config) if one.config is not None else None for one in listed]
    known = [values for values in found if values is not None]
    paths = list(known[0]) if known else []
    different = [path for path in paths if len({values[path] for values in known}) > 1]
    rows = {path: ["?" if values is None else values[path] for values in found] for path in different}
    return rows, len(paths) - len(different)


def setting_label(path: str) -> str:
    """A setting's label for a table of several sections: "Stage 2, epochs"."""
    return label(path) or path


def groups(listed: Sequence[Listed]) -> list[Group]:
    """The teachers and texts on which the runs were measured, the one with the most runs first."""
    found: dict[tuple[str, str], list[Listed]] = {}
    for one in listed:
        for text in one.measured:
            found.setdefault((one.teacher, text), []).append(one)
    made = [
        Group(teacher, text, members[0].model or "unknown", tuple(one.run.id for one in members))
        for (teacher, text), members in found.items()
    ]
    return sorted(made, key=lambda group: -len(group.runs))


def points(listed: Sequence[Listed], group: Group, cost: Cost, quality: Quality) -> list[Point]:
    """The runs of a group of which both numbers are known and finite."""
    made = []
    for one in listed:
        x = {"bits": one.bits, "size": None if one.size is None else one.size / 1e6, "speed": one.speed}[cost]
        event = one.measured.get(group.text) if one.run.id in group.runs else None
        y = None if event is None else event.perplexity if quality == "perplexity" else event.kl
        if x is not None and y is not None and abs(x) < float("inf") and abs(y) < float("inf"):
            made.append(Point(one.run.id, x, y))
    return made


def frontier(made: Sequence[Point], *, more_is_better: bool = False) -> list[Point]:
    """The points that no other point beats: none is at least as good in both numbers and better in one. In the order
    of x. Less is better in y, and in x unless ``more_is_better``."""
    sign = -1 if more_is_better else 1
    kept: list[Point] = []
    for point in sorted(made, key=lambda point: (sign * point.x, point.y)):
        if not kept or point.y < kept[-1].y or (point.x, point.y) == (kept[-1].x, kept[-1].y):
            kept.append(point)
    return kept[::sign]


def missing(listed: Sequence[Listed], made: Sequence[Point]) -> list[Listed]:
    """The runs that have no point."""
    drawn = {point.run for point in made}
    return [one for one in listed if one.run.id not in drawn]


def cautions(listed: Sequence[Listed]) -> list[str]:
    """What can't be compared between these runs, in sentences."""
    said = []
    known = {one.teacher: one.model or "unknown" for one in listed if one.config is not None}
    if len(known) > 1:
        named = list(dict.fromkeys(known.values()))
        more = f" ({', '.join(named)})" if len(named) > 1 else ""
        said.append(
            f"These runs have {len(known)} different teachers{more}. Perplexity and KL are compared only between runs "
            "of one teacher."
        )
    texts = {text for one in listed for text in one.measured}
    if len(texts) > 1:
        said.append(
            f"These runs were measured on {len(texts)} different texts. Perplexity and KL are compared only on one "
            "text at a time."
        )
    machines = {one.machine for one in listed if one.machine is not None}
    if len(machines) > 1:
        said.append(f"Their speed was measured on {len(machines)} different machines and can't be compared.")
    return said


def loss_caution(listed: Sequence[Listed], stage: Stage) -> str | None:
    """Why the losses of a stage can't be compared between these runs, as a sentence; None if they can."""
    configs = [one.config for one in listed if one.config is not None and stage in one.config.stages]
    if len({one.teacher for one in listed if one.config is not None}) > 1:
        return "The runs have different teachers: compare the shapes of the curves, not their heights."
    losses = {getattr(getattr(config, stage), "loss", "") for config in configs}
    if len(losses) > 1:
        return (
            f"{stage_name(stage)} has different losses here ({', '.join(sorted(losses))}): heights can't be compared."
        )
    return None
