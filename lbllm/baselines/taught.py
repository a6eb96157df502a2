"""The loop of the baselines that are trained: each block learns what the teacher's block gives, from shallow to deep.

    for block in taught_blocks(model, sequences):
        ...                                   replace and train the layers of block.student
    finished = with_weights(model, weights)

Stage 2 goes through the blocks like this, and EfficientQAT's Block-AP: the student's block gets the output of the
student's earlier blocks, and learns the output of the teacher's block in the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.models.blocks import (
    FORWARD_TOKENS,
    capture_calls,
    check_supported,
    decoder_blocks,
    first_inputs,
    recorded_inputs,
    run_batches,
    set_linear_weight,
    share_copy,
    shared_inputs,
)
from lbllm.models.calls import BlockCall


@dataclass(frozen=True)
class TaughtBlock:
    """A block to train. ``path``: its name in the model; ``student``: a copy of the ``teacher``'s block, which shares
    its tensors; ``inputs`` and ``targets`` (n, T, hidden), ``batch`` of them in a pass without gradients. ``sharing``:
    its linear layers, grouped by their input; ``meant``: the input (tokens, in) of the first layer of each group in the
    teacher, by batch."""

    path: str
    teacher: nn.Module
    student: nn.Module
    call: BlockCall
    inputs: Tensor
    targets: Tensor
    batch: int
    sharing: list[list[str]]
    meant: Mapping[str, list[Tensor]]


@torch.no_grad()
def taught_blocks(model: PreTrainedModel, sequences: Tensor) -> Iterator[TaughtBlock]:
    """Yield the blocks of a model, for token ids (n, T). The model does not change; after each block its ``student``
    computes the next block's inputs. Raises ModelError for a model with experts."""
    check_supported(model)
    path, blocks = decoder_blocks(model)
    batch = max(1, FORWARD_TOKENS // sequences.shape[1])
    sequences = sequences.to(model.device)
    calls = capture_calls(model, sequences[:1])
    inputs = targets = first_inputs(model, sequences, batch)
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        sharing = shared_inputs(block, targets[:1], call)
        with recorded_inputs(block, [names[0] for names in sharing]) as meant:
            targets = torch.cat(list(run_batches(block, targets, call, batch)))
        student = share_copy(block)
        yield TaughtBlock(f"{path}.{number}", block, student, call, inputs, targets, batch, sharing, meant)
        inputs = torch.cat(list(run_batches(student, inputs, call, batch)))


def with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a copy of the model with other weights (out, in) of the linear layers that are named; it shares all other
    tensors."""
    copy: PreTrainedModel = share_copy(model)
    for name, weight in weights.items():
        set_linear_weight(copy.get_submodule(name), weight.detach())
    return copy
