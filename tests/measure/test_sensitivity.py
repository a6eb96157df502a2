"""Which layers get more bits: the estimate against its formula, measured kinds, and the choice against all others."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.errors import ConfigError, ResourceError
from lbllm.measure.perplexity import divergence
from lbllm.measure.sensitivity import (
    Option,
    Sensitivity,
    allocate,
    as_overrides,
    sensitivities,
    with_measured_kinds,
)
from lbllm.models.blocks import decoder_blocks, linear_weight, set_linear_weight, share_copy
from lbllm.quant.plan import bits_per_weight, block_formats
from lbllm.quant.table import clustered
from lbllm.sections import LayerFormat, QuantConfig
from tests.helpers.cases import cases
from tests.helpers.tiny_runs import tiny_teacher, token_ids

SIZES = (8, 16, 48)
FORMATS = [LayerFormat(format="w1+1", group_size=size, param_bits=16, act_bits=16) for size in SIZES]


@pytest.fixture(scope="module")
def found() -> list[Sensitivity]:
    return sensitivities(tiny_teacher("llama"), FORMATS, token_ids(3), wanted=lambda name: ".1." in name)


def test_the_estimate_is_half_the_squared_gradient_times_the_squared_error(found: list[Sensitivity]) -> None:
    model = tiny_teacher("llama").model
    assert len(found) == 7
    one = next(one for one in found if one.kind == "v_proj")
    layer = model.get_submodule(one.name)
    total = 0.0
    for sequence in token_ids(3).split(1):
        kept: list[torch.Tensor] = []
        with torch.enable_grad():
            layer.weight.requires_grad_()

            def keep(
                module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor, into: list[torch.Tensor] = kept
            ) -> None:
                output.retain_grad()
                into.extend((args[0], output))

            hook = layer.register_forward_hook(keep)
            logits = model(input_ids=sequence[:, :-1]).logits[0]
            torch.nn.functional.cross_entropy(logits, sequence[0, 1:], reduction="sum").backward()
            hook.remove()
        assert kept[1].grad is not None
        error = clustered(linear_weight(layer).detach(), FORMATS[1]) - linear_weight(layer).detach()
        moved = kept[0].detach()[0].double() @ error.double().t()
        total += float((moved.square() * kept[1].grad[0].double().square()).sum()) / 2
    assert one.options[1].rise == pytest.approx(total / (3 * 31), rel=2e-2)  # the errors are kept in bfloat16
    rises = [option.rise for option in one.options]
    assert rises == sorted(rises)
    assert [option.bits for option in one.options] == sorted((option.bits for option in one.options), reverse=True)


def test_measured_kinds_add_up_to_what_is_measured(found: list[Sensitivity]) -> None:
    teacher, windows = tiny_teacher("llama"), token_ids(2, seed=4)
    scaled = with_measured_kinds(teacher, found, windows, reference=1)
    one = next(one for one in scaled if one.kind == "down_proj")
    model = share_copy(teacher.model)
    layer = model.get_submodule(one.name)
    set_linear_weight(layer, clustered(linear_weight(layer), FORMATS[1]))
    assert one.options[1].rise == pytest.approx(divergence(teacher.model, model, windows).kl, rel=1e-6)
    before = next(other for other in found if other.name == one.name)
    assert one.options[0].rise / one.options[1].rise == pytest.approx(before.options[0].rise / before.options[1].rise)


def test_a_choice_becomes_the_format_of_the_model(found: list[Sensitivity]) -> None:
    model = tiny_teacher("llama").model
    chosen = allocate(found, 5.0)
    quant = QuantConfig(group_size=16, skip=("*.0.*",), overrides=as_overrides(chosen))
    _, blocks, formats = block_formats(model, quant)
    path = decoder_blocks(model)[0]
    named = {f"{path}.1.{name}": fmt.group_size for name, fmt in formats[1].items()}
    assert named == {name: option.format.group_size for name, option in chosen.items()}
    assert len(set(named.values())) > 1
    assert 4.3 < bits_per_weight(blocks, formats) <= 5.0


@st.composite
def layers(draw: st.DrawFn) -> list[Sensitivity]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        bits = draw(st.lists(st.integers(10, 40), min_size=1, max_size=3, unique=True))
        options = tuple(Option(FORMATS[0], size, draw(st.integers(0, 50))) for size in bits)
        made.append(Sensitivity(f"block.{number}", 10, options))
    return made


@given(layers(), st.integers(10, 40))
@cases(100)
def test_no_choice_with_a_step_less_is_better(made: list[Sensitivity], budget: int) -> None:
    least = sum(min(option.bits for option in one.options) for one in made) / (10 * len(made))
    if budget / 10 < least:
        with pytest.raises(ConfigError, match="bits per weight are too few: the smallest formats take"):
            allocate(made, budget / 10)
        return
    chosen = allocate(made, budget / 10)
    assert sum(option.bits for option in chosen.values()) <= budget * len(made)
    step = max(max(o.bits for o in one.options) - min(o.bits for o in one.options) for one in made)
    every = itertools.product(*(one.options for one in made))
    fitting = [options for options in every if sum(o.bits for o in options) <= budget * len(made) - step]
    best = min((sum(o.rise for o in options) for options in fitting), default=float("inf"))
    assert sum(option.rise for option in chosen.values()) <= best


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm.measure.sensitivity.free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match=r"in 3 formats take .* more than is free; give fewer formats"):
        sensitivities(tiny_teacher("llama"), FORMATS, token_ids(1))
