"""Stage 1 in parts of the rows: the results of one part, in memory that does not grow with the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lbllm.quant import chunks
from lbllm.quant.chunks import row_chunks
from lbllm.quant.levels import fit_levels, levels_to_params
from lbllm.quant.packing import fit_grid, stored_params
from lbllm.sections import Format, LayerFormat, ParamBits, PtqConfig
from lbllm.stages.hessians import MATRICES, correction_, factorize, factorize_, input_statistics
from lbllm.stages.ptq import binarize_rows, binarize_together
from tests.helpers.cases import cases
from tests.stages.test_ptq import values

CONFIG = PtqConfig(em_steps=2, damping=0.1, sweeps=1, align=1.0)


@contextmanager
def parts_of(size: int) -> Iterator[None]:
    """Temporary tensors of at most ``size`` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", size)
        patch.setattr(chunks, "FAST_BYTES", size)
        yield


def layer_format(format_: Format, group_size: int, param_bits: int) -> LayerFormat:
    return LayerFormat.model_validate(
        {"format": format_, "group_size": group_size, "param_bits": param_bits, "act_bits": 16}
    )


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that ``work`` has at the same time, beyond those that it is given."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = most = 0
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@given(st.integers(1, 400), st.integers(1, 10**6))
@cases(60)
def test_parts_cover_the_rows_in_equal_lengths(rows: int, row_bytes: int) -> None:
    with parts_of(10**6):
        parts = row_chunks(rows, row_bytes)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    lengths = [part.stop - part.start for part in parts]
    assert len(set(lengths[:-1])) <= 1
    assert lengths[0] == 1 or lengths[0] * row_bytes < 2 * 10**6
    assert lengths[0] - lengths[-1] < len(parts)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(4, 20),
    st.sampled_from(["w1+1", "w1"]),
    st.sampled_from([1, 5, 8, -1]),
    st.sampled_from([4, 8, 16]),
    st.integers(0, 2**32),
)
@cases(15)
def test_rows_in_parts_give_the_layer_solved_at_once(
    lengths: list[int], columns: int, format_: Format, group_size: int, param_bits: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, columns, generator=draw, dtype=torch.float64) for rows in lengths]
    x = torch.randn(60, columns, generator=draw, dtype=torch.float64)
    factors, fmt = factorize(x.t() @ x / 60, 0.1), layer_format(format_, group_size, param_bits)
    correction = 0.1 * torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    whole = binarize_rows(weights, factors, fmt, CONFIG, correction)
    with parts_of(5_000):
        result = binarize_rows(weights, factors, fmt, CONFIG, correction)
    for name in ("latent", "levels", "error", "energy"):
        torch.testing.assert_close(getattr(result, name), getattr(whole, name))
    # Equal levels can change places, so the indices are compared by their values.
    torch.testing.assert_close(values(result, group_size), values(whole, group_size))
    assert (result.grid is None) == (whole.grid is None) == (param_bits != 4)
    if result.grid is not None and whole.grid is not None:
        assert all(torch.equal(*pair) for pair in zip(result.grid, whole.grid, strict=True))
    layers = result.split(lengths)
    assert [len(layer.latent) for layer in layers] == lengths
    assert torch.equal(torch.cat([layer.index for layer in layers]), result.index)


@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([2, 4]), st.sampled_from([4, 8, 16]), st.integers(0, 99))
@cases(15)
def test_levels_and_parameters_in_parts_are_the_same_to_the_bit(
    rows: int, length: int, count: int, bits: ParamBits, seed: int
) -> None:
    groups = torch.randn(rows, 3, length, generator=torch.Generator().manual_seed(seed))
    importance = torch.rand(3, length, generator=torch.Generator().manual_seed(seed + 1))

    def found() -> list[Tensor]:
        params = levels_to_params(fit_levels(groups, importance, count, 3))
        return [params, *fit_grid(params), stored_params(params, bits)]

    whole = found()
    with parts_of(3_000):
        assert all(torch.equal(*pair) for pair in zip(found(), whole, strict=True))


def test_matrices_of_a_wide_layer_are_worked_on_in_place() -> None:
    """The results are those of the plain formulas, and no function makes more than one matrix beside those it gets."""
    n = 200
    matrix = 4 * n * n
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(0))
    target = (x + 0.1).bfloat16()
    kept = x.clone(), target.clone()
    tokens = 4 * 3 * n * n  # bytes of a batch in float32
    peak = peak_bytes(lambda: input_statistics([x], [target]))
    assert peak < MATRICES * matrix + 3 * tokens
    assert torch.equal(x, kept[0])
    assert torch.equal(target, kept[1])

    hessian, drift = input_statistics([x], [x + 0.1])
    eye = torch.eye(n) * hessian.diagonal().mean()
    expected = torch.linalg.solve((hessian + CONFIG.align_damping * eye).double(), drift.t().double()).t()
    before = hessian.clone()
    assert peak_bytes(lambda: correction_(hessian, drift, CONFIG)) < 1.05 * matrix
    assert torch.equal(hessian, before)
    torch.testing.assert_close(drift.double(), expected, rtol=1e-3, atol=1e-5)

    damped = hessian + 0.1 * eye
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    assert peak_bytes(lambda: factorize_(hessian, 0.1)) < 1.05 * matrix
    torch.testing.assert_close(hessian, damped)
    hessian.copy_(before)
    torch.testing.assert_close(factorize_(hessian, 0.1)[1].double(), upper, rtol=1e-3, atol=1e-5)


def test_temporary_memory_does_not_grow_with_the_rows() -> None:
    columns, group = 32, 16
    limit, x = 300_000, torch.randn(200, columns, generator=torch.Generator().manual_seed(0))
    fmt, config = layer_format("w1+1", group, 4), CONFIG.model_copy(update={"sweeps": 1})

    def peak(rows: int) -> int:
        block = nn.Module()
        block.layer = nn.Linear(columns, rows, bias=False)
        hessian, drift = input_statistics([x], [x])
        with parts_of(limit):
            return peak_bytes(lambda: binarize_together(block, ["layer"], hessian, fmt, config, drift))

    few, many = peak(100), peak(300)
    assert few < limit + 4 * columns**2 + 1.2 * 100 * columns * (3 + 36 / group)
    # Latent weights, indices and levels, and the grid's copy of the levels: not even one float32 copy of the weights.
    assert many - few < 1.2 * 200 * columns * (3 + 36 / group)
