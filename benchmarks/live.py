"""Measure the cost of watching a run, and how soon an event is on the screen: ``python -m benchmarks.live``.

One run of the embedded model trains a single block for as long as this takes, in its worker process. A server and a
headless browser are beside it, and the browser has the run's page open and closed by turns. Printed are the delay from
an event's time in the store to the drawn curve, the CPU time of server and browser while the page is open (in percent
of one core), and the run's steps per second with and without the page. Nothing else should work on the machine.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Page, sync_playwright

from benchmarks.command_line import command_parser, count, one_message
from benchmarks.report import figure, settings_of, write_report
from lbllm.config import make_config
from lbllm.events import StepMetric
from lbllm.places import home
from lbllm.runs.store import ACTIVE, Run, RunStore
from tests.browser.conftest import CHROMIUM, FLAGS, Server, wait_until

CURVE = "[aria-label^='Block 1,']"
# When the curve of which event was painted, in seconds since the epoch.
WATCH = """node => {
    window.seen = [];
    new MutationObserver(() => {
        const stamp = Number(node.dataset.stamp);
        requestAnimationFrame(() => setTimeout(() => window.seen.push([stamp, Date.now() / 1000])));
    }).observe(node, {attributes: true, attributeFilter: ["data-stamp"]});
}"""


@dataclass
class Turn:
    """What was measured while the page was open or closed: CPU in percent of one core, delays in seconds."""

    rate: float
    server: float
    browser: float
    delays: list[float] = field(default_factory=list)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time of the processes and of all their children so far."""
    total = 0.0
    for process in processes:
        for one in (process, *process.children(recursive=True)):
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
    return total


def steps(store: RunStore, run: Run, after: int = 0) -> list[tuple[int, float]]:
    """Sequence number and time of the run's steps after an event."""
    events = store.events(run.id, after, ("step",))
    return [(stored.seq, stored.time) for stored in events if isinstance(stored.event, StepMetric)]


def measure(
    store: RunStore,
    run: Run,
    server: Server,
    page: Page,
    parts: list[list[psutil.Process]],
    seconds: float,
    watched: bool,
) -> Turn:
    """One turn of ``seconds`` with the page open or closed; ``parts``: the processes of server and browser."""
    if watched:
        page.goto(server.url(f"runs?run={run.id}"))
        page.wait_for_selector(f"{CURVE} .main-svg")
        page.locator(CURVE).evaluate(WATCH)
    else:
        page.goto("about:blank")
    page.wait_for_timeout(3_000)
    last = store.events(run.id)[-1].seq
    before, began = [cpu_seconds(part) for part in parts], time.monotonic()
    page.wait_for_timeout(1_000 * seconds)
    took = time.monotonic() - began
    shares = [100 * (cpu_seconds(part) - start) / took for part, start in zip(parts, before, strict=True)]
    done = steps(store, run, last)
    if len(done) < 3:
        raise SystemExit(f"the run made {len(done)} steps in {took:.0f} s; give more --seconds")
    rate = (len(done) - 1) / (done[-1][1] - done[0][1])
    turn = Turn(rate, server=shares[0], browser=shares[1])
    if watched:
        page.wait_for_timeout(2_000)
        seen: list[tuple[int, float]] = page.evaluate("window.seen")
        for seq, moment in done:
            shown = [at for stamp, at in seen if stamp >= seq]
            turn.delays.append(min(shown) - moment if shown else float("inf"))
    return turn


