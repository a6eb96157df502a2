"""Held-out tokens that pass the blocks beside those that a stage trains on, to measure the loss between steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbllm.models.blocks import run_block
from lbllm.models.calls import BlockCall
from lbllm.pipeline.context import RunContext
from lbllm.stages.distill import HeldOut


class Beside:
    """The held-out tokens on their way through a stage, beside those that it trains on.

    Their streams (n, T, hidden) are the teacher's and the student's, as in ``run_stage``. They end where the time to
    measure is used up.
    """

    def __init__(self, run: RunContext, cache: Any) -> None:
        assert run.held_out is not None
        self._run, self._cache, self._tokens = run, cache, run.held_out
        self._at: HeldOut | None = None
        with self._tokens.budget.timed():
            first = torch.cat(list(run.teacher.first_inputs(self._tokens.ids, run.batch)))
        self._streams: tuple[Tensor, Tensor] | None = (first, first)

    def enter(self, number: int, block: nn.Module) -> HeldOut | None:
        """Return the held-out tokens before the teacher's block; None if there is no time left to measure them."""
        self._at = None
        if self._streams is not None and self._tokens.budget.allows(self._tokens.budget.cost):
            student, teacher = self._streams
            call = self._tokens.calls[number]
            with self._tokens.budget.timed():
                targets = self._pass(block, teacher, call)
            self._at = HeldOut(student, targets, call, self._tokens.budget)
        return self._at

    def leave(self, student: nn.Module) -> None:
        """Go on to the next block through a finished student's block."""
        at, self._streams = self._at, None
        if at is not None:
            with self._tokens.budget.timed():
                self._streams = self._pass(student, at.inputs, at.call, self._cache), at.targets

    @torch.no_grad()
    def _pass(self, block: nn.Module, stream: Tensor, call: BlockCall, cache: Any = None) -> Tensor:
        with self._run.autocast():
            return run_block(block, stream, call, cache).float()
