"""The events of a run. The pipeline yields them, the worker stores them, and every reader replays them in order.

An event is a small frozen pydantic model with a ``kind``. The store adds ``seq`` (1, 2, ... in a run, without gaps) and
``time`` (seconds since the epoch).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lbllm.sections import Stage


class _Event(BaseModel):
    # JSON has no NaN: it is written as a string, which is read back as the number. A field of a later version is
    # ignored, so that this version can still read the event.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class RunQueued(_Event):
    """A worker process was started for the run and waits for its turn. If the run had ended before, it is resumed."""

    kind: Literal["run_queued"] = "run_queued"


class RunLoading(_Event):
    """The run's turn has come: it loads the model and the text."""

    kind: Literal["run_loading"] = "run_loading"


class RunStarted(_Event):
    """The model is loaded and work begins. ``resumed_blocks``: the number of (stage, block) pairs finished before;
    ``rows_left_out``: rows of the text that have none; ``streams``: where the hidden states of all tokens lie."""

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
    rows_left_out: int = 0
    streams: Literal["memory", "disk"] = "memory"


def stage_parts(stage: Stage, blocks: int) -> int:
    """Return the number of parts that a stage processes: 1 for stage 4, ``blocks`` for the others."""
    return 1 if stage == "e2e" else blocks


class StageStarted(_Event):
    """A stage begins. ``steps``: the number of optimizer steps per block (0 for stage 1)."""

    kind: Literal["stage_started"] = "stage_started"
    stage: Stage
    steps: int


class BlockStarted(_Event):
    """Work on a block begins. In stage 4 the whole model is block 0, here and in the events below."""

    kind: Literal["block_started"] = "block_started"
    stage: Stage
    block: int


class LayerDone(_Event):
    """Stage 1 finished a linear layer. ``error``: the output error in percent of the layer's output energy."""

    kind: Literal["layer_done"] = "layer_done"
    stage: Stage
    block: int
    layer: str
    error: float


class ExpertDone(_Event):
    """A stage finished an expert of a block, after the block's other layers. ``tokens``: those that were routed to it.

    ``loss_before``, ``loss_after``: relative, on its tokens. In stage 1 that of its own output when it is dense, and
    when it is binarized; without tokens on others of the layer. In stages 2 and 3 that of all the block's experts
    together, before and after it trained; 0 without tokens.
    """

    kind: Literal["expert_done"] = "expert_done"
    stage: Stage
    block: int
    expert: str
    tokens: int
    loss_before: float
    loss_after: float


class StepMetric(_Event):
    """One optimizer step of a block. ``loss``: the reconstruction loss; ``reg``: lambda times the polarization.

    ``probe``: the loss after the step on a few tokens that the run doesn't train on, the same at all steps; it is
    measured every few steps, and left out of the JSON elsewhere.
    """

    kind: Literal["step"] = "step"
    stage: Stage
    block: int
    step: int
    loss: float
    reg: float = 0.0
    lr: float
    tokens_per_second: float
    probe: float | None = Field(None, exclude_if=lambda value: value is None)


class BlockDone(_Event):
    """A block's state is on disk. ``loss_before``, ``loss_after``: on the stage's tokens, before and after the stage.

    ``diverged``: the loss became NaN or ended clearly higher than it began. The block then keeps its earlier state,
    silently where the loss is about the same.
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
    """A perplexity was measured. ``what``: teacher, start, rtn or a stage; ``text``: the name of the evaluated text."""

    kind: Literal["evaluated"] = "evaluated"
    what: str
    text: str
    perplexity: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None


class SpeedMeasured(_Event):
    """The packed model wrote ``tokens`` tokens one by one, alone. Rates compare only on one ``machine``."""

    kind: Literal["speed_measured"] = "speed_measured"
    tokens_per_second: float
    tokens: int
    machine: str


class StageDone(_Event):
    """A stage has finished all blocks."""

    kind: Literal["stage_done"] = "stage_done"
    stage: Stage
    seconds: float


class Acknowledged(_Event):
    """The worker has received a request to stop or cancel."""

    kind: Literal["acknowledged"] = "acknowledged"
    request: Literal["stop", "cancel"]


class RunDone(_Event):
    """The packed checkpoint is in ``path``; ``disk_bytes`` is the size of its weights files."""

    kind: Literal["run_done"] = "run_done"
    path: str
    bpw: float
    disk_bytes: int
    seconds: float


class RunStopped(_Event):
    """The run ended on request. ``stop`` keeps finished blocks, so the run can be resumed; ``cancel`` deletes them."""

    kind: Literal["run_stopped"] = "run_stopped"
    request: Literal["stop", "cancel"]


class RunFailed(_Event):
    """The run ended with an error; ``message`` is for the user. Finished blocks are kept."""

    kind: Literal["run_failed"] = "run_failed"
    message: str


Event = (
    RunQueued
    | RunLoading
    | RunStarted
    | StageStarted
    | BlockStarted
    | LayerDone
    | ExpertDone
    | StepMetric
    | BlockDone
    | Evaluated
    | SpeedMeasured
    | StageDone
    | Acknowledged
    | RunDone
    | RunStopped
    | RunFailed
)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class StoredEvent(BaseModel):
    """An event with its number and time, as the run store keeps it."""

    model_config = ConfigDict(frozen=True)

    seq: int
    time: float
    event: Annotated[Event, Field(discriminator="kind")]
