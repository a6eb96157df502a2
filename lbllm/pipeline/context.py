"""The data that all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lbllm import ranks
from lbllm.config import RunConfig
from lbllm.events import StepMetric
from lbllm.models.blocks import FORWARD_TOKENS
from lbllm.models.calls import BlockCall
from lbllm.models.streamed import BlockModel
from lbllm.ranks import Share
from lbllm.runs.store import Request
from lbllm.sections import AarConfig, E2eConfig, LayerFormat, Stage, WatConfig
from lbllm.stages.block_store import BlockStore
from lbllm.stages.distill import Step, batch_order
from lbllm.stages.probe import Budget
from lbllm.streams import Streams
from lbllm.texts.corpus import Corpus

# The loss between is measured on at most this many tokens, which the run doesn't train on.
CURVE_TOKENS = 256


class Ended(Exception):
    """Raised in a stage to end the run after a request to stop or cancel."""


@dataclass
class HeldOutTokens:
    """Token ids (n, T) that no stage trains on, every block's arguments for this T, and the time to measure losses."""

    ids: Tensor
    calls: list[BlockCall]
    budget: Budget


@dataclass
class RunContext:
    """The data that all stages of a run share."""

    config: RunConfig
    teacher: BlockModel
    whole_teacher: Callable[[], PreTrainedModel]
    formats: list[dict[str, LayerFormat]]
    calls: list[BlockCall]
    corpus: Corpus
    store: BlockStore
    streams: Streams
    autocast: Any
    request: Callable[[], Request | None]
    held_out: HeldOutTokens | None = None

    def share(self, sequences: Tensor) -> Share:
        """Which of a stage's sequences (n, T) are whose, where several processes work on the run."""
        return Share(len(sequences), self.batch)

    @property
    def batch(self) -> int:
        """The number of sequences in one forward pass without gradients."""
        return max(1, FORWARD_TOKENS // self.config.seq_len)

    @property
    def blocks(self) -> int:
        """The number of decoder blocks."""
        return len(self.formats)

    def sequences(self, tokens: int) -> Tensor:
        """Return the first sequences of the corpus, enough for ``tokens``: token ids (n, seq_len)."""
        return self.corpus.sequences[: -(-tokens // self.config.seq_len)]

    def check(self) -> None:
        """Raise Ended if there is a request to stop or cancel; all ranks call it at the same steps."""
        if self.request() is not None:
            raise Ended

    def check_alone(self) -> None:
        """The same within work of which ranks have unequal parts; only a run of one process can end there."""
        if ranks.count() == 1:
            self.check()


def step_metric(stage: Stage, number: int, step: Step) -> StepMetric:
    """Return the event for an optimizer step of block ``number``."""
    return StepMetric(
        stage=stage,
        block=number,
        step=step.step,
        loss=step.loss,
        reg=step.reg,
        lr=step.lr,
        tokens_per_second=step.tokens_per_second,
        probe=step.probe,
    )


def step_count(settings: WatConfig | AarConfig | E2eConfig, sequences: Tensor) -> int:
    """Return the number of optimizer steps of a stage on sequences (n, T)."""
    batch = max(1, settings.batch_tokens // sequences.shape[1])
    return len(batch_order(len(sequences), batch, settings.epochs, 0))
