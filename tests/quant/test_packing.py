"""Bit planes against Python integers; group parameters of 8 and 4 bits against error bounds and encoding twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.quant.packing import (
    ParamGrid,
    decode_params,
    encode_params,
    fit_grid,
    pack_nibbles,
    pack_plane,
    stored_params,
    unpack_nibbles,
    unpack_plane,
)
from tests.helpers.cases import cases


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 70), st.integers(0, 2**32))
@cases(100)
def test_unpack_is_the_exact_inverse_of_pack(outer: list[int], in_features: int, seed: int) -> None:
    plane = randn(*outer, in_features, seed=seed) > 0
    packed = pack_plane(plane)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*outer, -(-in_features // 8))
    assert torch.equal(unpack_plane(packed, in_features), plane)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@cases(100)
def test_a_row_is_a_little_endian_number(bits: list[bool]) -> None:
    number = sum(bit << j for j, bit in enumerate(bits))
    packed = pack_plane(torch.tensor(bits))
    assert bytes(packed.tolist()) == number.to_bytes(-(-len(bits) // 8), "little")


def test_bits_past_the_end_of_a_row_are_zero() -> None:
    assert pack_plane(torch.ones(2, 9, dtype=torch.bool)).tolist() == [[255, 1], [255, 1]]


@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([2, 4]),
    st.floats(-1, 1),
    st.floats(1e-4, 1),
    st.integers(0, 2**32),
)
@cases(200)
def test_8_bit_parameters_are_off_by_half_a_step(
    rows: int, groups: int, count: int, mean: float, spread: float, seed: int
) -> None:
    params = mean + spread * randn(rows, groups, count, seed=seed)
    codes, scale = encode_params(params)
    assert codes.dtype == torch.uint8
    assert scale.dtype == torch.float16
    assert codes.shape == params.shape
    assert scale.shape == (rows, count, 2)
    low, high = params.double().amin(1, keepdim=True), params.double().amax(1, keepdim=True)
    # Half a step, and the rounding of the minimum and of 255 steps to float16's 11 bits or to its smallest number.
    bound = 1.01 * ((high - low) / 510 + (low.abs() + high - low) * 2**-11 + 255 * 2**-25)
    assert ((decode_params(codes, scale) - params).double().abs() <= bound).all()


@given(st.integers(1, 5), st.integers(1, 12), st.floats(-1, 1), st.floats(1e-5, 1), st.integers(0, 2**32))
@cases(200)
def test_encoding_decoded_parameters_changes_nothing(
    rows: int, groups: int, mean: float, spread: float, seed: int
) -> None:
    """A layer is rounded when its block is saved and encoded when it is packed: both must mean the same numbers."""
    once = decode_params(*encode_params(mean + spread * randn(rows, groups, 4, seed=seed)))
    again = decode_params(*encode_params(once))
    torch.testing.assert_close(again, once, rtol=3e-7, atol=0)


def test_parameters_of_usual_size_survive_any_number_of_encodings_bit_by_bit() -> None:
    params = 0.03 + 0.004 * torch.rand(64, 3, 4, generator=torch.Generator().manual_seed(0))
    once = encode_params(params)
    again = encode_params(decode_params(*once))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.0312345, -0.7, 1e-5, -3e-8, 300.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_constant_rows_are_exact_to_float16(value: float, groups: int) -> None:
    params = torch.full((2, groups, 4), value)
    assert torch.equal(decode_params(*encode_params(params)), params.half().float())


def test_float16_parameters_are_decoded_as_they_are() -> None:
    params = randn(3, 2, 4).half()
    assert torch.equal(decode_params(params, None), params.float())


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
@cases(100)
def test_two_codes_are_the_digits_of_a_byte(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.uint8))
    assert packed.tolist() == [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert unpack_nibbles(packed).tolist() == codes


def layer_params(rows: int, groups: int, count: int, seed: int) -> Tensor:
    """Parameters as a layer's groups have them: alphas above zero, rows of different scale."""
    params = 0.3 * randn(rows, groups, count, seed=seed)
    params[..., 0::2] = params[..., 0::2].abs() + 0.5
    return params * (1 + randn(rows, 1, 1, seed=seed + 1).abs()) / 16


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([2, 4]), st.integers(0, 2**32))
@cases(100)
def test_4_bit_parameters_take_the_nearest_of_sixteen_values(rows: int, groups: int, count: int, seed: int) -> None:
    params = layer_params(rows, groups, count, seed)
    grid = fit_grid(params)
    assert grid.scale.shape == (rows,)
    assert grid.ranges.shape == (count, 2)
    codes = grid.codes(params)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= 15
    # Every value that a code can stand for, by the layout's own words.
    affine = (grid.scale.double()[:, None, None] * grid.ranges.double()).half().double()
    values = affine[:, None, :, :1] + affine[:, None, :, 1:] * torch.arange(16)
    rounded = decode_params(codes, grid.affine())
    nearest = (values - params.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((rounded.double() - params.double()).abs(), nearest, rtol=1e-4, atol=1e-7)
    assert torch.equal(stored_params(params, 4, grid), rounded)
    assert torch.equal(grid.round(rounded), rounded)


@given(st.integers(1, 6), st.integers(2, 60), st.integers(0, 2**32))
@cases(50)
def test_a_grid_fits_better_than_one_from_the_least_to_the_greatest(rows: int, groups: int, seed: int) -> None:
    params = layer_params(rows, groups, 4, seed)
    params[0, 0] *= 5  # one group that would spread the grid for all others
    found = fit_grid(params)
    units = params / found.scale.float()[:, None, None]
    least, most = units.amin((0, 1)), units.amax((0, 1))
    whole = ParamGrid(found.scale, torch.stack((least, (most - least) / 15), -1).half())
    errors = [float((stored_params(params, 4, grid) - params).square().sum()) for grid in (found, whole)]
    assert errors[0] <= errors[1] * 1.001


def test_rows_of_zeros_and_equal_groups_have_a_grid() -> None:
    assert torch.equal(stored_params(torch.zeros(3, 5, 4), 4), torch.zeros(3, 5, 4))
    same = torch.tensor([0.05, 0.0, 0.02, 0.001]).expand(3, 5, 4)
    torch.testing.assert_close(stored_params(same, 4), same, rtol=2e-3, atol=1e-6)
