"""Kill a run at random moments, resume it each time, and compare its checkpoint with an uninterrupted run's.

    python -m benchmarks.kill_resume --model smollm2-135m-instruct --corpus embedded --preset preview --kills 10

The uninterrupted run goes first and gives the timeline. Moments are drawn evenly over its time, so they fall into
loading, training, writing and packing as these take time. Each one becomes "so long after that event"; the second run
is killed by SIGKILL when it comes there, and resumed. Prints the tables for docs/results.md; exit code 1 where a file
differs.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def compare(store: RunStore, config: RunConfig, kills: int, seed: int) -> bool:
    """Run, run again with kills, print the tables and the verdict; whether all files are equal."""
    whole = store.create(config, "uninterrupted")
    timeline = finish(store, whole.id, store.start(whole.id))
    times = [stored.time - timeline[0].time for stored in timeline]
    print(f"uninterrupted run: {times[-1]:.1f} s, {len(timeline)} events", flush=True)
    order = {place(stored.event): index for index, stored in enumerate(timeline)}

    rng = random.Random(seed)
    killed = store.create(config, "killed and resumed")
    worker = store.start(killed.id)
    rows = []
    for moment in sorted(rng.uniform(0, times[-1]) for _ in range(kills)):
        index = bisect.bisect_right(times, moment) - 1
        if not kill_at(store, killed.id, worker, order, index, moment - times[index]):
            break
        last = store.events(killed.id)[-1]
        rows.append((moment, last))
        worker = store.resume(killed.id)
    events = finish(store, killed.id, worker)

    print("\n| kill | at | last event before it | blocks found on resume |\n| --- | --- | --- | --- |")
    for number, (moment, last) in enumerate(rows, 1):
        end = rows[number][1].seq if number < len(rows) else events[-1].seq
        started = [s.event for s in events[last.seq : end] if isinstance(s.event, RunStarted)]
        found = str(started[0].resumed_blocks) if started else "killed before it looked"
        print(f"| {number} | {moment / times[-1]:.0%} | {words(place(last.event))} | {found} |")

    first, second = hashes(whole.folder / "checkpoint"), hashes(killed.folder / "checkpoint")
    print("\n| file | uninterrupted | killed and resumed | |\n| --- | --- | --- | --- |")
    for name in sorted(first | second):
        one, two = first.get(name, "missing"), second.get(name, "missing")
        print(f"| {name} | {one[:12]} | {two[:12]} | {'equal' if one == two else 'DIFFERENT'} |")
    equal = bool(first) and first == second
    print(f"\n{len(rows)} of {kills} kills; " + (f"all {len(first)} files equal" if equal else "NOT EQUAL"))
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
        equal = compare(RunStore(options.root or Path(temporary)), config, options.kills, options.seed)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
