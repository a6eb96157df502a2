"""Losses and seconds of a run on one process and on several, which share its work.

    python -m benchmarks.processes
    python -m benchmarks.processes --model smollm2-135m-instruct --tokens 4096 --processes 2

The same run is done twice by its workers, in stages 1 to 3 of a preset: by one process, and by several. On a CPU the
cores are shared, too, so nothing gets faster; on GPUs each process has one. Printed for each stage: the largest
difference between the losses of a block, relative to the loss with one process, and the seconds.
"""

from __future__ import annotations

import tempfile
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
    rows: list[dict[str, Any]] = []
    for stage in config.stages:
        changes = [abs(b / a - 1) for a, b in zip(one[stage], several[stage], strict=True)]
        rows.append(
            {
                "label": stage_name(stage),
                "blocks": len(changes),
                "mean_change": sum(several[stage]) / sum(one[stage]) - 1,
                "largest_change": max(changes),
                "seconds_one": round(alone[stage], 1),
                "seconds_several": round(shared[stage], 1),
            }
        )
        print(
            f"{rows[-1]['label']}: sum of the losses {rows[-1]['mean_change']:+.3%}, one block at most "
            f"{rows[-1]['largest_change']:.3%}; {rows[-1]['seconds_one']} s and {rows[-1]['seconds_several']} s"
        )
    if options.out:
        write_report(options.out, "processes", settings_of(options), rows)


if __name__ == "__main__":
    main()
