"""One layer of a packed checkpoint beside the teacher's: its matrices as tiles, a part of them, a small picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lbllm.errors import CheckpointError, ConfigError
from lbllm.microscope.address import Address
from lbllm.microscope.before import Before
from lbllm.microscope.group import GroupView, stored_bits, stored_params
from lbllm.models.loading import FileFault
from lbllm.models.streamed import Rows
from lbllm.models.weights import StoredWeights
from lbllm.quant.levels import (
    LEVELS,
    PARAMS,
    from_groups,
    index_to_planes,
    params_to_levels,
    planes_to_index,
    spans,
    take_levels,
    to_groups,
)
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.packing import decode_params, unpack_codes, unpack_plane
from lbllm.quant.plan import layer_bits

Tile = Literal["original", "sign", "bitmap", "second", "rebuilt", "error"]
TILES: dict[Tile, str] = {
    "original": "Teacher's weights",
    "sign": "Sign plane",
    "bitmap": "Bitmap plane",
    "second": "Second bitmap plane",
    "rebuilt": "Rebuilt weights",
    "error": "Error, rebuilt minus original",
}
# Clustering all rows of a layer anew takes seconds, so flipped bits are then counted in this many rows of it.
SAMPLED_ROWS = 32


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of a layer's input: bits, knee, clips (c-, c+), steps of a tail, and inputs per range (-1: all)."""

    bits: int
    knee: float
    clip_low: float
    clip_high: float
    tail: int
    group_size: int


@dataclass(frozen=True)
class Window:
    """A part of a layer: the tensors (rows, columns) of the tiles, exact values. ``rows``, ``columns``: where it lies
    in the matrix. ``bitmap``: None for W1; ``second``: None but for three planes. ``index``: level indices, uint8."""

    rows: slice
    columns: slice
    original: Tensor
    sign: Tensor
    bitmap: Tensor | None
    rebuilt: Tensor
    error: Tensor
    index: Tensor
    second: Tensor | None = None


def relative_error(original: Tensor, rebuilt: Tensor) -> float:
    """Return ||W - W_q||^2 / ||W||^2 of tensors (..., n); 0 if both are zero."""
    error, energy = _energy(original - rebuilt), _energy(original)
    return error / energy if energy else (math.inf if error else 0.0)


def flipped(index: Tensor, before: Tensor, count: int) -> tuple[float, float | None]:
    """Return the shares of the weights whose sign bit, and whose bitmap bit, differ between two level indices uint8 of
    the same shape. ``count``: levels of a group; with two there is no bitmap, None. The second bitmap of three planes
    is not counted."""
    pairs = zip(index_to_planes(index, count), index_to_planes(before, count), strict=True)
    shares = [_share(now != then) for now, then in pairs]
    return shares[0], shares[1] if len(shares) > 1 else None


def _energy(values: Tensor) -> float:
    return torch.linalg.vecdot(values, values).double().sum().item()


def _share(bits: Tensor) -> float:
    return int(bits.count_nonzero()) / bits.numel()


