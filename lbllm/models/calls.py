"""What a decoder block is called with beside the hidden states: masks, positions, rotary tables.

A call is captured on one sequence, and a block is run on batches of any size. Most arguments broadcast over the batch.
Those that do not (the alibi of BLOOM, which has a row for each sequence and head, or a mask whose size a block checks)
are found by a second capture on two sequences: a dimension that is twice as long there belongs to the batch.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

BlockCall = dict[str, Any]


class Repeated(NamedTuple):
    """A tensor of one sequence. A batch has it once for each sequence, one after the other along ``dim``."""

    tensor: Tensor
    dim: int

    def of(self, count: int) -> Tensor:
        """Return the tensor for ``count`` sequences."""
        if self.tensor.shape[self.dim] == 1:
            return self.tensor.expand(*(count if k == self.dim else -1 for k in range(self.tensor.ndim)))
        return self.tensor.repeat(*(count if k == self.dim else 1 for k in range(self.tensor.ndim)))


def call_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Split the arguments of one block call into the hidden states and all other arguments by name."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        arguments |= value if parameter.kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    first = next(iter(bound.signature.parameters))
    return arguments.pop(first), arguments


def with_repeated(one: BlockCall, two: BlockCall) -> BlockCall:
    """Return a block's call for any number of sequences, from its calls with one sequence and with two of them."""
    return {name: _compared(value, two.get(name)) for name, value in one.items()}


def of_batch(call: BlockCall, count: int) -> BlockCall:
    """Return the arguments for a batch of ``count`` sequences."""
    return {name: _expanded(value, count) for name, value in call.items()}


def _compared(one: Any, two: Any) -> Any:
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
        differing = [dim for dim in range(one.ndim) if one.shape[dim] != two.shape[dim]]
        if len(differing) == 1 and two.shape[differing[0]] == 2 * one.shape[differing[0]]:
            return Repeated(one, differing[0])
    elif type(one) in (tuple, list) and type(two) is type(one) and len(one) == len(two):
        return type(one)(_compared(a, b) for a, b in zip(one, two, strict=True))
    elif type(one) is dict and type(two) is dict:
        return {name: _compared(value, two.get(name)) for name, value in one.items()}
    return one


def _expanded(value: Any, count: int) -> Any:
    if isinstance(value, Repeated):
        return value.of(count)
    if type(value) in (tuple, list):
        return type(value)(_expanded(part, count) for part in value)
    if type(value) is dict:
        return {name: _expanded(part, count) for name, part in value.items()}
    return value
