"""Compute with a model one decoder block at a time: a block's weights exist only while it is used.

A ``BlockModel`` is a model whose blocks, embeddings and output head may be shapes alone. It makes a block when it is
needed, embeds tokens from the rows that they use, and gives logits for a part of the vocabulary. A model that is in
memory as a whole works in the same way.

    model = open_blocks(folder, ...)        from the safetensors files of a folder, of any size
    model = BlockModel.of(whole)            of a model in memory
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.models.blocks import (
    Captured,
    decoder_blocks,
    embedded_batches,
    outer_layers,
    share_copy,
)
from lbllm.models.calls import BlockCall, call_arguments, with_repeated
from lbllm.models.experts import read_parameters, split_experts
from lbllm.models.weights import row_parts

Rows = slice | Tensor
# The logits of one part of the vocabulary have at most this many numbers.
LOGITS_PART = 2**22


@dataclass
class Survey:
    """What one pass over all blocks finds out.

    ``calls``: each block's arguments for batches of that length. ``uncalled``: the full names of linear layers,
    apart from those of experts, that are never called. ``hashes``: the hash of each parameter.
    """

    calls: list[BlockCall] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    hashes: dict[str, int] = field(default_factory=dict)


class BlockModel:
    """A model that is computed block by block, in eval mode and without gradients.

    ``model``: its modules; what is neither part of a block nor one of ``matrices`` is in memory. ``make(number)``
    returns a block with its weights, on ``device``. ``matrices``: the names of embeddings and output head in ``model``
    if they are not in memory. ``read(name, rows)`` then returns some of their rows in float32. ``files``: the name of
    the file of each parameter, where it has one. ``part(number, layer)`` returns a block of which only one layer has to
    have its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make: Callable[[int], nn.Module],
        *,
        device: torch.device,
        matrices: dict[str, tuple[int, ...]] | None = None,
        read: Callable[[str, Rows], Tensor] | None = None,
        files: dict[str, str] | None = None,
        part: Callable[[int, str], nn.Module] | None = None,
    ) -> None:
        self.model, self.block, self.device = model, make, device
        self.part = part or (lambda number, layer: make(number))
        self.matrices, self._read, self.files = matrices or {}, read, files or {}
        self.path, self.blocks = decoder_blocks(model)
        # How much a block returns beside the hidden states, by number: those that have run and return a tuple.
        self._beside: dict[int, int] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> BlockModel:
        """Return the block model of one that is in memory. Its tensors are shared; its experts are split."""
        split_experts(model)
        blocks = decoder_blocks(model)[1]
        return cls(share_copy(model), lambda number: blocks[number], device=model.device)

    def rows(self, name: str, rows: Rows) -> Tensor:
        """Return rows of the matrix ``name``, one of ``matrices``, float32 on the device of the model."""
        assert self._read is not None
        return self._read(name, rows)

    def first_inputs(self, sequences: Tensor, batch: int) -> Iterator[Tensor]:
        """Yield the inputs (b, T, hidden) of the first block for token ids (n, T), ``batch`` sequences at a time."""
        with self._embedding_rows():
            yield from embedded_batches(self.model, sequences, batch, self.device)

    @torch.no_grad()
    def survey(self, sequence: Tensor) -> Survey:
        """Run all blocks once on token ids (1, T); the first call of any of these passes."""
        found = Survey()

        def run(number: int) -> Callable[..., Any]:
            block = self.block(number)
            full = f"{self.path}.{number}."
            found.hashes |= {full + name: value for name, value in weight_hashes(block).items()}
            layers = outer_layers(block)
            called: set[str] = set()
            handles = [
                layer.register_forward_pre_hook(lambda _layer, _args, name=name: called.add(name))
                for name, layer in layers.items()
            ]

            def forward(*args: Any, **kwargs: Any) -> Any:
                try:
                    output = block(*args, **kwargs)
                finally:
                    for handle in handles:
                        handle.remove()
                found.uncalled.extend(full + name for name in layers if name not in called)
                self._hidden(number, output)
                if number + 1 == len(self.blocks):
                    raise Captured  # the output layer of a large vocabulary would need more memory than all blocks
                return output

            return forward

        with self._computing(run), suppress(Captured):
            self.model(input_ids=sequence.to(self.device), use_cache=False)
        found.calls = self.calls(sequence)
        # A parameter outside the blocks, hashed in parts where it is not in memory.
        inside = f"{self.path}."
        for name, parameter in self.model.named_parameters():
            if not name.startswith(inside):
                found.hashes[name] = self._hash(name) if name in self.matrices else hash_of(parameter)
        return found

    def _hash(self, name: str) -> int:
        result = 0
        for part in row_parts(self.matrices[name]):
            result ^= hash_of(self.rows(name, part))
        return result

    @torch.no_grad()
    def calls(self, sequence: Tensor) -> list[BlockCall]:
        """Return each block's arguments for batches of length T; after the first pass, without computing the
        blocks.

        ``sequence``: token ids (1, T).
        """
        found: list[BlockCall] = []

        def run(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = call_arguments(self.blocks[number], args, kwargs)
                found.append(call)
                if number + 1 == len(self.blocks):
                    raise Captured
                return self._output(number, hidden)

            return forward

        for ids in (sequence, sequence.repeat(2, 1)):
            with self._computing(run), suppress(Captured):
                self.model(input_ids=ids.to(self.device), use_cache=False)
        count = len(self.blocks)
        return [with_repeated(*both) for both in zip(found[:count], found[count:], strict=True)]

    @torch.no_grad()
    def last_hidden(self, sequences: Tensor) -> Tensor:
        """Return the hidden states (n, T, hidden) after the last block for token ids (n, T); makes each block once."""
        box: list[Tensor] = []

        def run(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = self.block(number)(*args, **kwargs)
                hidden = self._hidden(number, output)
                if number + 1 == len(self.blocks):
                    box.append(hidden)
                    raise Captured
                return output

            return forward

        with self._computing(run), suppress(Captured):
            self.model(input_ids=sequences.to(self.device), use_cache=False)
        return box.pop()

    @torch.no_grad()
    def logits(self, sequences: Tensor, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits of token ids (n, T), whose last block gave ``hidden`` (n, T, hidden), by parts of the
        vocabulary: the first token id of the part, logits (n, T, part). After ``survey`` or ``last_hidden``."""

        def run(number: int) -> Callable[..., Any]:
            last = number + 1 == len(self.blocks)
            return lambda first, *_, **__: self._output(number, hidden if last else first)

        def computed() -> Tensor:
            with self._computing(run):
                logits: Tensor = self.model(input_ids=sequences.to(self.device), use_cache=False).logits
            return logits

        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            yield 0, computed()
            return
        name = next(
            name for name, weight in self.model.named_parameters(remove_duplicate=False) if weight is head.weight
        )
        weight, bias = head.weight, head.bias
        step = max(256, LOGITS_PART // sequences.numel())
        try:
            for start in range(0, len(weight), step):
                part = slice(start, min(start + step, len(weight)))
                rows = self.rows(name, part) if name in self.matrices else weight[part]
                head.weight = nn.Parameter(rows, requires_grad=False)
                if bias is not None:
                    head.bias = nn.Parameter(bias[part], requires_grad=False)
                yield start, computed()
        finally:
            head.weight, head.bias = weight, bias

    def _hidden(self, number: int, output: Any) -> Tensor:
        """Return the hidden states of what a block returned, and remember its form."""
        if isinstance(output, Tensor):
            return output
        # Not what else is in it: attention weights (1, heads, T, T) of all blocks would take more than the model.
        self._beside[number] = len(output) - 1
        hidden: Tensor = output[0]
        return hidden

    def _output(self, number: int, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a block gives them."""
        beside = self._beside.get(number)
        return hidden if beside is None else (hidden, *[None] * beside)

    @contextmanager
    def _computing(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Make the model compute ``forward(number)``, made when it is called, in place of each of its blocks."""

        def replaced(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
            return functools.wraps(own)(lambda *args, **kwargs: forward(number)(*args, **kwargs))

        for number, block in enumerate(self.blocks):
            block.forward = replaced(number, block.forward)
        try:
            with self._embedding_rows():
                yield
        finally:
            for block in self.blocks:
                del block.forward

    @contextmanager
    def _embedding_rows(self) -> Iterator[None]:
        """Give the embeddings, where they are not in memory, the rows of the tokens of each call."""
        embeddings: Any = self.model.get_input_embeddings()
        name = next(
            (name for name in self.matrices if self.model.get_parameter(name) is getattr(embeddings, "weight", None)),
            None,
        )
        if name is None:
            yield
            return
        weight, padding = embeddings.weight, embeddings.padding_idx
        # Some models ask where it is.
        empty = nn.Parameter(torch.empty(0, weight.shape[1], device=self.device), requires_grad=False)

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            used, position = args[0].unique(return_inverse=True)
            module.weight = nn.Parameter(self.rows(name, used.cpu()), requires_grad=False)
            return position, *args[1:]

        handles = [
            embeddings.register_forward_pre_hook(enter),
            embeddings.register_forward_hook(lambda *_: setattr(embeddings, "weight", empty), always_call=True),
        ]
        embeddings.weight = empty
        embeddings.padding_idx = None  # it counts rows of the whole matrix; only training needs it
        try:
            yield
        finally:
            embeddings.padding_idx, embeddings.weight = padding, weight
            for handle in handles:
                handle.remove()


def weight_hashes(model: nn.Module) -> dict[str, int]:
    """Return the hash of each parameter by name, as ``BlockModel.survey`` finds them."""
    return {name: hash_of(weight) for name, weight in read_parameters(model)}


def hash_of(tensor: Tensor) -> int:
    """Return a tensor's hash; the hashes of its parts, combined by exclusive or, are the same."""
    return int(torch.hash_tensor(tensor.detach().cpu()).view(torch.int64).item())
