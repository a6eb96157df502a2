"""A sweep: one run for each combination of some settings' values, queued one after the other.

    axes = dict(parse_axis(text) for text in ("quant.group_size=16,32", "quant.param_bits=4,8"))
    started = queue(store, planned(config, axes), "small groups")

All runs of a sweep have its name as a tag, so that the list shows and compares them together.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbllm.config import SETTINGS, RunConfig, label, parse_config, setting_name
from lbllm.errors import ConfigError, LbllmError
from lbllm.json_input import shortened, shown
from lbllm.runs.compared import setting_text, used
from lbllm.runs.deleted import remove
from lbllm.runs.notes import Note, write_tags
from lbllm.runs.store import Run, RunStore
from lbllm.sections import STAGES, stage_name

MOST_RUNS = 32  # each has a process that waits for its turn
# What makes another run of it, not another setting.
_NOT_SWEPT = ("schema_version", "preset", "start")

Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Planned:
    """One run of a sweep. ``choice``: its own value of each setting that the sweep varies."""

    config: RunConfig
    choice: dict[str, Any]

    @property
    def name(self) -> str:
        """What the run is called: its choice, as people read it."""
        return ", ".join(f"{label(path)} {setting_text(path, value)}" for path, value in self.choice.items())


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """The path of a setting and its values: "quant.group_size=16,32", or with values that are lists themselves
    'stages=[["ptq"], ["ptq", "wat"]]'. Raises ConfigError."""
    path, separator, values = text.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"{shown(text)}: expected setting=value,value, for example quant.group_size=16,32")
    try:
        listed = json.loads(values) if values.strip().startswith("[") else [_value(one) for one in values.split(",")]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown(text)}: the values are not valid JSON ({error})") from None
    return path.strip(), listed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def planned(config: RunConfig, axes: Axes) -> list[Planned]:
    """The runs of a sweep around ``config``: each combination of the ``axes``' values, the last axis fastest. Of
    combinations that make the same run (a setting may be read by some of them only), one is kept.

    Raises ConfigError, naming setting and value, for a setting that can't be varied or that no run reads, an axis
    without values, values that a run can't have, and more than ``MOST_RUNS`` runs.
    """
    _check(config, axes)
    count = 1
    for path, values in axes.items():
        if not values:
            raise ConfigError(f"{setting_name(path)} has no values to try; give at least one")
        count *= len({json.dumps(value) for value in values})
    if count > MOST_RUNS:
        raise ConfigError(
            f"the sweep has {count:,} runs, and at most {MOST_RUNS} can be queued at once; give fewer values"
        )
    base = config.model_dump(mode="json")
    made: dict[str, Planned] = {}
    for combination in itertools.product(*axes.values()):
        document = copy.deepcopy(base)
        for path, value in zip(axes, combination, strict=True):
            *sections, name = path.split(".")
            place = document
            for section in sections:
                place = place[section]
            place[name] = value
        one = Planned(parse_config(document), dict(zip(axes, combination, strict=True)))
        made.setdefault(json.dumps(used(one.config)), one)
    return list(made.values())


def _check(config: RunConfig, axes: Axes) -> None:
    """Raise ConfigError for a setting that a sweep around ``config`` can't vary."""
    if not axes:
        raise ConfigError("the sweep varies no setting; choose one and its values, for example quant.group_size=16,32")
    fixed = config.fixed_by_start()
    chosen = {tuple(value) for value in axes.get("stages", ()) if isinstance(value, list | tuple)} or {config.stages}
    for path in axes:
        section = path.partition(".")[0]
        if path not in SETTINGS or path in _NOT_SWEPT:
            raise ConfigError(f"{shown(path)} is not a setting that a sweep can vary; docs/settings.md lists them")
        if path in fixed:
            raise ConfigError(f"{setting_name(path)} is decided by the starting checkpoint {config.start}")
        if section in STAGES and not any(section in stages for stages in chosen):
            raise ConfigError(f"{setting_name(path)}: {stage_name(section)} is not among the stages of these runs")


def queue(store: RunStore, runs: Sequence[Planned], name: str, processes: int = 1) -> list[Run]:
    """Create all runs of a sweep with its name as a tag, and start them in this order: each waits for its turn.

    Raises RunError for a name that can't be a tag, ResourceError where the store can't be written; no run of the sweep
    is then left.
    """
    made: list[Run] = []
    try:
        for one in runs:
            made.append(store.create(one.config, shortened(one.name, 200)))
            write_tags(store, made[-1].id, [name])
    except LbllmError:
        for run in made:
            store.delete(run.id)
            remove(store, run.id)
        raise
    for run in made:
        store.start(run.id, processes)
    return [store.get(run.id) for run in made]


def free_name(notes: Mapping[str, Note]) -> str:
    """A tag for the next sweep that no run has: "sweep 1", "sweep 2" and so on."""
    used_tags = {tag.casefold() for note in notes.values() for tag in note.tags}
    return next(name for name in (f"sweep {number}" for number in itertools.count(1)) if name not in used_tags)
