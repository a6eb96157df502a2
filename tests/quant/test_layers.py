"""The two forms of a binarized layer: the same output, the bits they say, gradients of a dense formulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lbllm.models.blocks import linear_weight
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import (
    LEVELS,
    assign,
    from_groups,
    group_length,
    levels_to_params,
    params_to_levels,
    to_groups,
)
from lbllm.quant.packed_layer import PackedLinear, named_groups
from lbllm.quant.plan import layer_bits
from lbllm.quant.table import fit_format
from lbllm.quant.training_layer import BinaryLinear, Mode
from lbllm.sections import WHOLE_ROW, Format, LayerFormat
from tests.helpers.cases import cases


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_format(
    format_: Format = "w1+1",
    group_size: int = 16,
    param_bits: int = 16,
    act_bits: int = 16,
    act_group_size: int = WHOLE_ROW,
) -> LayerFormat:
    bits = {"param_bits": param_bits, "act_bits": act_bits, "act_group_size": act_group_size}
    return LayerFormat.model_validate({"format": format_, "group_size": group_size} | bits)


def dense(kind: type[nn.Module], out_features: int, in_features: int, *, bias: bool = True) -> nn.Module:
    """A random linear layer, stored as torch or as GPT-2 does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(out_features * in_features)
        if kind is nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
        layer = Conv1D(out_features, in_features).requires_grad_(False)
        layer.bias.normal_()
        return layer


def binarized(source: nn.Module, fmt: LayerFormat) -> BinaryLinear:
    """The source clustered group by group."""
    weight = linear_weight(source)
    length = group_length(fmt.group_size, weight.shape[1])
    groups = to_groups(weight, length)
    levels, table = fit_format(groups, to_groups(torch.ones_like(weight), length), fmt.format, 5)
    index = from_groups(assign(groups, levels), weight.shape[1]).contiguous()
    layer = BinaryLinear(source, fmt, levels_to_params(levels, table), index, table=table)
    if fmt.act_bits < 16:
        layer.quantizer = ActQuantizer(fmt.act_bits, 2, group_size=fmt.act_group_size)
        layer.quantizer.act.data.copy_(torch.tensor([0.35, 0.9, 0.95]))
    layer.round_params()
    return layer


def written_out(layer: BinaryLinear) -> Tensor:
    """The weight (out, in) in float64 by the paper's equation, one weight at a time."""
    weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.float64)
    for row, column in itertools.product(range(layer.out_features), range(layer.in_features)):
        params = layer.params[row, column // layer.length].tolist()
        index = int(layer.index[row, column])
        if layer.table is not None:
            weight[row, column] = params[0] * float(layer.table[index])
            continue
        if len(params) == 2:
            B, G, params = 2 * index - 1, 1, [*params, 0.0, 0.0]
        else:
            B, G = (1 if index >= 2 else -1), (1 if index in (0, 3) else 0)
        weight[row, column] = G * (params[0] * B + params[1]) + (1 - G) * (params[2] * B + params[3])
    return weight


KINDS: tuple[Format, ...] = ("w1+1", "w1")
FORMATS = (
    [
        layer_format(format_, group_size, param_bits, act_bits)
        for format_, (group_size, param_bits), act_bits in itertools.product(
            KINDS, ((16, 16), (16, 8), (5, 8), (-1, 16), (-1, 8), (7, 16), (16, 4), (5, 4), (-1, 4)), (16, 8, 4)
        )
    ]
    + [
        layer_format("w1+1+1", group_size, param_bits, act_bits)
        for group_size, param_bits, act_bits in (
            (16, 16, 16),
            (-1, 16, 4),
            (5, 8, 16),
            (16, 4, 8),
            (7, 4, 16),
            (-1, 4, 16),
        )
    ]
    + [
        layer_format(group_size=8, param_bits=param_bits, act_bits=act_bits, act_group_size=size)
        for param_bits, act_bits, size in itertools.product((16, 4), (8, 4), (16, 7, 64))
    ]
)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@torch.no_grad()
def test_trained_and_packed_form_give_the_same_output(fmt: LayerFormat, kind: type[nn.Module]) -> None:
    source = dense(kind, 6, 37)
    layer = binarized(source, fmt)
    packed = PackedLinear.pack(layer, 2, torch.float32)
    x = torch.randn(2, 9, 37, generator=random())
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.dequantize(), layer.weight())
    expected = (x if layer.quantizer is None else layer.quantizer(x)).double() @ written_out(layer).t()
    assert isinstance(source.bias, Tensor)
    expected += source.bias.double()
    assert float((packed(x) - expected).norm() / expected.norm()) < 1e-6


