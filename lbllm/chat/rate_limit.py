"""Limit the rate of events: at most a number of times in a span of seconds, separately for each key."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable

_FORGET_ABOVE = 1000


class RateLimit:
    """Allows ``count`` events in any ``seconds``, for each key. Thread-safe; inactive keys are removed."""

    def __init__(self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = count
        self.seconds = seconds
        self._clock = clock
        self._taken: dict[Hashable, deque[float]] = {}
        self._mutex = threading.Lock()

    def wait(self, key: Hashable) -> float:
        """Return the seconds until the key's next event is allowed; 0 means now."""
        with self._mutex:
            return self._wait(key, self._clock())

    def take(self, key: Hashable) -> float:
        """Count an event for the key and return 0; if it is not allowed yet, return the seconds until it is."""
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
