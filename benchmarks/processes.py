"""Losses and seconds of a run on one process and on several, which share its work.

    python -m benchmarks.processes
    python -m benchmarks.processes --model smollm2-135m-instruct --tokens 4096 --processes 2

The same run is done by its workers, in stages 1 to 3 of a preset: by one process, by several, and once more by one
process on a single thread, which adds up in another order and is otherwise the same: what it changes is what rounding
changes. On a CPU the cores are shared, so nothing gets faster; on GPUs each process has one. Printed for each stage:
the sum of the losses and the largest difference of a block's, relative to those of the first run, and the seconds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.config import DEFAULT_MODEL, RunConfig, make_config
from lbllm.errors import LbllmError
from lbllm.events import BlockDone, RunFailed, StageDone
from lbllm.presets import PRESETS
from lbllm.runs.store import RunStore
from lbllm.sections import PAPER_STAGES, Stage, stage_name


def trained(config: RunConfig, root: Path, processes: int) -> tuple[dict[Stage, list[float]], dict[Stage, float]]:
    """The losses of the blocks after each stage, and the seconds of each stage."""
    store = RunStore(root)
    run = store.create(config)
    store.start(run.id, processes)
    losses: dict[Stage, list[float]] = {stage: [] for stage in config.stages}
    seconds: dict[Stage, float] = {}
    for stored in store.follow(run.id):
        if isinstance(stored.event, RunFailed):
            raise LbllmError(stored.event.message)
        if isinstance(stored.event, BlockDone):
            losses[stored.event.stage].append(stored.event.loss_after)
        if isinstance(stored.event, StageDone):
            seconds[stored.event.stage] = stored.event.seconds
            progress(f"{processes} processes, {stage_name(stored.event.stage)}: {stored.event.seconds:.0f} s")
    return losses, seconds


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let the processes that are started meanwhile compute on ``number`` threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def difference(losses: list[float], expected: list[float]) -> tuple[float, float]:
    """How far the sum of the losses is from the expected one, and the largest difference of one, both relative."""
    return sum(losses) / sum(expected) - 1, max(abs(b / a - 1) for a, b in zip(expected, losses, strict=True))


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--tokens", type=count, default=4_096, help="of each stage")
    parser.add_argument("--processes", type=count, default=2)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    settings = {"model": options.model, "corpus": options.corpus, "device": options.device, "stages": PAPER_STAGES}
    sizes = tuple(f"{stage}.tokens={options.tokens}" for stage in PAPER_STAGES)
    config = make_config(options.preset, settings, assignments=sizes)
    with tempfile.TemporaryDirectory() as scratch:
        one, alone = trained(config, Path(scratch) / "one", 1)
        several, shared = trained(config, Path(scratch) / "several", options.processes)
        with threads(1):
            control, single = trained(config, Path(scratch) / "control", 1)
    rows: list[dict[str, Any]] = []
    for stage in config.stages:
        mean, largest = difference(several[stage], one[stage])
        mean_rounding, largest_rounding = difference(control[stage], one[stage])
        rows.append(
            {
                "label": stage_name(stage),
                "blocks": len(one[stage]),
                "mean_change": mean,
                "largest_change": largest,
                "mean_rounding": mean_rounding,
                "largest_rounding": largest_rounding,
                "seconds_one": round(alone[stage], 1),
                "seconds_several": round(shared[stage], 1),
                "seconds_one_thread": round(single[stage], 1),
            }
        )
        print(
            f"{rows[-1]['label']}: sum of the losses {mean:+.3%}, one block at most {largest:.3%}; by rounding alone "
            f"{mean_rounding:+.3%} and {largest_rounding:.3%}; {rows[-1]['seconds_one']} s, "
            f"{rows[-1]['seconds_several']} s, and {rows[-1]['seconds_one_thread']} s on one thread"
        )
    if options.out:
        write_report(options.out, "processes", settings_of(options), rows)


if __name__ == "__main__":
    main()