class LayerView:
    """One binarized layer. Tensors are made when they are first asked for, and then kept; change none of them.

    ``address``; ``name``: the full module path; ``shape``: (out, in); ``fmt``; ``length``: weights in a full group;
    ``groups``: groups in a row; ``quantizer``: None with 16-bit activations. ``names``: those of the packed layer's
    tensors in the files.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        packed: PackedLinear,
        stored: StoredWeights,
        names: dict[str, str],
        original: Callable[[], Tensor],
        before: Before,
    ) -> None:
        self.address, self.name, self.fmt = address, name, packed.fmt
        self.shape = packed.out_features, packed.in_features
        self.length, self.groups = packed.length, packed.groups
        self.quantizer: Quantizer | None = None
        if packed.quantizer is not None:
            knee, low, high, bits, tail = packed.quantizer.settings()
            self.quantizer = Quantizer(bits, knee, low, high, tail, packed.quantizer.group_size)
        self._packed, self._stored, self._names = packed, stored, names
        self._original, self._before = original, before

    @property
    def bits(self) -> float:
        """Stored bits a weight, with group parameters and their scales (``lbllm.quant.plan.layer_bits``)."""
        return layer_bits(self.fmt, *self.shape) / (self.shape[0] * self.shape[1])

    @cached_property
    def error(self) -> float:
        """``relative_error`` of the rebuilt weight, W: the teacher's weight."""
        return relative_error(self.original, self.rebuilt)

    @property
    def sign_flips(self) -> float:
        """Share of the weights whose sign bit differs from before training, in ``flip_rows`` rows."""
        return self._flips[0]

    @property
    def bitmap_flips(self) -> float | None:
        """Share of the weights whose bitmap bit differs from before training, in ``flip_rows`` rows; None for W1."""
        return self._flips[1]

    @property
    def flip_rows(self) -> int:
        """How many rows the flipped bits are counted in: all, or ``SAMPLED_ROWS`` where they are clustered anew."""
        return self.shape[0] if self._before.stage is not None else min(self.shape[0], SAMPLED_ROWS)

    @cached_property
    def _flips(self) -> tuple[float, float | None]:
        every = self.flip_rows == self.shape[0]
        rows: Rows = slice(0, self.shape[0]) if every else _spread(self.shape[0], self.flip_rows)
        return flipped(self._index_of(rows), self.before(rows)[1], self.count)

    @property
    def count(self) -> int:
        """Levels of a group, K: 4, 2 for W1, 8 for three planes."""
        return LEVELS[self.fmt.format]

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles that this layer has: a W1 layer has no bitmap, and only one of three planes a second one."""
        least: dict[Tile, int] = {"bitmap": 4, "second": 8}
        return tuple(tile for tile in TILES if self.count >= least.get(tile, 2))

    @cached_property
    def original(self) -> Tensor:
        """The teacher's weight, float32 (out, in). Raises ModelError if its file has changed."""
        return self._original()

    @cached_property
    def rebuilt(self) -> Tensor:
        """The weight of the checkpoint, float32 (out, in), as ``PackedLinear.dequantize`` gives it."""
        return from_groups(take_levels(self.levels, to_groups(self.index, self.length)), self.shape[1])

    @cached_property
    def index(self) -> Tensor:
        """Level indices, uint8 (out, in)."""
        return self._index_of(slice(0, self.shape[0]))

    @cached_property
    def levels(self) -> Tensor:
        """Levels of all groups, float32 (out, n, K), in the order of ``params_to_levels``."""
        return params_to_levels(self._params_of(slice(0, self.shape[0])), self.table)

    @cached_property
    def sign(self) -> Tensor:
        """The plane B, bool (out, in); True stands for +1."""
        return index_to_planes(self.index, self.count)[0]

    @cached_property
    def bitmap(self) -> Tensor | None:
        """The plane G, bool (out, in), True: the outer pair of levels, of eight the outer two of each side; None for
        W1."""
        return self._plane(1)

    @cached_property
    def second(self) -> Tensor | None:
        """The plane H of three, bool (out, in), True: the outer level of the two that sign and bitmap leave; else
        None."""
        return self._plane(2)

    def _plane(self, number: int) -> Tensor | None:
        return dict(enumerate(index_to_planes(self.index, self.count))).get(number)

    def before(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Levels, float32 (rows, n, K), and level indices, uint8 (rows, in), of some rows before training;
        ``Microscope.before_words`` says what that is. Raises CheckpointError if the run's states are damaged."""
        block, layer = self._place
        return self._before.rows(block, layer, self.fmt, self.original, rows)

    @cached_property
    def latent(self) -> Tensor | None:
        """The latent weights that the run kept, float32 (out, in); ``Microscope.latent_words`` says from when. Raises
        CheckpointError if the run's states are damaged."""
        return self._before.latents(*self._place, self.shape)

    def window(self, row: int, column: int, rows: int, columns: int) -> Window:
        """The part that begins at (row, column), at most ``rows`` x ``columns`` large and cut at the matrix's end.

        Raises ConfigError if it begins outside of the matrix, or is empty.
        """
        out, within = self.shape
        if not (0 <= row < out and 0 <= column < within and rows > 0 and columns > 0):
            raise ConfigError(
                f"{self.name} has {out} rows and {within} columns; there is no part of {rows} x {columns} weights at "
                f"row {row}, column {column}"
            )
        part = slice(row, min(row + rows, out)), slice(column, min(column + columns, within))
        original, rebuilt, index = self.original[part], self.rebuilt[part], self.index[part]
        # Of this part only: the planes of the whole matrix are not needed for it.
        sign, *others = index_to_planes(index, self.count)
        bitmap, second = (*others, None, None)[:2]
        return Window(*part, original, sign, bitmap, rebuilt, rebuilt - original, index, second)

    def thumbnail(self, tile: Tile, height: int, width: int) -> Tensor:
        """A small picture of the whole matrix, float32, at most (height, width): for each cell the mean magnitude of
        its weights (original, rebuilt, error), or the share of its bits that are set (the planes).

        Raises ConfigError for another tile than those of ``tiles``.
        """
        if tile not in self.tiles:
            raise ConfigError(f"{self.name} has no tile {tile}; it has {', '.join(self.tiles)}")
        whole: Tensor | None = self.rebuilt - self.original if tile == "error" else getattr(self, tile)
        assert whole is not None
        return _cells(whole if whole.dtype == torch.bool else whole.abs(), height, width)

    def group(self, row: int, group: int) -> GroupView:
        """A group of a row. Raises ConfigError if there is none, CheckpointError if the file has changed."""
        if not (0 <= row < self.shape[0] and 0 <= group < self.groups):
            raise ConfigError(
                f"{self.name} has the rows 0 to {self.shape[0] - 1} with the groups 0 to {self.groups - 1}; there is "
                f"no group {group} in row {row}"
            )
        columns = list(spans(self.shape[1], self.fmt.group_size))[group]
        one = slice(row, row + 1)
        planes, stored = self._read("weight", one)[0], self._read("params", one)[0]
        affine = self._packed.affine()
        params, index = self._params_of(one)[0, group], self._index_of(one)[0, columns]
        levels = params_to_levels(params, self.table)
        before_levels, before_index = self.before(one)
        latent = self._before.latents(*self._place, self.shape, one)
        bits = stored_bits(self._stored.tensors[self._names["weight"]], row, columns, planes)
        return GroupView(
            address=Address(*self._place, row, group),
            columns=columns,
            weights=self.original[row, columns],
            index=index,
            levels=levels,
            rebuilt=levels[index.long()],
            before_levels=before_levels[0, group],
            before_index=before_index[0, columns],
            latent=None if latent is None else latent[0, columns],
            params=stored_params(
                self._stored.tensors[self._names["params"]],
                row,
                group,
                self.fmt,
                stored,
                params,
                None if affine is None else affine[row],
            ),
            signs=bits[0],
            bitmap=bits[1] if len(bits) > 1 else (),
            second=bits[2] if len(bits) > 2 else (),
        )

    @property
    def _place(self) -> tuple[int, str]:
        assert self.address.block is not None
        assert self.address.layer is not None
        return self.address.block, self.address.layer

    def _index_of(self, rows: Rows) -> Tensor:
        """Level indices of some rows."""
        planes = unpack_plane(self._packed.weight[rows], self.shape[1])
        return planes_to_index(planes.unbind(1))

    @property
    def table(self) -> Tensor | None:
        """The table of a layer of three planes, float32 (8,); else None."""
        return None if self._packed.table is None else self._packed.table.float()

    def _params_of(self, rows: slice) -> Tensor:
        """Group parameters of some rows, float32 (rows, n, K)."""
        params, affine = self._packed.params[rows], self._packed.affine()
        if self._packed.grid is not None:
            params = unpack_codes(params, self.groups, PARAMS[self.fmt.format])
        return decode_params(params, None if affine is None else affine[rows])

    def _read(self, name: str, rows: slice) -> Tensor:
        """Some rows of one of the layer's tensors, from the file."""
        try:
            return self._stored.read(self._names[name], rows)
        except (FileFault, OSError) as fault:
            raise CheckpointError(f"{self.name}: {fault}; put the file back, and open the checkpoint again") from None


def _spread(rows: int, count: int) -> Tensor:
    """``count`` of the numbers 0 to ``rows`` - 1, evenly spread and ascending."""
    return (torch.arange(count) * rows) // count


def _cells(matrix: Tensor, height: int, width: int) -> Tensor:
    """The means (height, width) of the cells of a matrix, float32; fewer cells where it has fewer rows or columns."""
    values: Any = matrix.numpy()
    for axis, most in enumerate((height, width)):
        size = values.shape[axis]
        starts = np.arange(min(most, size)) * size // min(most, size)
        lengths = np.diff(np.append(starts, size))
        values = np.add.reduceat(values, starts, axis, np.float64) / (lengths if axis else lengths[:, None])
    return torch.from_numpy(values).float()