@given(
    st.sampled_from(["w1+1", "w1", "w1+1+1"]),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 45) | st.just(-1),
    st.sampled_from([4, 8, 16]),
    st.booleans(),
)
@cases(80)
@torch.no_grad()
def test_any_shape_is_packed_exactly_and_takes_the_bits_it_says(
    format_: Format, out_features: int, in_features: int, group_size: int, param_bits: int, bias: bool
) -> None:
    fmt = layer_format(format_, group_size, param_bits)
    layer = binarized(dense(nn.Linear, out_features, in_features, bias=bias), fmt)
    packed = PackedLinear.pack(layer, 2, torch.float32)
    assert torch.equal(packed.dequantize(), layer.weight())
    assert layer_bits(fmt, out_features, in_features) == 8 * sum(buffer.nbytes for buffer in packed.buffers())
    # An empty layer, as a checkpoint is read into, has the same tensors.
    empty = PackedLinear(in_features, out_features, fmt, bias=bias, tail=2, dtype=torch.float32)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in packed.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    empty.load_state_dict(packed.state_dict())
    x = torch.randn(3, in_features, generator=random())
    assert torch.equal(empty(x), packed(x))


def test_bits_of_well_known_formats() -> None:
    """Two bits a weight and four parameters a group: 2.5 at group 128 with float16, 3.0 at 64."""
    assert layer_bits(layer_format(group_size=128), 100, 1024) / (100 * 1024) == 2.5
    assert layer_bits(layer_format(group_size=64), 100, 1024) / (100 * 1024) == 3.0
    assert layer_bits(layer_format("w1", 128), 100, 1024) / (100 * 1024) == 1.25
    # 8 bits a parameter, and for each row and parameter a minimum and a step of 16 bits.
    assert layer_bits(layer_format(group_size=128, param_bits=8), 1, 4096) / 4096 == 2.25 + 4 * 32 / 4096
    # 4 bits a parameter, 16 for the scale of each row, and for each parameter two of 16 for the whole layer.
    assert layer_bits(layer_format(group_size=16, param_bits=4), 10, 1024) / 10240 == 3 + 16 / 1024 + 8 * 16 / 10240
    # Three bits a weight, one scale a row or group, eight values for the whole layer.
    assert layer_bits(layer_format("w1+1+1", -1), 10, 1024) / 10240 == 3 + 16 / 1024 + 8 * 16 / 10240
    small = layer_bits(layer_format("w1+1+1", 64, param_bits=4), 10, 1024) / 10240
    assert small == 3 + 4 / 64 + 16 / 1024 + (8 + 2) * 16 / 10240


@torch.no_grad()
def test_packed_tensors_are_contiguous_and_the_layer_has_no_other() -> None:
    packed = PackedLinear.pack(
        binarized(dense(nn.Linear, 4, 20), layer_format(param_bits=8, act_bits=4)), 2, torch.half
    )
    assert set(packed.state_dict()) == {"weight", "params", "params_scale", "bias", "quantizer.act"}
    assert all(tensor.is_contiguous() for tensor in packed.state_dict().values())
    assert packed.bias is not None
    assert packed.bias.dtype == torch.half


