"""Try a reader on many damaged inputs, made from valid ones by a seeded generator.

    fuzz("texts", make, parses, read, say)

``make(generator)`` gives an input, ``parses(input)`` says whether its outermost format is still right, and
``read(input)`` is the reader. It holds if it returns, or raises an error of lbllm's own, within ``SECONDS`` of CPU, and
if at least ``PARSED`` of the inputs get past the parser, or else they would try only that.

The seed is 1 in `make test` and random in `make soak`; LBLLM_FUZZ_SEED sets it. Each case has a generator of its own,
so LBLLM_FUZZ_CASE=texts/17 repeats one.
"""

from __future__ import annotations

import copy
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lbllm.errors import LbllmError
from tests.helpers.cases import FACTOR

CASES = 400 * (10 if FACTOR > 1 else 1)  # of each of the five kinds
SECONDS = 5.0
PARSED = 0.6
SEED = int(os.environ.get("LBLLM_FUZZ_SEED") or (secrets.randbelow(2**32) if FACTOR > 1 else 1))
Input = TypeVar("Input")


def fuzz(
    kind: str,
    make: Callable[[random.Random], Input],
    parses: Callable[[Input], bool],
    read: Callable[[Input], object],
    say: Callable[[str], None],
    count: int = CASES,
) -> None:
    """Try ``count`` cases, print the three figures and assert them."""
    wanted, _, number = os.environ.get("LBLLM_FUZZ_CASE", "").partition("/")
    numbers = [int(number)] if wanted == kind else range(count)
    parsed = refused = 0
    slowest = 0.0
    failed = []
    for case in numbers:
        data = make(random.Random(f"{SEED}/{kind}/{case}"))
        parsed += parses(data)
        began = time.process_time()
        try:
            with _interrupted_after(2 * SECONDS):
                read(data)
        except LbllmError as error:
            refused += 1
            if not str(error) or len(str(error)) > 5_000 or "Traceback" in str(error):
                failed.append(f"case {case}: message of {len(str(error))} characters")
        except Exception as error:
            failed.append(f"case {case}: {type(error).__name__}: {str(error)[:200]}")
            if wanted == kind:
                raise
        slowest = max(slowest, time.process_time() - began)
    tried = len(numbers)
    say(
        f"{kind}: {tried} cases with LBLLM_FUZZ_SEED={SEED}: {len(failed)} other exceptions, slowest {slowest:.2f} s, "
        f"{parsed / tried:.0%} past the parser, {refused / tried:.0%} refused"
    )
    assert not failed, f"LBLLM_FUZZ_SEED={SEED} LBLLM_FUZZ_CASE={kind}/...\n" + "\n".join(failed[:20])
    assert slowest < SECONDS
    assert wanted == kind or parsed >= PARSED * tried


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """End what takes longer than this much CPU, and what only waits for three times as long."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 6 * seconds))
    before = [signal.signal(number, end) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def value(rng: random.Random) -> Any:
    """A value that a field is not meant to have, or the edge of what it may have."""
    return rng.choice(
        (
            lambda: None,
            lambda: rng.choice((True, False)),
            lambda: rng.choice((0, 1, -1, 2, 16, 2**31, 2**63, -(2**63), 10**18, 10**4_000)),
            lambda: rng.choice((0.0, -0.0, 1e308, 1e-308, 5e-324, float("nan"), float("inf"), float("-inf"), 0.5)),
            lambda: rng.choice(("", " ", "x", "\0", "\ud800", "é", "a" * 5_000, "../../x", "4", "auto", "e2e", "{}")),
            lambda: [value(rng) for _ in range(rng.randrange(3))],
            lambda: {str(value(rng))[:50] if rng.random() < 0.5 else "x": value(rng) for _ in range(rng.randrange(3))},
            lambda: _nested(rng.choice((3, 9, 100))),
        )
    )()


def _nested(depth: int) -> Any:
    inner: Any = 1
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    return inner


def changed_document(rng: random.Random, document: Any) -> Any:
    """The JSON document with one to three changes: a value replaced, taken from elsewhere, removed, or a key added."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        places = [(document, key) for key in _keys(document)]
        places += [(inner, key) for inner in _containers(document) for key in _keys(inner)]
        if not places:
            return document
        container, key = rng.choice(places)
        match rng.randrange(5):
            case 0 | 1:
                container[key] = value(rng)
            case 2:
                other, other_key = rng.choice(places)
                container[key] = copy.deepcopy(other[other_key])
            case 3:
                del container[key]
            case 4 if isinstance(container, dict):
                container[rng.choice(("new", "", "x" * 500, "*.q_proj", "kind"))] = value(rng)
    return document


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _containers(document: Any, depth: int = 0) -> Iterator[Any]:
    if depth > 5:
        return
    for key in _keys(document):
        if isinstance(document[key], dict | list) and document[key]:
            yield document[key]
            yield from _containers(document[key], depth + 1)


_ADDED = (b"\0", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"9" * 30, b"9" * 5_000, b"[" * 100_000, b'{"a":' * 900)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to four changes: bytes replaced, cut out, repeated or added, or the end cut off."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 1, 2, 8, 100)))
        match rng.randrange(6):
            case 0 | 1:
                data = data[:start] + rng.randbytes(end - start) + data[end:]
            case 2:
                data = data[:start] + data[end:]
            case 3:
                data = data[:end] + data[start:]
            case 4:
                data = data[:start] + rng.choice(_ADDED) + data[start:]
            case 5:
                data = data[: max(start, len(data) // 2)]
    return data
