"""One layer of a packed checkpoint beside the teacher's: its matrices as tiles, a part of them, a small picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lbllm.microscope.address import Address
from lbllm.microscope.group import GroupView
from lbllm.sections import LayerFormat

Tile = Literal["original", "sign", "bitmap", "rebuilt", "error"]
TILES: dict[Tile, str] = {
    "original": "Teacher's weights",
    "sign": "Sign plane",
    "bitmap": "Bitmap plane",
    "rebuilt": "Rebuilt weights",
    "error": "Error, rebuilt minus original",
}


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
    in the matrix. ``bitmap``: None for W1. ``index``: level indices, uint8."""

    rows: slice
    columns: slice
    original: Tensor
    sign: Tensor
    bitmap: Tensor | None
    rebuilt: Tensor
    error: Tensor
    index: Tensor


class LayerView:
    """One binarized layer. Tensors are made when they are first asked for, and then kept.

    ``address``; ``name``: the full module path; ``shape``: (out, in); ``fmt``; ``length``: weights in a full group;
    ``groups``: groups in a row; ``quantizer``: None with 16-bit activations.
    """

    address: Address
    name: str
    shape: tuple[int, int]
    fmt: LayerFormat
    length: int
    groups: int
    quantizer: Quantizer | None

    @property
    def bits(self) -> float:
        """Stored bits a weight, with group parameters and their scales (``lbllm.quant.plan.layer_bits``)."""
        raise NotImplementedError

    @property
    def error(self) -> float:
        """||W - W_q||^2 / ||W||^2, W: the teacher's weight."""
        raise NotImplementedError

    @property
    def sign_flips(self) -> float:
        """Share of the weights whose sign bit differs from before training."""
        raise NotImplementedError

    @property
    def bitmap_flips(self) -> float | None:
        """Share of the weights whose bitmap bit differs from before training; None for W1."""
        raise NotImplementedError

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles that this layer has: a W1 layer has no bitmap."""
        raise NotImplementedError

    @property
    def original(self) -> Tensor:
        """The teacher's weight, float32 (out, in)."""
        raise NotImplementedError

    @property
    def rebuilt(self) -> Tensor:
        """The weight of the checkpoint, float32 (out, in), as ``PackedLinear.dequantize`` gives it."""
        raise NotImplementedError

    @property
    def index(self) -> Tensor:
        """Level indices, uint8 (out, in)."""
        raise NotImplementedError

    @property
    def levels(self) -> Tensor:
        """Levels of all groups, float32 (out, n, K)."""
        raise NotImplementedError

    @property
    def sign(self) -> Tensor:
        """The plane B, bool (out, in); True stands for +1."""
        raise NotImplementedError

    @property
    def bitmap(self) -> Tensor | None:
        """The plane G, bool (out, in); None for W1."""
        raise NotImplementedError

    @property
    def before_levels(self) -> Tensor:
        """Levels before training, float32 (out, n, K); ``Microscope.before_words`` says what that is."""
        raise NotImplementedError

    @property
    def before_index(self) -> Tensor:
        """Level indices before training, uint8 (out, in)."""
        raise NotImplementedError

    @property
    def latent(self) -> Tensor | None:
        """The latent weights that the run kept, float32 (out, in); ``Microscope.latent_words`` says from when."""
        raise NotImplementedError

    def window(self, row: int, column: int, rows: int, columns: int) -> Window:
        """The part that begins at (row, column), at most ``rows`` x ``columns`` large and cut at the matrix's end.

        Raises ConfigError if it begins outside of the matrix.
        """
        raise NotImplementedError

    def thumbnail(self, tile: Tile, height: int, width: int) -> Tensor:
        """A small picture of the whole matrix, float32, at most (height, width): for each cell the mean magnitude of
        its weights (original, rebuilt, error), or the share of its bits that are set (sign, bitmap).

        Raises ConfigError for the bitmap of a W1 layer.
        """
        raise NotImplementedError

    def group(self, row: int, group: int) -> GroupView:
        """A group of a row. Raises ConfigError if there is none, CheckpointError if the file has changed."""
        raise NotImplementedError
