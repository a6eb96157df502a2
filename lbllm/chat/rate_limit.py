"""How often one may: so many times in a span of seconds, counted for each key by itself."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable

_FORGET_ABOVE = 1000


class RateLimit:
    """``count`` times in any ``seconds``. Threads may share it; keys that were quiet for that long are forgotten."""

    def __init__(self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = count
        self.seconds = seconds
        self._clock = clock
        self._taken: dict[Hashable, deque[float]] = {}
        self._mutex = threading.Lock()

    def wait(self, key: Hashable) -> float:
        """Seconds until the key may again; 0: now."""
        with self._mutex:
            return self._wait(key, self._clock())

    def take(self, key: Hashable) -> float:
        """Count one more for the key and return 0, or count nothing and return the seconds until it may."""
        with self._mutex:
            now = self._clock()
            if left := self._wait(key, now):
                return left
            if len(self._taken) > _FORGET_ABOVE:
                self._taken = {key: times for key, times in self._taken.items() if times[-1] > now - self.seconds}
            self._taken.setdefault(key, deque()).append(now)
            return 0.0

    def _wait(self, key: Hashable, now: float) -> float:
        times = self._taken.get(key, deque())
        while times and times[0] <= now - self.seconds:
            times.popleft()
        if len(times) < self.count:
            return 0.0
        return times[0] + self.seconds - now
