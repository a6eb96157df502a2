"""Targets, predictions and the choice of formats, on a made-up study: bits, bytes, layers that keep their formats."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lbllm.config import RunConfig, make_config
from lbllm.errors import ConfigError
from lbllm.measure.estimate import estimate
from lbllm.models.blocks import linear_weight
from lbllm.planning.candidates import candidates, made, weight_format
from lbllm.planning.plan import Plan, answering_bytes, make_plan
from lbllm.planning.study import Layer, Study, monotone, pooled
from lbllm.planning.target import parse_target
from lbllm.quant.plan import bits_per_weight, block_formats, layer_bits
from lbllm.sections import QuantConfig
from tests.helpers.cases import cases
from tests.helpers.tiny_models import tiny

SMALL, MIDDLE, LARGE = made("w1+1", -1, 4), made("w1+1", 32, 4), made("w1+1+1", 16, 4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")[0]


@pytest.fixture(scope="module")
def study(model: PreTrainedModel) -> Study:
    """Errors fall with the bits, and later layers cost more."""
    formats = candidates()
    path, blocks, named = block_formats(model, QuantConfig(group_size=16))
    layers: list[Layer] = []
    for number, block in enumerate(named):
        for name in block:
            rows, columns = linear_weight(blocks[number].get_submodule(name)).shape
            errors = tuple(4.0 ** (2 - layer_bits(fmt, rows, columns) / (rows * columns)) for fmt in formats)
            share = 0.01 * (1 + len(layers)) ** 2
            layers.append(Layer(name=f"{path}.{number}.{name}", rows=rows, columns=columns, share=share, errors=errors))
    made_up = Study(facts={"a": 1}, formats=formats, layers=tuple(layers))
    for fmt, kl in ((SMALL, 3.0), (MIDDLE, 1.0), (LARGE, 0.2)):
        made_up = made_up.with_measured([formats.index(fmt)], kl)
    return made_up


def config(**quant: Any) -> RunConfig:
    return make_config("quick", {"seq_len": 64, "quant": {"group_size": 16, "param_bits": 4} | quant})


def plan_of(study: Study, model: PreTrainedModel, target: str, settings: RunConfig | None = None, **ways: Any) -> Plan:
    return make_plan(study, settings or config(), model, parse_target(target), **ways)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("2.6 bits", "bits", 2.6),
        ("2,5 bits per weight", "bits", 2.5),
        ("3bpw", "bits", 3),
        ("2.6 bits a weight", "bits", 2.6),
        ("70 MB", "file", 70e6),
        ("64 MiB", "file", 64 * 2**20),
        (" 4 GB of memory ", "memory", 4e9),
        ("0.5GB RAM", "memory", 5e8),
    ],
)
def test_targets(text: str, kind: str, amount: float) -> None:
    target = parse_target(text)
    assert (target.kind, target.amount) == (kind, amount)
    assert parse_target(target.words).amount == pytest.approx(amount, rel=1e-3)


@pytest.mark.parametrize("text", ["", "2.6", "many bits", "-3 bits", "0 MB", "70 MB of bits", "9" * 500 + "x"])
def test_what_is_no_target_is_said_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r'give for example "2.6 bits", "70 MB" or "4 GB of memory"') as found:
        parse_target(text)
    assert len(str(found.value)) < 400


def test_predictions_meet_what_was_measured_and_follow_a_power_law_between(study: Study) -> None:
    costs = [study.cost([study.number(fmt)]) for fmt in (LARGE, MIDDLE, SMALL)]
    assert costs == sorted(costs)
    assert [study.predict(cost) for cost in costs] == pytest.approx([0.2, 1.0, 3.0])
    assert study.known([study.number(MIDDLE)]) == 1.0
    assert study.known([study.number(MIDDLE)] * len(study.layers)) == 1.0
    between = math.sqrt(costs[0] * costs[1])
    assert study.predict(between) == pytest.approx(math.sqrt(0.2 * 1.0))
    beyond = costs[2] * 2
    slope = math.log(3.0) / math.log(costs[2] / costs[1])
    assert study.predict(beyond) == pytest.approx(3.0 * 2**slope)
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_shares_are_drawn_towards_those_around_them_and_never_vanish() -> None:
    shares = {"up": [1.0, 2.0, -3.0, 4.0, 5.0, 6.0], "down": [0.0, 0.0, 0.0, 0.0, 0.0, 9.0]}
    layers = [
        Layer(name=f"b.{block}.{kind}", rows=2, columns=5 if kind == "up" else 10, share=shares[kind][block], errors=())
        for block in range(6)
        for kind in shares
    ]
    found = pooled(layers)
    ups, downs = found[::2], found[1::2]
    assert ups[2] == pytest.approx(0.1 * 24 / 180 * 10)
    assert ups[0] == pytest.approx(0.5 * 1 + 0.5 * (1 + 2 - 3) / 3)
    assert ups[5] == pytest.approx(0.5 * 6 + 0.5 * (4 + 5 + 6) / 3)
    # The least is a tenth of the mean cost of a weight: 24 over 180 weights.
    assert downs[0] == pytest.approx(0.1 * 24 / 180 * 20)
    assert downs[3] == pytest.approx(0.5 * 0 + 0.5 * 9 / 5)
    assert downs[5] == pytest.approx(0.5 * 9 + 0.5 * 9 / 3)


def test_one_bit_a_weight_is_chosen_only_where_two_do_not_fit(study: Study, model: PreTrainedModel) -> None:
    assert "w1" not in {fmt.format for fmt in plan_of(study, model, "2.7 bits").formats.values()}
    assert "w1" in {fmt.format for fmt in plan_of(study, model, "1.6 bits").formats.values()}


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@cases(60)
def test_the_curve_never_falls_and_changes_nothing_that_rises(values: list[float]) -> None:
    found = [y for _, y in monotone([(float(x), y) for x, y in enumerate(values)])]
    assert all(after >= before * (1 - 1e-9) for before, after in itertools.pairwise(found))
    assert sum(map(math.log, found)) == pytest.approx(sum(map(math.log, values)), abs=1e-6)
    if values == sorted(set(values)):
        assert found == pytest.approx(values)


def test_a_plan_keeps_to_its_bits_and_is_never_predicted_worse_than_one_format(
    study: Study, model: PreTrainedModel
) -> None:
    for amount in (1.6, 2.4, 2.7, 3.1, 9.0):
        found = plan_of(study, model, f"{amount} bits")
        _, blocks, formats = block_formats(model, found.config.quant)
        assert bits_per_weight(blocks, formats) == pytest.approx(found.chosen.bits)
        assert found.chosen.bits <= amount + 1e-9
        path = "model.layers"
        assert {f"{path}.{n}.{name}": weight_format(f) for n, b in enumerate(formats) for name, f in b.items()} == (
            found.formats
        )
        for one in found.uniforms:
            assert one.bits > found.chosen.bits + 1e-9 or found.chosen.predicted <= one.predicted * (1 + 1e-9)
    kls = [one.predicted for one in found.curve]
    assert kls == sorted(kls, reverse=True)


def test_sizes_of_the_file_and_of_memory_are_kept(study: Study, model: PreTrainedModel) -> None:
    smallest, largest = plan_of(study, model, "1.5 bits"), plan_of(study, model, "9 bits")
    middle = (smallest.size + largest.size) // 2
    found = plan_of(study, model, f"{middle / 1e3} kB")
    assert 0.97 * middle < found.size <= middle
    assert estimate(found.config, model=model, rate=1e12).disk_bytes == found.size
    wanted = (smallest.memory + largest.memory) // 2
    memory = plan_of(study, model, f"{wanted / 1e6} MB of memory")
    assert smallest.memory < memory.memory <= wanted
    assert memory.memory == answering_bytes(estimate(memory.config, model=model, rate=1e12))


@pytest.mark.parametrize(
    ("target", "way_out"),
    [
        ("1 bit", r"the smallest takes 1\.\d+ bits per weight. Give a larger target$"),
        ("9 kB", r"the smallest takes [\d.]+ kB. .* lower quant.embedding_bits \(Embedding bits\), which is 16"),
        ("1 MB of memory", r"the smallest takes [\d.]+ MB. .* or quant.kv_bits \(KV cache bits\)"),
    ],
)
def test_a_target_below_what_formats_reach_is_said(
    study: Study, model: PreTrainedModel, target: str, way_out: str
) -> None:
    with pytest.raises(ConfigError, match=rf"is below what the formats can reach: {way_out}"):
        plan_of(study, model, target)


def test_layers_with_settings_of_their_own(study: Study, model: PreTrainedModel) -> None:
    rules = {"*.down_proj": {"format": "w1+1+1", "group_size": -1, "act_bits": 8}, "*.0.*.q_proj": {"act_bits": 16}}
    rules |= {"*.o_proj": {"act_bits": 8}, "model.layers.0.self_attn.o_proj": {"group_size": 32, "act_bits": 4}}
    rules |= {"*.o_proj": {"act_bits": 8}, "model.layers.0.self_attn.o_proj": {"group_size": 32, "act_bits": 4}}
    settings = config(overrides=rules)
    with pytest.raises(
        ConfigError, match=r"layers.0.self_attn.o_proj and 2 more: the format is set already, to W\(1\+1\),"
    ):
        plan_of(study, model, "2.6 bits", settings)
    kept = plan_of(study, model, "2.6 bits", settings, overridden="keep")
    names = ("0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.down_proj")
    assert kept.kept == tuple(f"model.layers.{name}" for name in names)
    new = plan_of(study, model, "2.6 bits", settings, overridden="replace")
    for found in (kept, new):
        before, after = settings.quant, found.config.quant
        for name in found.formats:
            was, now = before.layer(name), after.layer(name)
            assert was is not None
            assert now is not None
            assert now.act_bits == was.act_bits
            if name in found.kept:
                assert now == was
        assert found.chosen.bits <= 2.6
    assert new.kept == ()
    assert new.chosen.predicted <= kept.chosen.predicted


def test_one_format_is_the_plan_where_it_was_measured_to_be_better(study: Study, model: PreTrainedModel) -> None:
    first = plan_of(study, model, "2.7 bits")
    assert first.chosen.uniform is None
    assert first.uniform is not None
    assert first.uniform.measured == 3.0
    worse = study.with_measured(first.chosen.formats, 9.0)
    found = plan_of(worse, model, "2.7 bits")
    assert found.rejected is not None
    assert found.rejected.measured == 9.0
    assert found.chosen == found.uniform
    assert len(set(found.formats.values())) == 1
    better = study.with_measured(first.chosen.formats, 0.5)
    assert plan_of(better, model, "2.7 bits").chosen.measured == 0.5


def test_a_format_that_was_not_studied_is_refused(study: Study, model: PreTrainedModel) -> None:
    settings = config(overrides={"*.o_proj": {"group_size": 24}})
    with pytest.raises(ConfigError, match="groups of 24, 4-bit parameters: this format was not measured"):
        plan_of(study, model, "2.6 bits", settings, overridden="keep")
