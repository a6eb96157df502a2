"""What a run tells the world. The pipeline yields these; the worker stores them; every reader replays them in order.

An event is a small frozen pydantic model with a ``kind``. The store adds ``seq`` (1, 2, ... in a run, no gaps) and
``time`` (seconds since the epoch) to each.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lbllm.sections import Stage


class _Event(BaseModel):
    # JSON has no NaN: a diverged step's loss is written as a string that is read back as the number.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RunQueued(_Event):
    """A worker process was started for the run and waits its turn. After an earlier end it marks a resume."""

    kind: Literal["run_queued"] = "run_queued"


class RunLoading(_Event):
    """It is the run's turn: the model and the text are being loaded."""

    kind: Literal["run_loading"] = "run_loading"


class RunStarted(_Event):
    """The model is loaded and work begins. ``resumed_blocks``: (stage, block) pairs taken over from earlier."""

    kind: Literal["run_started"] = "run_started"
    stages: tuple[Stage, ...]
    blocks: int
    layers: int
    weights: int
    device: str
    corpus_hash: str
    tokens: int
    bpw: float
    resumed_blocks: int = 0


def stage_parts(stage: Stage, blocks: int) -> int:
    """Into how many parts a stage divides a model of so many blocks: stage 4 takes it whole."""
    return 1 if stage == "e2e" else blocks


class StageStarted(_Event):
    """A stage begins. ``steps`` is the number of optimizer steps a block has in it (0 for stage 1)."""

    kind: Literal["stage_started"] = "stage_started"
    stage: Stage
    steps: int


class BlockStarted(_Event):
    """Work on a block begins. For stage 4, here and in the events below, the whole model is its block 0."""

    kind: Literal["block_started"] = "block_started"
    stage: Stage
    block: int


class LayerDone(_Event):
    """Stage 1 finished one linear layer: output error relative to the layer's output energy, in percent of it."""

    kind: Literal["layer_done"] = "layer_done"
    stage: Stage
    block: int
    layer: str
    error: float


class StepMetric(_Event):
    """One optimizer step of a block. ``loss``: the reconstruction loss; ``reg``: lambda times the polarization."""

    kind: Literal["step"] = "step"
    stage: Stage
    block: int
    step: int
    loss: float
    reg: float = 0.0
    lr: float
    tokens_per_second: float


class BlockDone(_Event):
    """A block's state is on disk. The losses are measured over the stage's tokens before and after the stage's work
    on the block.

    ``diverged`` marks a block whose training met a NaN or ended worse than it began: its state from before is kept.
    """

    kind: Literal["block_done"] = "block_done"
    stage: Stage
    block: int
    loss_before: float
    loss_after: float
    seconds: float
    memory_bytes: int
    diverged: bool = False


class Evaluated(_Event):
    """A perplexity became known; ``what``: teacher, rtn or a stage; ``text`` names the evaluated text."""

    kind: Literal["evaluated"] = "evaluated"
    what: str
    text: str
    perplexity: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None


class StageDone(_Event):
    kind: Literal["stage_done"] = "stage_done"
    stage: Stage
    seconds: float


class Acknowledged(_Event):
    """The worker has seen a request to stop or cancel."""

    kind: Literal["acknowledged"] = "acknowledged"
    request: Literal["stop", "cancel"]


class RunDone(_Event):
    """The packed checkpoint lies in ``path``; ``disk_bytes`` is the size of its weights file."""

    kind: Literal["run_done"] = "run_done"
    path: str
    bpw: float
    disk_bytes: int
    seconds: float


class RunStopped(_Event):
    """Ended on request. After ``stop`` finished blocks are kept and the run can go on; after ``cancel`` they are
    gone."""

    kind: Literal["run_stopped"] = "run_stopped"
    request: Literal["stop", "cancel"]


class RunFailed(_Event):
    """Ended by an error; ``message`` is for the user. Finished blocks are kept."""

    kind: Literal["run_failed"] = "run_failed"
    message: str


Event = (
    RunQueued
    | RunLoading
    | RunStarted
    | StageStarted
    | BlockStarted
    | LayerDone
    | StepMetric
    | BlockDone
    | Evaluated
    | StageDone
    | Acknowledged
    | RunDone
    | RunStopped
    | RunFailed
)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class StoredEvent(BaseModel):
    """An event as a run's store holds it."""

    model_config = ConfigDict(frozen=True)

    seq: int
    time: float
    event: Annotated[Event, Field(discriminator="kind")]
