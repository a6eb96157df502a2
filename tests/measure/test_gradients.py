"""The gradient at the outputs of layers against autograd through a model whose parameters ask for one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from lbllm.measure.gradients import output_gradients
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from tests.helpers.tiny_models import tiny
from tests.helpers.tiny_runs import token_ids


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_inputs_and_gradients_give_the_gradient_of_the_weight(architecture: str) -> None:
    model, _ = tiny(architecture)
    model.requires_grad_(False)
    layers = linear_layers(decoder_blocks(model)[1][0])
    sums: dict[str, Tensor] = {}

    def seen(name: str, entered: Tensor, grad: Tensor) -> None:
        sums[name] = sums.get(name, 0) + grad.t() @ entered

    sequences = token_ids(3)
    output_gradients(model, layers, sequences, seen, nullcontext)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    logits = model(input_ids=sequences[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction="sum").backward()
    for name, layer in layers.items():
        parameter = layer.weight
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.grad is not None
        expected = parameter.grad if linear_weight(layer).shape == parameter.shape == parameter.grad.shape else None
        wanted = parameter.grad.t() if type(layer).__name__ == "Conv1D" else expected
        assert wanted is not None
        torch.testing.assert_close(sums[name], wanted, rtol=1e-3, atol=1e-4)
