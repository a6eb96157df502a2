"""The cost of each layer against hybrids and against the layers' own outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lbllm.errors import ConfigError, ModelError
from lbllm.microscope.costs import LayerCost, costs
from lbllm.microscope.effect import effect
from lbllm.microscope.hybrid import Only
from tests.helpers.tiny_models import SENTENCES
from tests.helpers.tiny_pairs import tiny_pair

TEXT = SENTENCES[3]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt2"])
def test_each_layer_costs_what_its_hybrid_does(architecture: str) -> None:
    pair = tiny_pair(architecture, skip=(f"*.0.{'mlp.c_fc' if architecture == 'gpt2' else 'mlp.up_proj'}",))
    found = list(costs(pair, TEXT))
    assert [(cost.block, cost.layer) for cost in found] == pair.places(None, None)
    ids, _ = pair.ids(TEXT)
    inputs: dict[Any, torch.Tensor] = {}
    for block, name in pair.places(None, None):

        def keep(module: Any, args: Any, key: Any = (block, name)) -> None:
            inputs.setdefault(key, args[0][0])

        pair.layer("teacher", block, name).register_forward_pre_hook(keep)
    with torch.no_grad():
        pair.teacher.model(input_ids=ids)
    for cost in found:
        place = cost.block, cost.layer
        assert cost.kl == pytest.approx(effect(pair, Only(*place), TEXT).hybrid.kl, rel=0.01, abs=1e-7)
        packed = pair.packed(*place)
        rounded = inputs[place] if packed.quantizer is None else packed.quantizer(inputs[place])
        exact = inputs[place].double() @ pair.weight(*place).double().t()
        error = (exact - rounded.double() @ packed.dequantize().double().t()).square().sum() / exact.square().sum()
        assert cost.output_error == pytest.approx(float(error), rel=1e-4)


def test_some_blocks_alone() -> None:
    pair = tiny_pair("llama")
    first = list(costs(pair, TEXT, blocks=[1]))
    assert all(isinstance(cost, LayerCost) and cost.block == 1 for cost in first)
    assert first == list(costs(pair, TEXT))[7:]


def test_what_can_not_be_is_said() -> None:
    pair = tiny_pair("llama")
    with pytest.raises(ModelError, match="the text has 1 token"):
        next(costs(pair, "a"))
    with pytest.raises(ConfigError, match="there is no block 5"):
        next(costs(pair, TEXT, blocks=[5]))
