"""A layer's tiles, parts, small pictures and figures against plain float64."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.errors import ConfigError
from lbllm.microscope.before import EM_STEPS
from lbllm.microscope.layer import TILES, LayerView, Tile, flipped, relative_error
from lbllm.microscope.microscope import Microscope
from lbllm.quant.levels import assign, fit_levels
from lbllm.sections import LayerOverride, QuantConfig
from tests.helpers.cases import cases
from tests.helpers.tiny_packed import tiny_checkpoint

PLACES = ("0/mlp.up_proj", "1/mlp.down_proj")  # W(1+1); W1


@pytest.fixture(scope="module")
def microscope(tmp_path_factory: pytest.TempPathFactory) -> Microscope:
    quant = QuantConfig(group_size=20, overrides={"*.down_proj": LayerOverride(format="w1")})
    folder, teacher = tiny_checkpoint(tmp_path_factory.mktemp("layer"), "llama", quant)
    return Microscope.open(str(folder), str(teacher))


@pytest.fixture(params=PLACES)
def layer(microscope: Microscope, request: pytest.FixtureRequest) -> LayerView:
    return microscope.layer(request.param)


def test_the_error_is_the_squared_distance_by_the_energy(layer: LayerView) -> None:
    original, rebuilt = layer.original.double().numpy(), layer.rebuilt.double().numpy()
    wanted = ((original - rebuilt) ** 2).sum() / (original**2).sum()
    assert layer.error == pytest.approx(wanted, rel=1e-5)
    assert relative_error(layer.original, layer.rebuilt) == layer.error


def test_the_error_of_nothing_is_nothing() -> None:
    assert relative_error(torch.zeros(3, 4), torch.zeros(3, 4)) == 0.0
    assert relative_error(torch.zeros(3, 4), torch.ones(3, 4)) == float("inf")


def test_flipped_bits_are_counted() -> None:
    # Of the four levels 0 to 3: the sign is that of 2 and 3, the bitmap that of 0 and 3.
    index, before = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([[0, 2, 3, 1]], dtype=torch.uint8)
    assert flipped(index, before, 4) == (2 / 4, 2 / 4)
    assert flipped(index[:, :2], torch.tensor([[1, 1]], dtype=torch.uint8), 2) == (1 / 2, None)


def test_before_training_is_each_row_clustered_on_its_own(layer: LayerView) -> None:
    rows = slice(3, 6)
    levels, index = layer.before(rows)
    assert levels.shape == (3, layer.groups, layer.count)
    for number, row in enumerate(range(rows.start, rows.stop)):
        for group in range(layer.groups):
            view = layer.group(row, group)
            weights = layer.original[row, view.columns][None, None]
            missing = 0, layer.length - weights.shape[-1]  # a shorter group is padded
            padded, counted = (torch.nn.functional.pad(one, missing) for one in (weights, torch.ones_like(weights)))
            alone = fit_levels(padded, counted, layer.count, EM_STEPS)
            assert torch.allclose(levels[number, group], alone[0, 0], atol=1e-6)
            assert torch.equal(levels[number, group], view.before_levels)
            assert torch.equal(index[number, view.columns], assign(weights, view.before_levels[None, None])[0, 0])
            assert torch.equal(index[number, view.columns], view.before_index)
            assert view.latent is None
    assert layer.latent is None


def test_flips_are_counted_in_evenly_spread_rows(layer: LayerView, monkeypatch: pytest.MonkeyPatch) -> None:
    every = slice(0, layer.shape[0])
    index = layer.before(every)[1]
    rows = [number * layer.shape[0] // layer.flip_rows for number in range(layer.flip_rows)]
    assert (layer.sign_flips, layer.bitmap_flips) == flipped(layer.index[rows], index[rows], layer.count)
    assert 0 < layer.sign_flips < 0.5
    fresh = copy.copy(layer)
    del fresh.__dict__["_flips"]
    monkeypatch.setattr("lbllm.microscope.layer.SAMPLED_ROWS", 10**6)
    assert (fresh.sign_flips, fresh.bitmap_flips) == flipped(layer.index, index, layer.count)


@cases(60)
@given(st.integers(0, 89), st.integers(0, 47), st.integers(1, 120), st.integers(1, 120))
def test_a_part_is_cut_from_all_tiles(microscope: Microscope, row: int, column: int, rows: int, columns: int) -> None:
    layer = microscope.layer(PLACES[0])
    assert layer.shape == (90, 48)
    part = layer.window(row, column, rows, columns)
    assert (part.rows.start, part.columns.start) == (row, column)
    assert (part.rows.stop, part.columns.stop) == (min(row + rows, 90), min(column + columns, 48))
    place = part.rows, part.columns
    for name in ("original", "rebuilt", "sign", "bitmap", "index"):
        assert torch.equal(getattr(part, name), getattr(layer, name)[place])
    assert torch.equal(part.error, layer.rebuilt[place] - layer.original[place])


@pytest.mark.parametrize(
    "part", [(-1, 0, 1, 1), (90, 0, 1, 1), (0, 48, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)]
)
def test_a_part_outside_of_the_matrix_is_named(microscope: Microscope, part: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match=f"90 rows and 48 columns.*row {part[0]}, column {part[1]}"):
        microscope.layer(PLACES[0]).window(*part)


@cases(40)
@given(st.sampled_from(PLACES), st.sampled_from(list(TILES)), st.integers(1, 120), st.integers(1, 120))
def test_a_small_picture_has_the_means_of_its_cells(
    microscope: Microscope, place: str, tile: Tile, height: int, width: int
) -> None:
    layer = microscope.layer(place)
    if tile not in layer.tiles:
        assert (tile, layer.count) in {("bitmap", 2), ("second", 2), ("second", 4)}
        with pytest.raises(ConfigError, match=f"has no tile {tile}; it has original, sign, .*rebuilt, error"):
            layer.thumbnail(tile, height, width)
        return
    whole = (layer.rebuilt - layer.original) if tile == "error" else getattr(layer, tile)
    matrix = np.abs(whole.double().numpy())
    found = layer.thumbnail(tile, height, width)
    assert found.dtype == torch.float32
    assert tuple(found.shape) == (min(height, layer.shape[0]), min(width, layer.shape[1]))
    rows, columns = (
        np.append(np.arange(count) * size // count, size) for count, size in zip(found.shape, layer.shape, strict=True)
    )
    wanted = [[matrix[r:s, c:d].mean() for c, d in pairwise(columns)] for r, s in pairwise(rows)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-7)


def test_a_group_that_is_none_is_named(layer: LayerView) -> None:
    for row, group in ((-1, 0), (layer.shape[0], 0), (0, layer.groups), (0, -1)):
        with pytest.raises(ConfigError, match=f"no group {group} in row {row}"):
            layer.group(row, group)
