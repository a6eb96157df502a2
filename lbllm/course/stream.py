"""What the teacher's layers receive while it reads a text, computed block by block."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbllm.models.blocks import (
    FORWARD_TOKENS,
    capture_calls,
    decoder_blocks,
    first_inputs,
    layer_inputs,
    run_batches,
    share_copy,
)


@torch.no_grad()
def stream_inputs(model: PreTrainedModel, block: int, layer: str, sequences: Tensor) -> Generator[float, None, Tensor]:
    """Return the inputs (n T, in), float32, of a layer for token ids (n, T). Yields, after each block, the share that
    is done. Other threads may use the model meanwhile: hooks are set on a copy that shares its tensors."""
    copy = share_copy(model)
    blocks, batch = decoder_blocks(copy)[1], max(1, FORWARD_TOKENS // 4 // sequences.shape[1])
    sequences = sequences.to(model.device)
    calls = capture_calls(copy, sequences[:1], block + 1)
    hidden = first_inputs(copy, sequences, batch)
    for number in range(block):
        hidden = torch.cat(list(run_batches(blocks[number], hidden, calls[number], batch)))
        yield (number + 1) / (block + 1)
    parts = list(layer_inputs(blocks[block], layer, hidden, calls[block], batch))
    return torch.cat(parts).float().cpu()
