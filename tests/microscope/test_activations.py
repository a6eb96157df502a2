"""Inputs of layers, keys and values: against hooks on a copy, and their quantizers against the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.errors import ConfigError, ModelError
from lbllm.microscope.activations import activations, cache, grid_values
from lbllm.microscope.pair import Pair, Side
from lbllm.quant.activations import ActQuantizer, decode, encode
from lbllm.quant.kv_cache import PackedKVLayer
from tests.helpers.cases import cases
from tests.helpers.tiny_models import SENTENCES
from tests.helpers.tiny_pairs import tiny_pair

TEXT = SENTENCES[4]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return tiny_pair(request.param, skip=("*.0.mlp.up_proj",), overrides={"*.1.mlp.up_proj": {"act_bits": 16}})


@torch.no_grad()
def inputs_of(pair: Pair, side: Side, block: int, layer: str) -> torch.Tensor:
    model: Any = copy.deepcopy(pair.model(side))
    box: list[torch.Tensor] = []
    model.get_submodule(f"{pair.path}.{block}.{layer}").register_forward_pre_hook(
        lambda _, args: box.append(args[0][0].clone())
    )
    model(input_ids=pair.ids(TEXT)[0], use_cache=False)
    return box[0]


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_inputs_are_those_of_the_model(pair: Pair, side: Side) -> None:
    for block, layer in ((0, "self_attn.q_proj"), (1, "mlp.down_proj")):
        view = activations(pair, block, layer, TEXT, side=side)
        wanted = inputs_of(pair, side, block, layer)
        assert torch.equal(view.inputs, wanted)
        assert "".join(view.pieces) == TEXT
        assert view.maxima == tuple(wanted.abs().amax(0).tolist())
        assert sum(view.spread.counts) == wanted.numel()
        assert (view.spread.edges[0], view.spread.edges[-1]) == (float(wanted.min()), float(wanted.max()))
        largest = view.peaks[0]
        assert abs(largest.value) == float(wanted.abs().max())
        assert float(wanted[largest.token, largest.channel]) == largest.value
        assert view.pieces[largest.token] == largest.piece
        assert largest.times == pytest.approx(abs(largest.value) / float(wanted.abs().median()))
        assert [abs(peak.value) for peak in view.peaks] == sorted(view.maxima, reverse=True)[: len(view.peaks)]


def test_the_quantizer_is_the_layers_own(pair: Pair) -> None:
    view = activations(pair, 1, "mlp.down_proj", TEXT, token=2)
    own = pair.packed(1, "mlp.down_proj").quantizer
    assert own is not None
    found = view.quantizer
    assert found is not None
    assert (found.knee, found.clip_low, found.clip_high) == pytest.approx((0.4, 0.9, 0.95))
    assert (found.bits, found.size, found.token, len(found.ranges)) == (4, 16, 2, 6)
    with torch.no_grad():
        rounded = own(view.inputs)
    error = (view.inputs - rounded).double().square().sum() / view.inputs.double().square().sum()
    assert found.error == pytest.approx(float(error), rel=1e-6)
    weight = pair.weight(1, "mlp.down_proj").double()
    exact, other = view.inputs.double() @ weight.t(), rounded.double() @ weight.t()
    assert found.output_error == pytest.approx(float((exact - other).square().sum() / exact.square().sum()), rel=1e-3)
    for part in found.ranges:
        columns = slice(part.first, part.last + 1)
        assert (part.low, part.high) == tuple(float(end) for end in view.inputs[2, columns].aminmax())
        values = torch.tensor(part.values)
        assert 0.0 in part.values
        assert float((rounded[2, columns, None] - values).abs().amin(-1).max()) < 1e-6
    assert view.words == "The inputs of mlp.down_proj are quantized: A4, ranges of 16 inputs."


def test_where_there_is_no_quantizer_it_says_what_4_bits_would_do(pair: Pair) -> None:
    plain, dense = (activations(pair, block, "mlp.up_proj", TEXT) for block in (1, 0))
    assert plain.quantizer is None
    assert dense.quantizer is None
    assert plain.words.startswith("The inputs of mlp.up_proj are not quantized (A16). Shown is what 4 bits")
    assert dense.words.startswith("The inputs of mlp.up_proj are not quantized: the layer is dense. Shown")
    # 48 inputs are less than the 64 of a range.
    assert [trial.name for trial in plain.trials] == ["A4, one range a token"] * 2
    wide = activations(pair, 1, "mlp.down_proj", TEXT)
    assert [trial.name for trial in wide.trials] == ["A4, ranges of 64 inputs", "A4, one range a token"]
    assert [len(trial.ranges) for trial in wide.trials] == [2, 1]
    assert 0 < wide.trials[0].output_error < wide.trials[1].output_error * 1.5


@given(st.integers(0, 6), st.floats(0.02, 1), st.integers(0, 2), st.integers(0, 1000))
@cases(25)
def test_a_grids_values_are_all_that_a_quantizer_gives(tail: int, knee: float, signs: int, seed: int) -> None:
    quantizer = ActQuantizer(4, tail).requires_grad_(False)
    quantizer.act.data[0] = knee
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed))
    x = (x, x.abs(), -x.abs())[signs]
    grid = quantizer.grid(x)
    values = grid_values(type(grid)(*(part[0] for part in grid)), 4, tail)
    assert list(values) == sorted(set(values))
    assert len(values) <= 16
    many = torch.linspace(float(x.min()) * 1.1, float(x.max()) * 1.1, 5000)[None]
    assert set(decode(encode(many, grid, 4, tail), grid)[0].tolist()) <= set(values)


@pytest.mark.parametrize(("architecture", "kv_bits"), [("llama", 4), ("qwen2", 8), ("gemma3", 4), ("llama", 16)])
def test_keys_and_values_are_those_of_the_cache(architecture: str, kv_bits: int) -> None:
    pair = tiny_pair(architecture, kv_bits=kv_bits)
    block = pair.blocks - 1
    with torch.no_grad():
        output: Any = copy.deepcopy(pair.student.model)(input_ids=pair.ids(TEXT)[0], use_cache=True)
    layer = output.past_key_values.layers[block]
    view = cache(pair, block, TEXT)
    assert view.bits == kv_bits
    assert ("KV16" in view.words) == (kv_bits == 16)
    assert isinstance(layer, PackedKVLayer)
    for part, store in zip((view.keys, view.values), layer.stores, strict=True):
        assert store is not None
        codes, scale = store
        if kv_bits == 16:
            assert torch.equal(part.states.half(), codes[0])
        else:
            assert torch.equal(torch.stack((part.low, part.step), -1).half(), scale[0])
        bits = min(kv_bits, 4 if kv_bits == 16 else 8)
        near = (part.states - part.stored).abs()
        assert float((near - part.step[..., None]).max()) < 1e-3
        assert len(((part.stored - part.low[..., None]) / part.step[..., None]).round().unique()) <= 2**bits
        error = (part.states - part.stored).double().square().sum() / part.states.double().square().sum()
        assert part.error == pytest.approx(float(error), rel=1e-6)
        assert part.maxima[1] == tuple(part.states[1].abs().amax(0).tolist())
        assert sum(part.spread.counts) == part.states.numel()
        most = part.states[part.head, part.token]
        assert part.grid is not None
        assert float(most.abs().max()) == float(part.states.abs().max())
        assert (part.grid.low, part.grid.high) == (float(most.min()), float(most.max()))
        assert len(part.grid.values) == 2**bits
        assert set(part.stored[part.head, part.token].tolist()) <= set(part.grid.values)


def test_what_can_not_be_is_said(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="there is no block 7"):
        activations(pair, 7, "mlp.up_proj", TEXT)
    with pytest.raises(ConfigError, match="block 0 has no layer 'up'"):
        activations(pair, 0, "up", TEXT)
    with pytest.raises(ConfigError, match="there is no token 99; this text has tokens 0 to"):
        activations(pair, 0, "mlp.up_proj", TEXT, token=99)
    with pytest.raises(ModelError, match="the text has 1 token"):
        activations(pair, 0, "mlp.up_proj", "a")
    with pytest.raises(ConfigError, match="there is no block 7"):
        cache(pair, 7, TEXT)
