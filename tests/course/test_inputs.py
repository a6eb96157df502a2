"""What lessons 7 and 8 measure of inputs, against definitions written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.course.inputs import (
    BITS,
    channels_of_largest,
    even_quantizer,
    knee_quantizer,
    largest_channels,
    largest_to_median,
    range_values,
    round_apart,
    share_of_zeros,
    step,
    tail_step,
)
from lbllm.sections import WHOLE_ROW


def inputs(tokens: int, width: int, seed: int) -> Tensor:
    """Inputs (tokens, width) with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, :: max(1, width // 3)] *= 20
    return x


shapes = st.tuples(st.integers(1, 4), st.integers(2, 70), st.integers(0, 2**16))


@given(shapes)
def test_even_values(shape: tuple[int, int, int]) -> None:
    """The grid of one token is written out: evenly spaced, with zero in it, from the smallest to the largest input."""
    x = inputs(*shape)
    rounded = round_apart(x, even_quantizer(BITS), [])
    values = x.double().numpy()
    for row, token in enumerate(values):
        low, high = min(token.min(), 0.0), max(token.max(), 0.0)
        distance = (high - low) / (2**BITS - 1)
        zero = round(-low / distance)
        grid = (np.arange(2**BITS) - zero) * distance
        assert step(x[row], even_quantizer(BITS)) == pytest.approx(distance, rel=1e-5)
        np.testing.assert_allclose(range_values(x[row], even_quantizer(BITS)), grid, atol=1e-4 * distance)
        error = np.abs(token[:, None] - grid).min(-1)
        np.testing.assert_allclose(np.abs(rounded[row].double().numpy() - token), error, atol=1e-3 * distance)


@given(shapes, st.sampled_from([0.1, 0.3, 1.0]))
def test_all_values_of_a_knee_are_those_that_inputs_are_rounded_to(shape: tuple[int, int, int], knee: float) -> None:
    token = inputs(*shape)[0]
    quantizer = knee_quantizer(knee, WHOLE_ROW, tail=3)
    low, high = min(float(token.min()), 0.0), max(float(token.max()), 0.0)
    # The ends of the range are kept, so that the dense row has the same grid.
    dense = torch.cat((torch.linspace(low, high, 20_000), torch.tensor([low, high])))
    taken = quantizer(dense).detach().unique()
    values = range_values(token, quantizer)
    room = 1e-3 * step(token, quantizer)
    distances = (taken[:, None] - values).abs()
    assert float(distances.amin(1).max()) <= room
    # Values of a tail without length are the end of the body.
    assert len(values) <= 2**BITS
    assert float(values.min()) >= low - step(token, quantizer)
    assert tail_step(token, quantizer) >= 0


@given(shapes)
def test_measures_of_the_spread(shape: tuple[int, int, int]) -> None:
    x = inputs(*shape)
    size = x.abs().double().numpy()
    middle = np.sort(size[0])[(size.shape[1] - 1) // 2]
    assert largest_to_median(x[0]) == pytest.approx(size[0].max() / middle, rel=1e-5)
    assert channels_of_largest(x) == len({int(row.argmax()) for row in size})
    count = min(2, size.shape[1])
    assert sorted(largest_channels(x, count)) == sorted(np.argsort(-size.max(0), kind="stable")[:count].tolist())


def test_channels_apart_keep_their_values_and_no_range_reaches_to_them() -> None:
    x = torch.tensor([[100.0, 1.0, -0.5, 0.25], [80.0, 0.5, 0.75, -1.0]])
    rounded = round_apart(x, even_quantizer(BITS), [0])
    assert torch.equal(rounded[:, 0], x[:, 0])
    assert float((rounded - x).abs().max()) <= 1.5 / 15 / 2 + 1e-6
    assert share_of_zeros(x, round_apart(x, even_quantizer(BITS), [])) == 6 / 8
    assert x[0, 0] == 100


def test_inputs_that_are_all_zero() -> None:
    assert largest_to_median(torch.zeros(5)) == 1
    assert share_of_zeros(torch.zeros(2, 5), torch.zeros(2, 5)) == 0
