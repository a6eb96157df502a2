"""Stage 1 of a whole model in memory, in formats layer by layer: what a plan is measured on.

It is the stage that a run does, on little text: block by block, each layer aligned to what the binarized layers before
it give. The teacher and the binarized model are both in memory in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.errors import LbllmError
from lbllm.models.blocks import (
    capture_calls,
    decoder_blocks,
    embedded_batches,
    recorded_inputs,
    run_batches,
    share_copy,
    shared_inputs,
)
from lbllm.models.calls import BlockCall
from lbllm.models.teacher import Teacher
from lbllm.sections import LayerFormat, PtqConfig
from lbllm.stages.ptq import ptq_block

BATCH_TOKENS = 2_048
# Called before each part with the number of finished ones and of all; may raise an exception to end the work.
Step = Callable[[int, int], None]


class Stream:
    """The teacher's hidden states on sequences of token ids (n, T), block by block."""

    def __init__(self, teacher: Teacher, sequences: Tensor, autocast: Any) -> None:
        self.path, self.blocks = decoder_blocks(teacher.model)
        self.autocast = autocast
        self.batch = max(1, BATCH_TOKENS // sequences.shape[1])
        self.calls: list[BlockCall] = capture_calls(teacher.model, sequences[:1].to(teacher.model.device))
        first = embedded_batches(teacher.model, sequences, self.batch, teacher.model.device)
        self.hidden = torch.cat(list(first)).bfloat16()

    @torch.no_grad()
    def advance(self, block: nn.Module, number: int, hidden: Tensor) -> Tensor:
        """What a block makes of hidden states (n, T, hidden), bfloat16."""
        with self.autocast():
            parts = list(run_batches(block, hidden, self.calls[number], self.batch))
        return torch.cat(parts).bfloat16()

    def taught(self, number: int) -> tuple[list[list[str]], dict[str, list[Tensor]]]:
        """Let the stream pass the teacher's block ``number``. Returns its layers grouped by input, and the inputs
        (tokens, in) of the first of each group, by batch."""
        block = self.blocks[number]
        sharing = shared_inputs(block, self.hidden[:1], self.calls[number])
        with recorded_inputs(block, [names[0] for names in sharing]) as inputs:
            self.hidden = self.advance(block, number, self.hidden)
        return sharing, dict(inputs)


@torch.no_grad()
def binarized(
    teacher: Teacher,
    formats: Sequence[Mapping[str, LayerFormat]],
    sequences: Tensor,
    config: PtqConfig,
    autocast: Any,
    step: Step,
) -> PreTrainedModel:
    """The teacher after stage 1, with the weights that a checkpoint would hold, in float32.

    ``formats``: for each block, those of its layers to binarize; ``sequences``: token ids (n, T) for the Hessians.
    Raises LbllmError naming a layer whose result is not finite.
    """
    model: PreTrainedModel = share_copy(teacher.model)
    students = decoder_blocks(model)[1]
    stream = Stream(teacher, sequences, autocast)
    inputs = stream.hidden.clone()
    for number, student in enumerate(students):
        step(number, len(students))
        _, meant = stream.taught(number)
        try:
            for _ in ptq_block(
                stream.blocks[number],
                student,
                stream.calls[number],
                inputs,
                meant,
                dict(formats[number]),
                config,
                stream.batch,
            ):
                pass
        except LbllmError as error:
            raise LbllmError(f"{stream.path}.{number}.{error}") from error
        if number + 1 < len(students):
            inputs = stream.advance(student, number, inputs)
    return model