@torch.no_grad()
def test_packed_layer_computes_in_the_inputs_dtype() -> None:
    packed = PackedLinear.pack(binarized(dense(nn.Linear, 4, 20), layer_format(act_bits=4)), 2, torch.bfloat16)
    x = torch.randn(3, 20, generator=random())
    assert packed(x).dtype == torch.float32
    assert packed(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("act_bits", [16, 8, 4])
@pytest.mark.parametrize("format_", ["w1+1", "w1"])
def test_gradients_of_a_frozen_layer(format_: Format, act_bits: int) -> None:
    """Against a dense layer whose weight is one-hot level choices times the levels' own formula."""
    layer = binarized(dense(nn.Linear, 5, 21), layer_format(format_, 8, act_bits=act_bits))
    x = torch.randn(11, 21, generator=random())
    direction = torch.randn(11, 5, generator=random(1))
    leaf = x.clone().requires_grad_()
    got = torch.autograd.grad((layer(leaf) * direction).sum(), [leaf, layer.params])

    params = layer.params.detach().double().requires_grad_()
    B = (layer.index >= 2).double() * 2 - 1 if format_ == "w1+1" else layer.index.double() * 2 - 1
    G = ((layer.index == 0) | (layer.index == 3)).double() if format_ == "w1+1" else torch.ones(5, 21).double()
    spread = params.repeat_interleave(8, 1)[:, :21]
    outer, inner = spread[..., 0] * B + spread[..., 1], spread[..., -2] * B + spread[..., -1]
    weight = G * outer + (1 - G) * inner
    leaf = x.clone().requires_grad_()
    quantized = leaf if layer.quantizer is None else layer.quantizer(leaf)
    loss = (quantized.double() @ weight.t() * direction.double()).sum()
    wanted = torch.autograd.grad(loss, [leaf, params])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-4, atol=1e-4)


def trained(layer: BinaryLinear) -> Iterator[nn.Parameter]:
    for parameter in (layer.latent, layer.params, layer.bitmap):
        if parameter is not None:
            yield parameter


@pytest.mark.parametrize("format_", ["w1+1", "w1"])
def test_latent_weights_that_fit_the_bits_are_kept_and_others_become_their_level(format_: Format) -> None:
    source = dense(nn.Linear, 12, 50)
    layer, latent = binarized(source, layer_format(format_)), linear_weight(source)
    levels = params_to_levels(layer.params).sort(-1).values
    layer.index = from_groups(assign(to_groups(latent, layer.length), levels), 50).contiguous()
    assert torch.equal(layer.nearest_to(latent), latent)
    changed = latent.clone()
    changed[3, 7] = float(levels[3, 0, 0]) if layer.index[3, 7] else float(levels[3, 0, -1])
    expected = latent.clone()
    expected[3, 7] = layer.weight()[3, 7]
    assert torch.equal(layer.nearest_to(changed), expected)


@pytest.mark.parametrize("mode", ["coupled", "relaxed"])
@pytest.mark.parametrize("group_size", [8, -1])
def test_thawing_and_freezing_without_training_changes_nothing_but_the_bitmaps_softness(
    mode: str, group_size: int
) -> None:
    source = dense(nn.Linear, 5, 21)
    layer = binarized(source, layer_format(group_size=group_size))
    before = layer.weight().detach().clone()
    layer.thaw(before, mode)  # type: ignore[arg-type]
    softness = 0.0 if mode == "coupled" else 0.2 * float(before.abs().max())
    assert float((layer.weight().detach() - before).abs().max()) <= softness + 1e-6
    layer.freeze()
    assert layer.mode == "frozen"
    torch.testing.assert_close(layer.weight().detach(), before)
    assert list(trained(layer)) == [layer.params]


