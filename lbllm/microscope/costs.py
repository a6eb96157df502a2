"""What each layer costs on a text: the divergence of the teacher with only this layer binarized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.machine import float32_products
from lbllm.microscope.activations import layer_inputs_on, relative_error
from lbllm.microscope.effect import ROWS, token_kl
from lbllm.microscope.hybrid import Only, hybrid
from lbllm.microscope.pair import Pair, Text
from lbllm.microscope.passes import Passes, States, view


@dataclass(frozen=True)
class LayerCost:
    """``kl``: mean KL(teacher || teacher with only this layer binarized), nats per token. ``output_error``:
    ||X W - X_q W_q||^2 / ||X W||^2 for the layer's inputs X in the teacher."""

    block: int
    layer: str
    kl: float
    output_error: float


def costs(pair: Pair, text: Text, *, blocks: Sequence[int] | None = None) -> Iterator[LayerCost]:
    """Yield the cost of each binarized layer on a text, block by block; ``blocks``: only these.

    The teacher's hidden states are kept, so a layer costs only the blocks from its own on, and those after it work on
    all layers of a block at once. Raises as ``effect``, at the first cost.
    """
    ids, _ = pair.ids(text)
    known = pair.states("teacher", ids)
    for block in range(pair.blocks) if blocks is None else blocks:
        pair.check(block)
        if names := pair.binarized[block]:
            with float32_products():
                inputs = layer_inputs_on(pair, "teacher", ids, block, names)
                errors = [_output_error(pair, block, name, inputs[name]) for name in names]
                found = _divergences(pair, ids, known, block, names)
            for name, kl, error in zip(names, found, errors, strict=True):
                yield LayerCost(block, name, kl, error)


@torch.no_grad()
def _output_error(pair: Pair, block: int, name: str, inputs: Tensor) -> float:
    """The error of a layer's output for inputs (T, in), without its bias."""
    layer = pair.packed(block, name)
    output = layer(inputs).float()
    return relative_error(inputs @ pair.weight(block, name).t(), output if layer.bias is None else output - layer.bias)


def _divergences(pair: Pair, ids: Tensor, known: States, block: int, names: Sequence[str]) -> list[float]:
    """The KL of the teacher with one of these layers of a block binarized, for each of them."""
    outputs = [
        Passes(hybrid(pair, Only(block, name)), pair.path).until(ids, known, block, known.inputs[block], block + 1)
        for name in names
    ]
    teacher, length = Passes(view(pair.teacher.model), pair.path), ids.shape[1] - 1
    last = teacher.last(ids.expand(len(names), -1), known, block + 1, torch.cat(outputs))
    sums = [0.0] * len(names)
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        log_p = torch.log_softmax(teacher.logits(ids, known, known.last, rows), -1)
        for number, hidden in enumerate(last.split(1)):
            log_q = torch.log_softmax(teacher.logits(ids, known, hidden, rows), -1)
            sums[number] += sum(token_kl(log_p, log_q))
    return [total / length for total in sums]
