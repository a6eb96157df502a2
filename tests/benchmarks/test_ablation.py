"""The ablation on a block of a tiny model: what its variants are, and that its errors are those of the stages."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.ablation import EIGHT_BITS, FOUR_BITS, GROUP_SIZES, Ablation, Result, chosen, measure, rows, table
from benchmarks.one_block import OneBlock
from lbllm.errors import ConfigError
from lbllm.models.blocks import linear_layers, linear_weight
from lbllm.quant.levels import to_groups
from lbllm.quant.plan import layer_bits
from lbllm.sections import AarConfig, LayerFormat, ParamBits, PtqConfig, WatConfig
from lbllm.stages.block_state import collect
from lbllm.stages.distill import binary_layers, block_error
from tests.helpers.tiny_runs import tiny_teacher, token_ids

AAR = AarConfig(epochs=1, batch_tokens=64, search_tokens=64)


@pytest.fixture(scope="module")
def block() -> OneBlock:
    return OneBlock(tiny_teacher("llama"), token_ids(36), token_ids(4, seed=1), 1, before=1, group_size=16)


@pytest.fixture(scope="module")
def results(block: OneBlock) -> dict[str, Result]:
    said: list[str] = []
    found = measure(block, ["stages"], said.append)
    assert len(said) == len(found)
    assert said[0].startswith("block 1, W(1+1)A16, plain clustering: ")
    return {f"{one.stages} {one.variant}": one for one in found}


@pytest.mark.soak
def test_all_stages_are_better_than_what_they_start_from(results: dict[str, Result]) -> None:
    assert all(math.isfinite(one.other) and not one.diverged for one in results.values())
    trained = {name: one.trained for name, one in results.items()}
    assert trained["W(1+1)A16 stage 1"] < trained["W(1+1)A16 plain clustering"]
    assert trained["W(1+1)A16 stages 1, 2"] < trained["W(1+1)A16 stage 1"]
    assert trained["W(1+1)A16 stages 1, 2"] < trained["W1A16 stages 1, 2, no bitmap"]
    assert trained["W(1+1)A4KV4 stages 1, 2, knee searched"] > trained["W(1+1)A16 stages 1, 2"]
    assert trained["W(1+1)A4KV4 all three"] < trained["W(1+1)A4KV4 stages 1, 2, knee searched"]
    assert len(set(trained.values())) == len(trained)  # every variant is something else


def test_the_error_is_that_of_the_judged_text(block: OneBlock) -> None:
    made = block.initialize(PtqConfig())
    expected = [block_error(made.block, block.seen[k], block.targets[k], block.calls[1], 4) for k in (0, 1)]
    assert block.errors(made) == pytest.approx(expected)
    assert block.seen[1].shape == (4, 32, 48)
    assert not torch.equal(block.seen[0], block.meant[0])  # the block before is binarized


def test_clusters_are_the_nearest_of_four_levels_a_group(block: OneBlock) -> None:
    made = block.cluster()
    for name, layer in binary_layers(made.block).items():
        weight = linear_weight(linear_layers(block.blocks[1])[name])
        groups, value = to_groups(weight, 16), to_groups(layer.weight().detach(), 16)
        for row, got in zip(groups[0, :-1], value[0, :-1], strict=True):
            levels = got.unique()
            assert len(levels) <= 4
            nearest = (row[:, None] - levels).abs().amin(1)
            torch.testing.assert_close((row - got).abs(), nearest, atol=2e-3, rtol=0)  # float16 levels
        assert torch.equal(made.latents[name], weight)


def test_together_bits_levels_and_knees_all_move(block: OneBlock) -> None:
    start = block.initialize(PtqConfig())
    searched = collect(binary_layers(block.refine(start, AarConfig(epochs=0, search_tokens=64)).block))
    config = WatConfig(epochs=2, batch_tokens=32, bitmap="relaxed", lr_weight=0.2)
    joined = block.join(start, config, AAR)
    found = collect(binary_layers(joined.block))
    for name, layer in binary_layers(joined.block).items():
        assert layer.mode == "frozen"
        assert not torch.equal(found[f"{name}.params"], searched[f"{name}.params"])
        assert not torch.equal(found[f"{name}.act"], searched[f"{name}.act"])
        assert not torch.equal(found[f"{name}.index"], searched[f"{name}.index"])
    assert joined.kv.bits == 4


def test_a_training_that_meets_no_number_is_said_to_diverge(block: OneBlock) -> None:
    start = block.initialize(PtqConfig())
    broken = OneBlock.__new__(OneBlock)
    broken.__dict__ |= block.__dict__ | {"targets": [torch.full_like(block.targets[0], math.nan), block.targets[1]]}
    made = broken.train(start, WatConfig(batch_tokens=64))
    assert made.diverged == "diverged at step 1"
    assert broken.refine(made, AarConfig(epochs=0, search_tokens=64)).diverged == "diverged at step 1"
    row = Result("wat", "2", "as shipped", 0.1, 0.2, 1.0, made.diverged)
    other = Result("wat", "2", "as shipped", 0.0, 0.5, 2.0, "")
    assert "| diverged at step 1 | 0.50000 | 3 |" in table({2: [row], 3: [other]}, "other")
    (kept,) = rows({2: [row], 3: [other]})
    assert (kept["part"], kept["block_2"], kept["block_3"]) == ("wat", "diverged at step 1", 0.5)


@pytest.mark.soak
def test_every_setting_is_a_variant_of_its_stage(block: OneBlock) -> None:
    parts = {name: list(getattr(Ablation(block), name)()) for name in ("ptq", "wat", "aar")}
    assert [len(part) for part in parts.values()] == [5, 14, 14]
    for part in parts.values():
        errors = [block.errors(made)[1] for _, _, made in part]
        assert len(set(errors)) == len(part)


def test_group_sizes_by_layer_cost_as_many_parameters_as_one_for_all(block: OneBlock) -> None:
    # (out, in) of a block of the embedded model.
    shapes = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
    shapes |= {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    for sizes in GROUP_SIZES.values():
        assert sizes.keys() <= shapes.keys()
        assert sum(rows * columns / sizes.get(name, 64) for name, (rows, columns) in shapes.items()) == 55_296
    fewer: list[tuple[ParamBits, dict[str, int]]] = [(8, sizes) for sizes in EIGHT_BITS.values()]
    for bits_each, sizes in fewer + [(4, sizes) for sizes in FOUR_BITS.values()]:
        formats = {name: LayerFormat(format="w1+1", group_size=sizes.get(name, 64), param_bits=bits_each, act_bits=16)
                   for name in shapes}  # fmt: skip
        bits = [layer_bits(formats[name], *shape) for name, shape in shapes.items()]
        assert sum(bits) / sum(rows * columns for rows, columns in shapes.values()) <= 3.0
    layers = binary_layers(block.initialize(PtqConfig(), group_sizes={"q_proj": 8, "mlp.up_proj": 24}).block)
    assert {name: layer.fmt.group_size for name, layer in layers.items()} == {
        name: {"self_attn.q_proj": 8, "mlp.up_proj": 24}.get(name, 16) for name in layers
    }


def test_bad_arguments() -> None:
    assert chosen("stages,aar", "2,14") == (["stages", "aar"], [2, 14])
    with pytest.raises(ConfigError, match="--parts wut: choose from stages"):
        chosen("wut", "2")
    with pytest.raises(ConfigError, match="--blocks x"):
        chosen("wat", "2,x")
    with pytest.raises(ConfigError, match="--blocks 2: tiny has blocks 0 to 1"):
        OneBlock(tiny_teacher("llama"), token_ids(1), token_ids(1), 2, before=1, group_size=16)
