"""The trials of levers on a tiny model: what each changes, and that its cells are stored and summed up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import levers
from benchmarks.levers import VARIANTS, Levers, chosen, summary, table
from benchmarks.levers_bits import quant_of
from benchmarks.levers_blocks import BLOCK_LEVERS, BlockLever, FirstBlocks, SoftLinear
from benchmarks.levers_end import END_LEVERS, RULES, EndLever, at_level, mirrored, relation_error, restarted, train
from benchmarks.levers_guided import Guide, guided_blocks, token_weights
from benchmarks.levers_model import Bench, State, load_states, save_states
from lbllm.errors import ConfigError
from lbllm.models.blocks import layer_inputs, linear_layers, linear_weight
from lbllm.quant.levels import take_levels, to_groups
from lbllm.quant.plan import bits_per_weight
from lbllm.sections import E2eConfig, PtqConfig, QuantConfig, WatConfig
from lbllm.stages.distill import binary_layers
from tests.helpers.tiny_runs import bfloat_teacher, token_ids

E2E = E2eConfig(tokens=96, batch_tokens=32, lr_weight=2e-2, lr_levels=1e-2)
WAT = WatConfig(batch_tokens=32, lr_levels=1e-2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(bfloat_teacher(), QuantConfig(group_size=16, param_bits=4), {"wiki": token_ids(2, seed=5)})


@pytest.fixture(scope="module")
def chain(bench: Bench) -> FirstBlocks:
    return FirstBlocks(bench, 2, token_ids(8))


@pytest.fixture(scope="module")
def states(chain: FirstBlocks) -> list[State]:
    return list(chain.stage_1(PtqConfig(em_steps=2, sweeps=1)))


def trained(bench: Bench, states: list[State], lever: EndLever) -> list[State]:
    latents = restarted(bench, states, at_level if lever.from_levels else None)
    return train(bench, states, latents, token_ids(8, seed=2), E2E, lever, 0)[0]


def test_states_are_read_as_they_were_written(states: list[State], tmp_path: Path) -> None:
    save_states(tmp_path / "new" / "states.safetensors", states)
    read = load_states(tmp_path / "new" / "states.safetensors")
    assert [state.keys() for state in read] == [state.keys() for state in states]
    assert all(
        torch.equal(state[name], other[name]) for state, other in zip(read, states, strict=True) for name in state
    )


FEW = ("latent weights", "latents begin at their levels", "pulled by 0.1 every 4 steps, noise 0.3")


@pytest.mark.parametrize(
    "names",
    [(*FEW, "attention relations, weight 10"), pytest.param(tuple(END_LEVERS), marks=pytest.mark.soak)],
    ids=["few", "all"],
)
def test_every_lever_of_stage_4_trains_another_model(names: tuple[str, ...], bench: Bench, states: list[State]) -> None:
    found = {name: bench.judge(trained(bench, states, END_LEVERS[name]))["kl_wiki"] for name in names}
    assert len(set(found.values())) >= len(found) - 1  # with eight steps a pull may come only after the last one
    assert max(found.values()) < 1.5 * bench.judge(states)["kl_wiki"]


def test_codes_are_frozen_and_levels_go_on(bench: Bench, states: list[State]) -> None:
    whole, frozen = (trained(bench, states, EndLever(frozen=share)) for share in (0.0, 7 / 8))
    index = [name for name in states[0] if name.endswith(".index")]
    params = [name for name in states[0] if name.endswith(".params")]
    moved = [sum(int((end[0][name] != states[0][name]).sum()) for name in index) for end in (whole, frozen)]
    assert 0 < moved[1] < moved[0]
    assert any(not torch.equal(frozen[0][name], states[0][name]) for name in params)


def relation_loops(student: Tensor, teacher: Tensor, width: int) -> float:
    total, count = 0.0, 0
    for head in range(student.shape[1] // width):
        ours, theirs = (one[:, head * width : (head + 1) * width].double() for one in (student, teacher))
        for token in range(len(student)):
            q, p = ((one[token] @ one.T / width**0.5).softmax(0) for one in (ours, theirs))
            total += float((p * (p / q).log()).sum())
            count += 1
    return total / count


def test_relations_equal_loops() -> None:
    student, teacher = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    assert float(relation_error(student, teacher, 4)) == pytest.approx(relation_loops(student, teacher, 4), rel=1e-5)
    assert float(relation_error(teacher, teacher, 4)) == pytest.approx(0, abs=1e-6)


def test_a_mirrored_weight_keeps_its_distance_from_the_border(bench: Bench, states: list[State]) -> None:
    layer = next(iter(binary_layers(next(bench.restored(states))).values()))
    levels = layer.levels().detach().sort(-1).values[0, 0]
    value = layer.weight().detach()[0, : layer.length]
    place = int((value == levels[1]).nonzero()[0])
    low, high = float(levels[:2].mean()), float(levels[1:3].mean())
    for teacher, wanted in (
        (low - 0.1 * (levels[1] - low), low + 0.1 * (levels[1] - low)),
        (high + 0.1 * (high - levels[1]), high - 0.1 * (high - levels[1])),
        (low - 9 * (levels[1] - low), levels[1]),
        (low + 0.3 * (high - low), low + 0.3 * (high - low)),
    ):
        found = mirrored(layer, torch.full((layer.out_features, layer.in_features), float(teacher)))
        assert float(found[0, place]) == pytest.approx(float(wanted), rel=1e-4)


def test_the_best_of_a_weight_alone_has_no_gradient_left(bench: Bench, chain: FirstBlocks, states: list[State]) -> None:
    """Changed alone to its best value, a weight leaves the least error for the same Hessian."""
    config, name = PtqConfig(align=0.0, damping=1e-6), "self_attn.q_proj"
    best = chain.optima(states, config)[0][name]
    layer = binary_layers(next(bench.restored(states)))[name]
    dense, value = linear_weight(linear_layers(bench.blocks[0])[name]), layer.weight().detach()
    inputs = torch.cat(list(layer_inputs(bench.blocks[0], name, chain.streams()[0], chain.calls[0], 4))).double()

    def error(weight: Tensor) -> float:
        energy = inputs.square().sum(1)
        bounded = (10 * energy.median() / energy).clamp_max(1).sqrt()[:, None]
        return float(((bounded * inputs) @ (weight - dense).double().t()).square().sum())

    for row, column in ((0, 0), (7, 30), (47, 47)):
        errors = []
        for share in (0.9, 1.0, 1.1):
            changed = value.clone()
            changed[row, column] += share * (best[row, column] - value[row, column])
            errors.append(error(changed))
        assert errors[1] == min(errors)


def test_every_rule_restarts_with_the_same_codes(bench: Bench, states: list[State]) -> None:
    expected = [layer.weight().detach() for block in bench.restored(states) for layer in binary_layers(block).values()]
    for rule in RULES.values():
        layers = [layer for block in bench.restored(states) for layer in binary_layers(block).values()]
        latents = [latent for block in restarted(bench, states, rule) for latent in block.values()]
        for layer, latent, weight in zip(layers, latents, expected, strict=True):
            assert torch.equal(layer.nearest_to(latent), latent)  # every latent weight is kept: it has its code
            layer.thaw(latent, "coupled")
            torch.testing.assert_close(layer.weight().detach(), weight)


@pytest.fixture(scope="module")
def plain(chain: FirstBlocks, states: list[State]) -> list[State]:
    """The blocks after stage 2 as it is."""
    return list(chain.stage_2(states, WAT, BLOCK_LEVERS["stage 2"], 0))


@pytest.mark.parametrize("name", [name for name in BLOCK_LEVERS if name != "stage 2"])
def test_every_lever_of_stage_2_trains_other_blocks(
    name: str, bench: Bench, chain: FirstBlocks, states: list[State], plain: list[State]
) -> None:
    other = list(chain.stage_2(states, WAT, BLOCK_LEVERS[name], 0))
    assert any(not torch.equal(plain[1][key], other[1][key]) for key in plain[1])
    assert bench.judge(other)["kl_wiki"] < 2 * bench.judge(states)["kl_wiki"]


def test_probabilities_have_the_gradient_of_their_mean(bench: Bench, states: list[State]) -> None:
    (name, layer), *_ = binary_layers(next(bench.restored(states))).items()
    layer.__class__ = SoftLinear
    assert isinstance(layer, SoftLinear)
    layer.lever, layer.steps = BlockLever(), 4
    layer.thaw(linear_weight(linear_layers(bench.blocks[0])[name]), "coupled")
    assert layer.logits is not None
    layer.gradient = torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(1))
    layer.pass_on()
    logits = layer.logits.detach().double().requires_grad_()
    params = layer.params.detach().clone().requires_grad_()
    mu, alpha = params[..., [1, 3]].double(), params[..., [0, 2]].double()
    levels = torch.stack(((mu - alpha)[..., 0], (mu - alpha)[..., 1], (mu + alpha)[..., 1], (mu + alpha)[..., 0]), -1)
    grid_levels = layer.levels().detach().double()
    mean = ((logits / layer.temperature).softmax(-1) * grid_levels[..., None, :]).sum(-1)
    (mean * to_groups(layer.gradient, layer.length)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(layer.logits.grad, logits.grad.float(), rtol=1e-4, atol=1e-6)
    shares = (logits.detach() / layer.temperature).softmax(-1)
    (levels * (to_groups(layer.gradient, layer.length)[..., None] * shares).sum(-2)).sum().backward()
    torch.testing.assert_close(layer.params.grad, params.grad, rtol=1e-4, atol=1e-5)
    layer.step, layer.lever = 4, BlockLever(coldest=1e-6)
    cold = layer.expand(torch.float32)
    layer.freeze()
    hard = take_levels(layer.levels().detach(), to_groups(layer.index, layer.length))
    torch.testing.assert_close(to_groups(cold, layer.length), hard)


def test_the_gradient_weighs_tokens_in_stage_1(bench: Bench, chain: FirstBlocks, states: list[State]) -> None:
    guide, config = Guide(2), PtqConfig(em_steps=2, sweeps=1)
    weights = token_weights(chain, guide)
    assert {tuple(one.shape) for one in weights.values()} == {(8 * 32, 2)}
    assert all(torch.allclose(one.mean(0), torch.ones(2)) for one in weights.values())
    assert all(float(one.view(8, 32, 2)[:, -1].abs().max()) == 0 for one in weights.values())  # it predicts nothing
    made = guided_blocks(chain, config, guide)
    assert bench.judge_blocks(made)["kl_wiki"] < 2 * bench.judge(states)["kl_wiki"]


def test_without_weights_one_group_of_outputs_is_stage_1() -> None:
    bench = Bench(bfloat_teacher(), QuantConfig(group_size=16), {"wiki": token_ids(2, seed=5)})
    chain, config = FirstBlocks(bench, 2, token_ids(8)), PtqConfig(em_steps=2, sweeps=1)
    made = guided_blocks(chain, config, Guide(1, weighted=False))
    for block, expected in zip(made, bench.restored(list(chain.stage_1(config))), strict=True):
        for name, layer in binary_layers(expected).items():
            torch.testing.assert_close(linear_weight(block.get_submodule(name)), layer.weight().detach())


def test_formats_by_sensitivity_take_the_bits_of_one_format() -> None:
    bench = Bench(bfloat_teacher(), QuantConfig(group_size=16, param_bits=4), {"wiki": token_ids(2, seed=5)})
    bits = []
    for variant in VARIANTS["bits"]:
        quant = quant_of(variant, bench, 1, token_ids(4), (8, 16, 32, 48), 16)
        made = Bench(bench.teacher, quant, bench.judged)
        bits.append(bits_per_weight(made.blocks[:1], made.formats[:1]))
        assert {fmt.group_size for fmt in made.formats[1].values()} == {16}
        sizes = {fmt.group_size for fmt in made.formats[0].values()}
        assert (len(sizes) > 1) == (variant != "one format")
    assert 0.95 * bits[0] < min(bits[1:]) <= max(bits[1:]) <= bits[0]


def test_cells_are_stored_and_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Levers.__new__(Levers)
    made.work, made.identity = tmp_path, [64, 2]
    asked: list[tuple[str, int]] = []

    def end(variant: str, seed: int) -> dict[str, Any]:
        asked.append((variant, seed))
        value = 20.0 + seed - (variant != "latent weights")
        return {f"{kind}_{text}": value for kind in ("kl", "perplexity") for text in ("wiki", "tune")}

    made.end = end  # type: ignore[method-assign]
    variants = ["latent weights", "levels alone"]
    rows = list(made.cells("end", variants, [0, 1]))
    assert list(made.cells("end", variants, [0, 1])) == rows
    assert list(made.cells("end", variants, [0, 1, 2], stored=True)) == rows
    assert asked == [(name, seed) for seed in (0, 1) for name in variants]
    first, second = summary(rows)
    assert (first["seeds"], first["perplexity_wiki"], first["change"]) == (2, 20.5, 0.0)
    assert second["change"] == pytest.approx((-1 / 20 - 1 / 21) / 2)
    assert (second["least"], second["most"]) == (pytest.approx(-1 / 20), pytest.approx(-1 / 21))
    assert "| end | levels alone | 2 | 19.500 |" in table([first, second])
    json.dumps(second)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("end", "levels alone") == {"end": ["latent weights", "levels alone"]}
    with pytest.raises(ConfigError, match="--parts ends: choose from end, restart, blocks, again"):
        chosen("ends", None)
    with pytest.raises(ConfigError, match="--only stage 3: choose from latent weights; "):
        chosen("end,blocks", "stage 3")
    monkeypatch.setattr(sys, "argv", ["levers", "--model", "shiped"])
    with pytest.raises(SystemExit, match="model 'shiped' is not known"):
        levers.main()
