"""Views of a model that others use at the same time, and forward passes of them that begin or end at a block.

A view has new modules where modules contain others, and shares all that compute: linear layers, norms, embeddings. What
is replaced in a view, or listens to it, changes nothing for the model.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.models.blocks import Captured
from lbllm.models.calls import call_arguments
from lbllm.quant.packed_layer import PackedLinear

# Bytes of hidden states that a pair keeps.
KEPT = 2**24
# Results that are kept in any case: hidden states and readings of two models, and the teacher's log-probabilities.
_ALWAYS = 5
# A loaded packed model has these as attributes of its own; they would lead from a view back to it.
_BOUND = ("forward", "save_pretrained")
T = TypeVar("T")


def view(module: Any) -> Any:
    """Return a module tree with new containers and the same leaves: a leaf has no modules in it, or is packed."""
    if isinstance(module, PackedLinear) or not module._modules:
        return module
    made = module.__new__(type(module))
    made.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
        if name not in _BOUND
    }
    made._modules = {name: None if inner is None else view(inner) for name, inner in module._modules.items()}
    return made


@dataclass(frozen=True)
class States:
    """The hidden states of a model on a text. ``inputs``: what each block got, (1, T, hidden). ``last``: what the last
    one gave. ``beside``: how many values each block gives beside the hidden states; None: not even a tuple."""

    inputs: tuple[Tensor, ...]
    last: Tensor
    beside: tuple[int | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in (*self.inputs, self.last))


class Passes:
    """Forward passes of a model, which is a view that nobody else has: its blocks get other ``forward`` functions.

    ``path``: the name of its list of blocks. ``ids`` are token ids (n, T). No pass keeps a cache or gradients.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model = model
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks: list[Any] = list(blocks)

    def states(self, ids: Tensor) -> States:
        """Return the hidden states of all blocks for token ids (1, T)."""
        inputs: list[Tensor] = []
        beside: list[int | None] = []
        last: list[Tensor] = []

        def run(number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            inputs.append(call_arguments(self.blocks[number], args, kwargs)[0])
            output = own(*args, **kwargs)
            beside.append(None if isinstance(output, Tensor) else len(output) - 1)
            if number + 1 == len(self.blocks):
                last.append(output if isinstance(output, Tensor) else output[0])
                raise Captured
            return output

        self._pass(ids, run)
        return States(tuple(inputs), last.pop(), tuple(beside))

    def last(self, ids: Tensor, known: States, start: int, hidden: Tensor | None) -> Tensor:
        """Return the output (n, T, hidden) of the last block if block ``start`` gets ``hidden`` (n, T, hidden).

        ``known``: any states of a model of this kind. If ``start`` is 0, the first block gets the embeddings.
        """
        return self.until(ids, known, start, hidden, len(self.blocks))

    def until(self, ids: Tensor, known: States, start: int, hidden: Tensor | None, stop: int, **options: Any) -> Tensor:
        """Return the output of block ``stop`` - 1, as ``last`` does; ``options`` of the model's forward."""
        last: list[Tensor] = []

        def run(number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if number < start:
                assert hidden is not None
                return _form(hidden, known.beside[number])
            output = own(*args, **kwargs)
            if number + 1 == stop:
                last.append(output if isinstance(output, Tensor) else output[0])
                raise Captured
            return output

        if start == stop:
            assert hidden is not None
            return hidden
        self._pass(ids, run, **options)
        return last.pop()

    def logits(self, ids: Tensor, known: States, last: Tensor, rows: slice) -> Tensor:
        """Return the logits (rows, vocabulary), float32, of some tokens of a text (1, T) whose last block gave ``last``
        (1, T, hidden)."""

        def run(number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _form(last, known.beside[number])

        wanted = torch.arange(ids.shape[1], device=self.model.device)[rows]
        logits: Tensor = self._pass(ids, run, logits_to_keep=wanted).logits[0]
        return (logits if len(logits) == len(wanted) else logits[rows]).float()

    @torch.no_grad()
    def _pass(self, ids: Tensor, run: Callable[..., Any], **options: Any) -> Any:
        """One pass; ``run(number, own, ...)`` stands for each block, whose own forward is ``own``."""

        def replaced(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
            return functools.wraps(own)(lambda *args, **kwargs: run(number, own, *args, **kwargs))

        for number, block in enumerate(self.blocks):
            block.forward = replaced(number, block.forward)
        try:
            with suppress(Captured):
                return self.model(input_ids=ids.to(self.model.device), use_cache=False, **options)
        finally:
            for block in self.blocks:
                del block.forward


class Memo:
    """The latest results of computations that are repeated for the same text, within ``size`` bytes, but always those
    of the last text. Threads may share it; two that ask for the same at once may both compute it."""

    def __init__(self, size: int = KEPT) -> None:
        self._size = size
        self._found: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._mutex = threading.Lock()

    def get(self, key: Any, make: Callable[[], T], nbytes: Callable[[T], int]) -> T:
        """Return what ``make`` returned for this key, now or earlier; ``nbytes`` gives its size."""
        with self._mutex:
            if key in self._found:
                self._found.move_to_end(key)
                known: T = self._found[key][0]
                return known
        made = make()
        with self._mutex:
            self._found[key] = made, nbytes(made)
            while len(self._found) > _ALWAYS and sum(size for _, size in self._found.values()) > self._size:
                self._found.popitem(last=False)
        return made


def _form(hidden: Tensor, beside: int | None) -> Any:
    """Return hidden states in the form in which a block gives them."""
    return hidden if beside is None else (hidden, *[None] * beside)
