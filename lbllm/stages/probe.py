"""The loss of a block on the same few tokens at several of its steps: the loss of single batches is too noisy to read.

Measuring computes forward passes without gradients and draws no random numbers, so training gives the same bytes with
and without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The least number of steps between two measurements.
EVERY = 4
# The greatest share of the run's time that all measurements take together.
SHARE = 0.02


class Budget:
    """The time for all measurements of a run: at most ``SHARE`` of the seconds since the run began."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.began = clock()
        self.spent = 0.0
        self.cost = 0.0  # seconds of the last measurement

    def allows(self, seconds: float) -> bool:
        """Return whether there is time for a measurement of ``seconds``."""
        return self.spent + seconds <= SHARE * (self.clock() - self.began)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is done inside."""
        began = self.clock()
        try:
            yield
        finally:
            self.spent += self.clock() - began


class Probe:
    """Measures ``loss`` at the first and the last of a block's ``steps`` steps and every few steps between.

    The slower a measurement is compared with a step, the more steps lie between two of them. Where the ``budget`` is
    used up, it waits for a later step.
    """

    def __init__(self, loss: Callable[[], float], steps: int, budget: Budget) -> None:
        self._loss, self._steps, self._budget = loss, steps, budget
        self._next = 1
        self._began, self._spent_before = budget.clock(), budget.spent

    def after(self, step: int) -> float | None:
        """Return the loss after the step (from 1), or None if it isn't measured at this one."""
        budget = self._budget
        if step < self._next and step != self._steps:
            return None
        # Some is left for the passes that bring the tokens to the next block; each takes about as long.
        if not budget.allows(4 * budget.cost):
            return None
        trained = budget.clock() - self._began - (budget.spent - self._spent_before)
        before = budget.spent
        with budget.timed():
            loss = self._loss()
        budget.cost = budget.spent - before
        # Half of the time is for these; the other half for the first and last ones, and for the passes between blocks.
        self._next = step + max(EVERY, math.ceil(budget.cost / (SHARE / 2 * max(trained / step, 1e-9))))
        return loss
