"""Walking the decoder blocks of many architectures, against the models' own forward passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from lbllm.errors import ModelError
from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    check_supported,
    decoder_blocks,
    first_inputs,
    layer_inputs,
    linear_layers,
    linear_weight,
    run_batches,
    run_block,
    set_linear_weight,
    share_copy,
    shared_inputs,
)
from lbllm.quant.kv_cache import TrainingCache
from tests.helpers.tiny_models import DENSE_ARCHITECTURES, VOCABULARY, tiny

# Of each architecture: path of the blocks, and the names of a block's layers grouped by the input that they share.
EXPECTED: dict[str, tuple[str, list[list[str]]]] = {
    "llama": (
        "model.layers",
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ],
    ),
    "gpt2": ("transformer.h", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
    "phi3": (
        "model.layers",
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    ),
    "opt": (
        "model.decoder.layers",
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.out_proj"],
            ["fc1"],
            ["fc2"],
        ],
    ),
}  # fmt: skip


def tokens(count: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
@torch.no_grad()
def test_blocks_run_one_by_one_give_what_the_model_computes(architecture: str) -> None:
    model, _ = tiny(architecture)
    check_supported(model)
    path, blocks = decoder_blocks(model)
    assert model.get_submodule(path) is blocks
    assert len(blocks) == model.config.get_text_config().num_hidden_layers
    sequences = tokens(5, 24)
    calls = capture_calls(model, sequences[:1])
    assert len(calls) == len(blocks)
    stream = first_inputs(model, sequences, batch=2)

    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for block in blocks
    ]
    model(input_ids=sequences, use_cache=False)
    for handle in handles:
        handle.remove()
    for block, call, expected in zip(blocks, calls, seen, strict=True):
        stream = torch.cat(list(run_batches(block, stream, call, batch=2)))
        torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
@torch.no_grad()
def test_layers_by_shared_input_in_their_order_of_use(architecture: str) -> None:
    model, _ = tiny(architecture)
    path, blocks = decoder_blocks(model)
    sequences = tokens(3, 12)
    hidden, call = first_inputs(model, sequences, 3), capture_calls(model, sequences[:1])[0]
    sharing = shared_inputs(blocks[0], hidden[:1], call)
    if architecture in EXPECTED:
        assert (path, sharing) == EXPECTED[architecture]
    assert sorted(name for names in sharing for name in names) == sorted(linear_layers(blocks[0]))

    # What layer_inputs captures is what the layers of a whole pass are given.
    given: dict[str, Tensor] = {}

    def keep(name: str) -> nn.modules.module.RemovableHandle:  # type: ignore[name-defined]
        layer = blocks[0].get_submodule(name)
        return layer.register_forward_pre_hook(lambda _, args: given.__setitem__(name, args[0].flatten(0, -2)))

    handles = [keep(name) for names in sharing for name in names]
    run_block(blocks[0], hidden, call)
    for handle in handles:
        handle.remove()
    for names in sharing:
        for name in names:
            captured = torch.cat(list(layer_inputs(blocks[0], name, hidden, call, batch=2)))
            torch.testing.assert_close(captured, given[name], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(given[name], given[names[0]])
            recorded = torch.cat(all_inputs(blocks[0], hidden, call, batch=2)[name])
            assert torch.equal(recorded, captured.bfloat16())


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
@torch.no_grad()
def test_the_training_cache_takes_the_place_of_a_real_one(architecture: str) -> None:
    """With 8 bits, keys and values are nearly what they were, with 4 bits they are not: the cache is in use."""
    model, _ = tiny(architecture)
    _, blocks = decoder_blocks(model)
    sequences = tokens(2, 12)
    hidden, call = first_inputs(model, sequences, 2), capture_calls(model, sequences[:1])[0]
    plain = run_block(blocks[0], hidden, call)
    torch.testing.assert_close(run_block(blocks[0], hidden, call, DynamicCache()), plain, rtol=1e-4, atol=1e-4)
    errors = [
        float((run_block(blocks[0], hidden, call, TrainingCache(bits)) - plain).norm() / plain.norm())
        for bits in (8, 4)
    ]
    assert 0 < errors[0] < 0.03
    assert errors[0] < errors[1] < 0.5


@torch.no_grad()
def test_the_block_can_be_used_while_a_layers_inputs_are_read() -> None:
    model, _ = tiny("llama")
    block = decoder_blocks(model)[1][0]
    sequences = tokens(3, 8)
    hidden, call = first_inputs(model, sequences, 3), capture_calls(model, sequences[:1])[0]
    one, other = (layer_inputs(block, "mlp.down_proj", hidden, call, 1) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)
        assert run_block(block, hidden, call).shape == hidden.shape


def test_conv1d_is_a_linear_layer_stored_transposed() -> None:
    model, _ = tiny("gpt2")
    layer = linear_layers(decoder_blocks(model)[1][0])["attn.c_attn"]
    assert isinstance(layer, Conv1D)
    assert linear_weight(layer).shape == (3 * 48, 48)
    x = torch.randn(4, 48)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, linear_weight(layer), layer.bias))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_new_weight_belongs_to_the_layer_alone(architecture: str) -> None:
    model, _ = tiny(architecture)
    block = decoder_blocks(model)[1][0]
    name, layer = next(iter(linear_layers(block).items()))
    twin = share_copy(block)
    before = linear_weight(layer).detach().clone()
    weight = torch.randn_like(before).double()
    set_linear_weight(twin.get_submodule(name), weight)
    torch.testing.assert_close(linear_weight(twin.get_submodule(name)), weight.float())
    assert torch.equal(linear_weight(layer), before)


def test_a_shared_copy_holds_the_same_tensors_in_modules_of_its_own() -> None:
    model, _ = tiny("llama")
    twin = share_copy(model)
    for (name, parameter), (twin_name, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == twin_name
        assert parameter is other
    assert all(a is not b for a, b in zip(model.modules(), twin.modules(), strict=True))


def test_experts_in_a_list_are_refused() -> None:
    model, _ = tiny("llama")
    mlp = decoder_blocks(model)[1][0].get_submodule("mlp")
    decoder_blocks(model)[1][1].experts = nn.ModuleList([copy.deepcopy(mlp), mlp])
    with pytest.raises(ModelError, match=r"model\.layers\.1 contains lists of sub-modules"):
        check_supported(model)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential has no list of decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_block_without_a_cache_runs_without_one() -> None:
    class Plain(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * hidden_states

    assert torch.equal(run_block(Plain(), torch.ones(1, 2, 4), {}, TrainingCache(4)), torch.full((1, 2, 4), 2.0))


def test_what_a_block_is_called_with_fits_every_number_of_sequences() -> None:
    """Some arguments have a row for each sequence, or for each sequence and head."""

    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, alibi: Tensor, mask: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
            assert alibi.shape == (3 * len(hidden), 1)
            assert mask.shape == (len(hidden), 1)
            return self.proj(hidden) + alibi.view(-1, 3, 1).sum(1, keepdim=True) + mask[:, None] + tables[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Checked(), Checked()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            count, hidden = len(input_ids), input_ids[..., None].float().expand(-1, -1, 4)
            alibi, mask = torch.arange(3.0).repeat(count)[:, None], torch.ones(count, 1)
            for block in self.blocks:
                hidden = block(hidden, alibi, mask=mask, tables=(torch.full((1, 1, 4), 0.5), mask))
            return hidden

    model: Any = Model().eval()
    ids = tokens(5, 7)
    calls = capture_calls(model, ids[:1])
    hidden = ids[..., None].float().expand(-1, -1, 4)
    with torch.no_grad():
        for block, call in zip(model.blocks, calls, strict=True):
            hidden = torch.cat(list(run_batches(block, hidden, call, 2)))
        assert torch.equal(hidden, model(ids, use_cache=False))


def test_capturing_leaves_no_hooks_behind() -> None:
    model, _ = tiny("llama")
    _, blocks = decoder_blocks(model)
    sequences = tokens(2, 8)
    hidden, call = first_inputs(model, sequences, 1), capture_calls(model, sequences[:1])[0]
    shared_inputs(blocks[0], hidden[:1], call)
    next(layer_inputs(blocks[0], "mlp.down_proj", hidden, call, 1))
    for _ in layer_inputs(blocks[0], "mlp.down_proj", hidden, call, 1):
        pass
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
