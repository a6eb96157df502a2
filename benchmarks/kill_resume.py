"""Kill a run at random moments, resume it each time, and compare its checkpoint with an uninterrupted run's.

    python -m benchmarks.kill_resume --model smollm2-135m-instruct --corpus embedded --preset preview --kills 10

The uninterrupted run goes first and gives the timeline. Moments are drawn uniformly over its time, so they hit
loading, training, writing and packing in proportion to their time. Each moment is stored as a delay after an event; the
second run is killed by SIGKILL at this point, and resumed. Printed are the kills and the checkpoint's files; the exit
code is 1 where a file differs.
"""

from __future__ import annotations

import bisect
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message
from benchmarks.report import settings_of, write_report
from lbllm.config import DEFAULT_MODEL, RunConfig, make_config
from lbllm.events import Event, RunFailed, RunQueued, RunStarted, StoredEvent
from lbllm.runs.store import RunStore

Place = tuple[object, ...]


def place(event: Event) -> Place:
    """Where in a run an event stands, without what was measured there: kind, stage, block, step, layer."""
    return (event.kind, *(getattr(event, key, None) for key in ("stage", "block", "step", "layer")))


def words(where: Place) -> str:
    kind, stage, block, step, layer = where
    parts = [str(kind).replace("_", " "), stage, None if block is None else f"block {block}"]
    return ", ".join(
        str(part) for part in (*parts, None if step is None else f"step {step}", layer) if part is not None
    )


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finish(store: RunStore, run_id: str, worker: subprocess.Popen[bytes]) -> list[StoredEvent]:
    """Wait for the end of a run; its events. Exits with the reason where it isn't done."""
    worker.wait()
    events = store.events(run_id)
    state = store.get(run_id).state
    if state != "done":
        last = events[-1].event
        reason = last.message if isinstance(last, RunFailed) else f"see {store.root / run_id / 'worker.log'}"
        sys.exit(f"the run ended as {state}: {reason}")
    return events


def kill_at(
    store: RunStore, run_id: str, worker: subprocess.Popen[bytes], order: dict[Place, int], index: int, wait: float
) -> bool:
    """Kill the worker ``wait`` seconds after it has come to event ``index`` of the timeline, or at the event after that
    where this comes sooner, the machine being faster now; False where it has ended.

    Only the events of this worker count: those from the last RunQueued on.
    """
    seq = max(stored.seq for stored in store.events(run_id) if isinstance(stored.event, RunQueued)) - 1
    latest, since = -1, time.monotonic()
    while worker.poll() is None and (latest < index or (latest == index and time.monotonic() < since + wait)):
        for stored in store.events(run_id, seq):
            seq = stored.seq
            if order.get(place(stored.event), -1) > latest:
                latest, since = order[place(stored.event)], time.monotonic()
        time.sleep(0.005)
    worker.kill()
    worker.wait()
    return store.get(run_id).state == "interrupted"


def compare(store: RunStore, config: RunConfig, kills: int, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """Run, run again with kills, print the tables and the verdict; the seconds of the first run, and the rows of both
    tables."""
    whole = store.create(config, "uninterrupted")
    timeline = finish(store, whole.id, store.start(whole.id))
    times = [stored.time - timeline[0].time for stored in timeline]
    print(f"uninterrupted run: {times[-1]:.1f} s, {len(timeline)} events", flush=True)
    order = {place(stored.event): index for index, stored in enumerate(timeline)}

    rng = random.Random(seed)
    killed = store.create(config, "killed and resumed")
    worker = store.start(killed.id)
    killings = []
    for moment in sorted(rng.uniform(0, times[-1]) for _ in range(kills)):
        index = bisect.bisect_right(times, moment) - 1
        if not kill_at(store, killed.id, worker, order, index, moment - times[index]):
            break
        last = store.events(killed.id)[-1]
        killings.append((moment, last))
        worker = store.resume(killed.id)
    events = finish(store, killed.id, worker)

    rows: list[dict[str, Any]] = []
    for number, (moment, last) in enumerate(killings, 1):
        end = killings[number][1].seq if number < len(killings) else events[-1].seq
        started = [s.event for s in events[last.seq : end] if isinstance(s.event, RunStarted)]
        found = started[0].resumed_blocks if started else "killed before it looked"
        kill = {"part": "kills", "label": str(number), "at": moment / times[-1], "last_event": words(place(last.event))}
        rows.append(kill | {"blocks_found": found})
    cells = [[row["label"], f"{row['at']:.0%}", row["last_event"], str(row["blocks_found"])] for row in rows]
    print("\n" + markdown.table(["kill", "at", "last event before it", "blocks found on resume"], cells))

    files = compare_files(hashes(whole.folder / "checkpoint"), hashes(killed.folder / "checkpoint"))
    cells = [
        [file["label"], file["uninterrupted"], file["resumed"], "equal" if file["equal"] else "DIFFERENT"]
        for file in files
    ]
    print("\n" + markdown.table(["file", "uninterrupted", "killed and resumed", ""], cells))
    verdict = f"all {len(files)} files equal" if all_equal(files) else "NOT EQUAL"
    print(f"\n{len(killings)} of {kills} kills; {verdict}")
    return times[-1], rows + files


def compare_files(first: dict[str, str], second: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each file of two checkpoints, with the beginning of its hash in each."""
    rows: list[dict[str, Any]] = []
    for name in sorted(first | second):
        one, two = first.get(name, "missing"), second.get(name, "missing")
        rows.append({"part": "files", "label": name, "uninterrupted": one[:12], "resumed": two[:12]})
        rows[-1]["equal"] = one == two
    return rows


def all_equal(rows: list[dict[str, Any]]) -> bool:
    """Whether there are files, all of them equal."""
    files = [row["equal"] for row in rows if row["part"] == "files"]
    return bool(files) and all(files)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--preset", default="preview")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--root", type=Path, help="keep the runs in this folder (default: a temporary one)")
    options = parser.parse_args()
    config = make_config(options.preset, {"model": options.model, "corpus": options.corpus}, tuple(options.assignments))
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as temporary:
        store = RunStore(options.root or Path(temporary))
        seconds, rows = compare(store, config, options.kills, options.seed)
    if options.out:
        write_report(
            options.out, "kill_resume", settings_of(options) | {"uninterrupted_seconds": round(seconds, 1)}, rows
        )
    sys.exit(0 if all_equal(rows) else 1)


if __name__ == "__main__":
    main()
