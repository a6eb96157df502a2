"""Bit planes against Python integers; 8-bit group parameters against their error bound and against encoding twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbllm.packing import decode_params, encode_params, pack_plane, unpack_plane


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 70), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_unpack_is_the_exact_inverse_of_pack(outer: list[int], in_features: int, seed: int) -> None:
    plane = randn(*outer, in_features, seed=seed) > 0
    packed = pack_plane(plane)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*outer, -(-in_features // 8))
    assert torch.equal(unpack_plane(packed, in_features), plane)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@settings(deadline=None)
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
@settings(max_examples=200, deadline=None)
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
@settings(max_examples=200, deadline=None)
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