def report(closed: list[Turn], opened: list[Turn]) -> list[dict[str, Any]]:
    """Print the figures; the rows that ``--out`` keeps of them."""
    delays = sorted(delay for turn in opened for delay in turn.delays)
    p95 = delays[min(len(delays) - 1, round(0.95 * (len(delays) - 1)))]
    # Each turn with the page against the mean of the turns on either side of it.
    slower = [
        100 * (1 - turn.rate / statistics.mean((closed[index].rate, closed[index + 1].rate)))
        for index, turn in enumerate(opened)
    ]
    median = statistics.median(delays)
    print(f"event to screen: p50 {median:.2f} s, p95 {p95:.2f} s, max {delays[-1]:.2f} s")
    print(f"                 of {len(delays)} events in {len(opened)} turns")
    kept = [figure("event to screen, median", round(median, 2), "s")]
    kept.append(figure("event to screen, 95 of 100 events", round(p95, 2), "s"))
    kept.append(figure("event to screen, the slowest event", round(delays[-1], 2), "s"))
    kept.append(figure("events measured", len(delays)))
    for name in ("server", "browser"):
        watched, alone = (statistics.mean(getattr(turn, name) for turn in turns) for turns in (opened, closed))
        print(f"CPU of the {name}: {watched:.1f}% of one core, {alone:.1f}% with the page closed")
        kept.append(figure(f"CPU of the {name}, page open", round(watched, 1), "% of one core"))
        kept.append(figure(f"CPU of the {name}, page closed", round(alone, 1), "% of one core"))
    rates = [statistics.mean(turn.rate for turn in turns) for turns in (closed, opened)]
    spread = statistics.stdev(slower) if len(slower) > 1 else 0.0
    print(f"steps a second: {rates[0]:.3f} without the page, {rates[1]:.3f} with it")
    print(f"slow-down: {statistics.mean(slower):.1f}% (standard deviation {spread:.1f} over {len(slower)} turns)")
    kept.append(figure("steps of the run a second, page closed", round(rates[0], 3)))
    kept.append(figure("steps of the run a second, page open", round(rates[1], 3)))
    kept.append(figure("slow-down of the run", round(statistics.mean(slower), 1), "%"))
    kept.append(figure(f"slow-down, standard deviation over {len(slower)} turns", round(spread, 1), "%"))
    return kept


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="length of a turn")
    parser.add_argument("--turns", type=count, default=4, help="turns with the page open")
    options = parser.parse_args()
    changes = {
        "stages": ["ptq", "wat"],
        # Block 0 alone; its steps are those of the quick preset, as many as are needed.
        "quant": {"skip": ["model.layers.[1-9].*", "model.layers.[1-9][0-9].*"]},
        "ptq": {"tokens": 1_024, "em_steps": 2, "sweeps": 0},
        "wat": {"epochs": 1_000},
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        (Path(folder) / "models").symlink_to(home() / "models")
        server = Server(Path(folder))
        store = server.store
        run = store.create(make_config("quick", changes))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        parts = [psutil.Process().children()]
        server.start()
        assert server.process is not None
        parts.insert(0, [psutil.Process(server.process.pid)])
        try:
            os.environ["LBLLM_HOME"] = folder
            store.start(run.id)
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.set_default_timeout(120_000)
            page.goto(server.url(f"runs?run={run.id}"))
            wait_until(lambda: steps(store, run) or store.get(run.id).state == "failed", seconds=900)
            if store.get(run.id).state == "failed":
                raise SystemExit(f"the run failed: {store.events(run.id)[-1].event}")
            # The first steps and the first drawing are slower than those to come.
            page.wait_for_timeout(10_000)
            closed, opened = [measure(store, run, server, page, parts, options.seconds, watched=False)], []
            for _ in range(options.turns):
                opened.append(measure(store, run, server, page, parts, options.seconds, watched=True))
                closed.append(measure(store, run, server, page, parts, options.seconds, watched=False))
            rows = report(closed, opened)
            if options.out:
                write_report(options.out, "live", settings_of(options), rows)
        finally:
            if store.get(run.id).state in ACTIVE:
                store.request(run.id, "cancel")
                wait_until(lambda: store.get(run.id).state not in ACTIVE)
            browser.close()
            server.stop()
            store.close()


if __name__ == "__main__":
    main()
