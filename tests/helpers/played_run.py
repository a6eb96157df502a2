"""A run whose events a test writes, as a worker would."""

from __future__ import annotations

import fcntl
import math
from typing import IO

from lbllm.config import make_config
from lbllm.events import BlockDone, BlockStarted, LayerDone, RunLoading, RunQueued, RunStarted, StageStarted, StepMetric
from lbllm.runs.store import RunStore
from lbllm.sections import Stage

STEPS = 40


class PlayedRun:
    """A run whose events the test writes; it counts as running as long as its lock is held."""

    def __init__(self, store: RunStore, name: str) -> None:
        self.store = store
        self.run = store.create(make_config("quick"), name)
        self.lock: IO[bytes] = (self.run.folder / "alive.lock").open("ab")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        for event in (RunQueued(), RunLoading(), self.started()):
            store.append(self.run.id, event)
        store.append(self.run.id, StageStarted(stage="ptq", steps=0))
        for block in range(3):
            store.append(self.run.id, BlockStarted(stage="ptq", block=block))
            store.append(self.run.id, LayerDone(stage="ptq", block=block, layer="self_attn.q_proj", error=9.5))
            self.done("ptq", block)
        store.append(self.run.id, StageStarted(stage="wat", steps=STEPS))

    def started(self) -> RunStarted:
        return RunStarted(
            stages=("ptq", "wat"), blocks=3, layers=3, weights=9, device="cpu", corpus_hash="0", tokens=9, bpw=3.0
        )

    def close(self) -> None:
        """End its worker."""
        self.lock.close()

    def done(self, stage: Stage, block: int, *, diverged: bool = False) -> int:
        event = BlockDone(
            stage=stage, block=block, loss_before=0.5, loss_after=0.3, seconds=5, memory_bytes=10**9, diverged=diverged
        )
        return self.store.append(self.run.id, event).seq

    def step(self, block: int, number: int, probe: float | None = None) -> int:
        loss = (1 + block) * math.exp(-number / STEPS)
        event = StepMetric(
            stage="wat", block=block, step=number, loss=loss, lr=0.01, tokens_per_second=900, probe=probe
        )
        return self.store.append(self.run.id, event).seq
