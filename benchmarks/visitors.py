"""Many visitors at once at a real showcase server: ``python -m benchmarks.visitors --visitors 20 --seconds 120``.

A server is started as ``python -m lbllm showcase`` starts it, on loopback. Each visitor is a gradio_client of its own
that asks, waits for the end of both answers and asks the next question, each with a marker that no other question has.
When the time is over no new question is asked, and those in the line are answered. Then a single visitor asks every
answered question again, with the same seed: both answers must be the same, letter by letter, and everything that was
streamed under load must be a beginning of them. Printed as a Markdown table, with the order of service against the
server's numbers of arrival, the waits as the visitors see them, and the server's memory (RSS).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import psutil
from gradio_client import Client

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message
from benchmarks.report import ROOT, figure, settings_of, write_report
from tests.helpers.ports import free_port

PATIENCE = 120  # seconds for a request
POLL = 0.05  # seconds
SUBJECTS = ("the sea", "a lost key", "bread", "a bridge", "winter", "the Moon", "a small village")


@dataclass
class Asked:
    """One question: when it was put in the line, was begun and ended, and all that was streamed of both answers."""

    prompt: str
    seed: int
    arrived: float
    began: float | None = None
    ended: float | None = None
    streamed: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""
    number: int = 0


def watch(client: Client, asked: Asked) -> None:
    """Ask and follow to the end."""
    try:
        job = client.submit(asked.prompt, False, asked.seed, api_name="/ask")
        over = False
        while not over:
            # A job's own iterator looks a thousand times a second: twenty of them would take the server's time.
            time.sleep(POLL)
            over = job.done()
            for seen in job.outputs()[len(asked.streamed) :]:
                note(asked, seen)
        job.result()
        asked.ended = time.monotonic()
    except Exception as error:
        asked.error = f"{type(error).__name__}: {error}"


def note(asked: Asked, seen: dict[str, Any]) -> None:
    """Keep one state of a question."""
    asked.number = seen["number"]
    if asked.began is None and seen["state"] != "waiting":
        asked.began = time.monotonic()
    failed = [answer["error"] for answer in seen["answers"] if answer["state"] == "failed"]
    asked.error = asked.error or "; ".join(failed)
    left, right = (answer["text"] for answer in seen["answers"])
    asked.streamed.append((left, right))


def visit(url: str, server: subprocess.Popen[bytes], number: int, deadline: float, log: list[Asked]) -> None:
    """Ask question after question until the time is over."""
    client = reached(url, server)
    turn = 0
    while time.monotonic() < deadline:
        subject = SUBJECTS[(number + turn) % len(SUBJECTS)]
        prompt = f"[visitor {number}, question {turn}] Write a sentence about {subject}."
        asked = Asked(prompt, 1000 * number + turn, time.monotonic())
        log.append(asked)
        watch(client, asked)
        turn += 1
        if asked.error:
            time.sleep(1)
    client.close()


def start(port: int, tokens: int) -> subprocess.Popen[bytes]:
    """The server of the shipped checkpoint, over the usual home."""
    command = [sys.executable, "-m", "lbllm", "showcase", "--port", str(port)]
    command += ["--answer-tokens", str(tokens), "--per-minute", "1000"]
    return subprocess.Popen(command, cwd=ROOT)


def reached(url: str, server: subprocess.Popen[bytes]) -> Client:
    """A client of the server, as soon as it answers."""
    while server.poll() is None:
        try:
            # A machine that is busy with answers may take its time over a request.
            return Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": PATIENCE})
        except Exception:
            time.sleep(1)
    raise SystemExit(f"the server ended with code {server.returncode}")


def until_ready(url: str, server: subprocess.Popen[bytes]) -> Client:
    """A client of the server, once both models are loaded."""
    client = reached(url, server)
    while not client.predict(api_name="/about")["ready"]:
        time.sleep(1)
    return client


def memory(server: subprocess.Popen[bytes]) -> int:
    return int(psutil.Process(server.pid).memory_info().rss)


def disagreements(log: list[Asked], alone: Client) -> tuple[int, int, int]:
    """The number of questions with other answers when asked alone, of those whose streamed text was not a beginning of
    the answer, and of all compared."""
    other = foreign = compared = 0
    for asked in log:
        if asked.ended is None:
            continue
        again = Asked(asked.prompt, asked.seed, time.monotonic())
        watch(alone, again)
        if again.ended is None:
            raise SystemExit(f"asked alone, {asked.prompt!r} was not answered: {again.error}")
        own = again.streamed[-1]
        compared += 1
        other += asked.streamed[-1] != own
        foreign += any(not own[side].startswith(texts[side]) for texts in asked.streamed for side in (0, 1))
    return other, foreign, compared


def out_of_order(log: list[Asked]) -> tuple[int, int]:
    """The number of pairs served in another order than that of their arrival numbers, and of all pairs."""
    served = sorted((asked.number, asked.began) for asked in log if asked.began is not None)
    pairs = list(combinations((began for _, began in served), 2))
    return sum(second < first - POLL for first, second in pairs), len(pairs)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--visitors", type=count, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--answer-tokens", type=count, default=32)
    arguments = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start(port, arguments.answer_tokens)
    try:
        alone = until_ready(url, server)
        watch(alone, Asked("Hello.", 0, time.monotonic()))
        held = [memory(server)]
        log: list[Asked] = []
        began = time.monotonic()
        deadline = began + arguments.seconds
        threads = [
            threading.Thread(target=visit, args=(url, server, number, deadline, log))
            for number in range(arguments.visitors)
        ]
        for thread in threads:
            thread.start()
        time.sleep(arguments.seconds / 2)
        held.append(memory(server))
        for thread in threads:
            thread.join()
        held.append(memory(server))
        print(markdown.head(["", ""]))
        figures = [
            figure("visitors at once", arguments.visitors),
            figure("time in which they ask", round(arguments.seconds), "s"),
            figure("longest answer", arguments.answer_tokens, "tokens"),
        ]
        show("visitors", f"{arguments.visitors}, for {arguments.seconds:.0f} s")
        show("longest answer", f"{arguments.answer_tokens} tokens")
        figures += report(arguments.visitors, log, time.monotonic() - began, held)
        other, foreign, compared = disagreements(log, alone)
        show("answers that are others when asked alone", f"{other} of {compared}")
        show("streams with text that is not their answer's", f"{foreign} of {compared}")
        figures.append(figure(f"answers that are others when asked alone, of {compared}", other))
        figures.append(figure(f"streams with text that is not their answer's, of {compared}", foreign))
        held.append(memory(server))
        show("server memory after that", f"{held[-1] / 1e6:.0f} MB")
        figures.append(figure("server memory after that", round(held[-1] / 1e6), "MB"))
        if arguments.out:
            write_report(arguments.out, "visitors", settings_of(arguments), figures)
    finally:
        server.terminate()
        server.wait()


def report(visitors: int, log: list[Asked], took: float, held: list[int]) -> list[dict[str, Any]]:
    """Print the part of the table that is known when all questions are answered; its figures."""
    done = [asked for asked in log if asked.ended is not None and not asked.error]
    errors = [asked.error for asked in log if asked.error]
    waits = [asked.began - asked.arrived for asked in log if asked.began is not None] or [0.0]
    wrong, pairs = out_of_order(log)
    each = [sum(asked.prompt.startswith(f"[visitor {n},") for asked in done) for n in range(visitors)]
    show("questions asked / answered", f"{len(log)} / {len(done)}, in {took:.0f} s")
    show("errors", "; ".join(f"{errors.count(error)} x {error}" for error in sorted(set(errors))) or "0")
    show("served out of order", f"{wrong} of {pairs} pairs")
    show("answers a visitor got, least / most", f"{min(each)} / {max(each)}")
    show("wait in the line, median / longest", f"{statistics.median(waits):.1f} s / {max(waits):.1f} s")
    show("server memory at start / middle / end", " / ".join(f"{one / 1e6:.0f} MB" for one in held))
    times = ("at the start", "in the middle", "at the end")
    return [
        figure("questions asked", len(log)),
        figure("questions answered", len(done)),
        figure("time until the last answer", round(took), "s"),
        figure("errors", len(errors)),
        figure(f"pairs served out of order, of {pairs:,}", wrong),
        figure("answers per visitor, least", min(each)),
        figure("answers per visitor, most", max(each)),
        figure("wait in the queue, median", round(statistics.median(waits), 1), "s"),
        figure("wait in the queue, longest", round(max(waits), 1), "s"),
        *(figure(f"server memory {when}", round(one / 1e6), "MB") for when, one in zip(times, held, strict=True)),
    ]


def show(name: str, value: str) -> None:
    """Print one row of the table."""
    print(markdown.row([name, value]), flush=True)


if __name__ == "__main__":
    main()
