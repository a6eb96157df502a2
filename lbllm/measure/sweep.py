"""What a sweep costs before it starts, and what keeps it from starting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage

from transformers import PreTrainedModel

from lbllm.checkpoints.find import find_teacher
from lbllm.errors import LbllmError
from lbllm.measure.estimate import Estimate, check_memory, estimate
from lbllm.measure.needs import STREAMS
from lbllm.models.teacher import skeleton
from lbllm.runs.sweep import Planned
from lbllm.texts.catalogue import check_available
from lbllm.units import size

WAITING_BYTES = 25_000_000  # memory of a worker that waits for its turn, measured


@dataclass(frozen=True)
class SweepEstimate:
    """The estimate of each run, None where it can't be made; what the runs take one after the other, in seconds; the
    disk space that all their files take in bytes; and why the sweep can't start, in sentences."""

    runs: tuple[Estimate | None, ...]
    seconds: float
    disk_bytes: int
    problems: tuple[str, ...]


def estimate_sweep(
    runs: Sequence[Planned],
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    rate: float | None = None,
    ignore_memory: bool = False,
) -> SweepEstimate:
    """Estimate a sweep whose files will lie in ``folder``, which exists. ``model``: the skeleton of the only model, if
    it is known; ``rate``: as for ``estimate``. Raises nothing: what is wrong is among the ``problems``."""
    models: dict[str, PreTrainedModel] = {} if model is None else {runs[0].config.model: model}
    reasons: dict[str, list[str]] = {}

    def estimated(one: Planned) -> Estimate | None:
        result = None
        try:
            name = one.config.model
            check_available(one.config.corpus)
            if name not in models:
                find_teacher(name)
                models[name] = skeleton(name)
            result = estimate(one.config, model=models[name], rate=rate)
            if not ignore_memory:
                check_memory(_beside_others(result, len(runs)), one.config.device)
        except LbllmError as error:
            reasons.setdefault(str(error), []).append(one.name)
        return result

    found = tuple(estimated(one) for one in runs)
    known = [result for result in found if result is not None]
    # Hidden states in files are gone when their run ends; all other files stay.
    streams = [result.needs.disk.get(STREAMS, 0) for result in known]
    disk = sum(sum(result.needs.disk.values()) for result in known) - sum(streams) + max(streams, default=0)
    problems = [_problem(reason, names, len(runs)) for reason, names in reasons.items()]
    free = disk_usage(folder).free
    if disk > free:
        problems.append(
            f"the {len(runs)} runs need about {size(disk)} of disk space and {size(free)} are free in {folder}. Give "
            "fewer values, free some, or set LBLLM_HOME to a folder on another disk"
        )
    return SweepEstimate(found, sum(result.seconds for result in known), disk, tuple(problems))


def _beside_others(result: Estimate, runs: int) -> Estimate:
    """The estimate of a run while the workers of the others wait."""
    waiting = {"waiting runs": WAITING_BYTES * (runs - 1)} if runs > 1 else {}
    return replace(result, needs=replace(result.needs, memory=result.needs.memory | waiting))


def _problem(reason: str, names: list[str], runs: int) -> str:
    if len(names) == runs:
        return reason
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{reason} ({'; '.join(names[:2])}{more})"
