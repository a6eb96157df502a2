"""The gradient of the loss on a text at the outputs of a model's linear layers, by one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What is told of a layer in one sequence: its name, its input (T, in), and the gradient (T, out) at its output.
Seen = Callable[[str, Tensor, Tensor], None]
# The loss of a sequence (1, T), a sum over its T - 1 predictions, from their logits (T - 1, V).
Loss = Callable[[Tensor, Tensor], Tensor]


def next_token_loss(sequence: Tensor, logits: Tensor) -> Tensor:
    """The negative log probabilities of the tokens themselves, so that squared gradients estimate the Fisher
    information of the outputs."""
    return nn.functional.cross_entropy(logits.float(), sequence[0, 1:], reduction="sum")


def output_gradients(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    sequences: Tensor,
    seen: Seen,
    autocast: Any,
    loss: Loss = next_token_loss,
) -> None:
    """Call ``seen`` for each of the ``layers`` and each sequence of token ids (n, T).

    The whole model is in memory, with the activations of one sequence; its parameters get no gradient.
    """
    handles = [model.get_input_embeddings().register_forward_hook(_leaf)]
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(_watch(name, seen)))
    try:
        for sequence in sequences.split(1):
            with torch.enable_grad(), autocast():
                logits = model(input_ids=sequence[:, :-1], use_cache=False).logits[0]
            with torch.enable_grad():
                total = loss(sequence, logits)
            total.backward()
    finally:
        for handle in handles:
            handle.remove()


def _leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A gradient has to flow, and no parameter asks for one."""
    return output.detach().requires_grad_()


def _watch(name: str, seen: Seen) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        entered = args[0].detach()

        def told(grad: Tensor) -> None:
            seen(name, entered.flatten(0, -2).float(), grad.flatten(0, -2).float())

        output.register_hook(told)

    return hook