@pytest.mark.parametrize(("mode", "format_"), [("coupled", "w1+1"), ("coupled", "w1"), ("relaxed", "w1+1")])
def test_a_trained_layer_freezes_to_what_it_computed(mode: str, format_: Format) -> None:
    """Also where training has crossed pairs of levels and turned alphas negative."""
    layer = binarized(dense(nn.Linear, 12, 21), layer_format(format_, 8))
    layer.thaw(torch.randn(12, 21, generator=random()), mode)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in trained(layer):
            parameter.add_(torch.randn(parameter.shape, generator=random(1)) * 0.3)
        if layer.bitmap is not None:
            layer.bitmap.copy_((layer.bitmap > 0.5).float())
    computed = layer.weight().detach().clone()
    layer.freeze()
    torch.testing.assert_close(layer.weight().detach(), computed)
    assert (layer.params[..., ::2] >= 0).all()
    assert int(layer.index.max()) < LEVELS[format_]
    packed = PackedLinear.pack(layer, 2, torch.float32)
    torch.testing.assert_close(packed.dequantize(), computed, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["coupled", "relaxed"])
def test_every_trained_parameter_of_a_thawed_layer_gets_a_gradient(mode: str) -> None:
    layer = binarized(dense(nn.Linear, 5, 21), layer_format(group_size=8))
    layer.thaw(torch.randn(5, 21, generator=random()), mode)  # type: ignore[arg-type]
    layer(torch.randn(30, 21, generator=random())).square().sum().backward()
    for parameter in trained(layer):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert float((parameter.grad != 0).float().mean()) > 0.5


def test_a_kept_dense_weight_is_the_same_weight() -> None:
    layer = binarized(dense(nn.Linear, 5, 21), layer_format(act_bits=4))
    x = torch.randn(3, 21, generator=random())
    before = layer(x).detach()
    layer.keep_dense()
    assert torch.equal(layer(x), before)


def test_rounding_twice_is_rounding_once() -> None:
    for param_bits in (4, 8, 16):
        layer = binarized(dense(nn.Linear, 5, 64), layer_format(group_size=16, param_bits=param_bits))
        once = layer.params.detach().clone()
        layer.round_params()
        assert torch.equal(layer.params, once)


@pytest.mark.parametrize("mode", ["coupled", "relaxed"])
@pytest.mark.parametrize("group_size", [4, 16, 7])
def test_4_bit_parameters_are_trained_as_they_are_deployed(mode: Mode, group_size: int) -> None:
    source = dense(nn.Linear, 6, 37)
    layer = binarized(source, layer_format(group_size=group_size, param_bits=4))
    layer.thaw(linear_weight(source), mode)
    with torch.no_grad():
        layer.params.add_(0.02 * torch.randn(layer.params.shape, generator=random()))  # off the grid, as by steps
        if layer.bitmap is not None:
            layer.bitmap.round_()
    weight = layer.weight()
    weight.sum().backward()
    assert layer.params.grad is not None
    assert float((layer.params.grad != 0).float().mean()) > 0.3
    layer.freeze()
    layer.round_params()
    assert layer.grid is not None
    assert torch.equal(layer.grid.round(layer.params), layer.params)
    torch.testing.assert_close(layer.weight(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(PackedLinear.pack(layer, 2, torch.float32).dequantize(), layer.weight(), rtol=0, atol=0)


def test_groups_and_ranges_are_named() -> None:
    def packed(group_size: int, act_group_size: int) -> PackedLinear:
        fmt = layer_format(group_size=group_size, act_bits=4, act_group_size=act_group_size)
        return PackedLinear.pack(binarized(dense(nn.Linear, 4, 64), fmt), 2, torch.float32)

    assert named_groups([packed(16, -1), packed(32, -1)]) == "groups of 32 and 16"
    assert named_groups([packed(16, 32), packed(-1, 32)]) == "groups of 16 and whole rows, ranges of 32 inputs"
    assert named_groups([packed(16, 64), packed(16, 100)]) == "groups of 16"  # of 64 inputs that is one range
