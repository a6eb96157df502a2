"""One group of weights, and the very bits that the file holds of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lbllm.microscope.address import Address
from lbllm.models.weights import StoredTensor
from lbllm.sections import LayerFormat

PARAMS = ("alpha_0", "mu_0", "alpha_1", "mu_1")
SCALE = "scale"  # the parameter of a group of three planes


@dataclass(frozen=True)
class StoredBit:
    """One bit of a plane. ``file``: the file's name; ``offset``: the byte in it, from 0; ``bit``: the bit in this byte,
    0 is the least significant; ``byte``: the byte's value."""

    value: bool
    file: str
    offset: int
    bit: int
    byte: int


@dataclass(frozen=True)
class StoredParam:
    """One group parameter.

    ``name``: alpha_0, mu_0, alpha_1 or mu_1, or scale; ``value``: as the kernels use it; ``bits``: 16, 8 or 4;
    ``code``: the stored bits as a number; ``data``: the bytes that hold them, from byte ``offset`` of ``file`` on;
    ``bit``: where the code begins in them (4: the upper half of the byte). ``minimum``, ``step``: value = minimum +
    code * step; None for 16 bits, where the code is a float16.
    """

    name: str
    value: float
    bits: int
    code: int
    file: str
    offset: int
    bit: int
    data: bytes
    minimum: float | None
    step: float | None


@dataclass(frozen=True)
class GroupView:
    """A group of g weights; the last one of a row may be shorter than the others.

    ``columns``: where they lie in the row. ``weights``: the teacher's, float32 (g,). ``index``: their levels, uint8
    (g,). ``levels``: float32 (K,), in the order of ``params_to_levels``. ``rebuilt``: levels[index], float32 (g,).
    ``before_levels`` float32 (K,), ``before_index`` uint8 (g,): before training. ``latent``: float32 (g,), or None
    where the run kept none. ``params``: K of them, or the scale of three planes. ``signs``: g bits; ``bitmap``: g bits,
    none for W1; ``second``: g bits of the second bitmap, none but for three planes.
    """

    address: Address
    columns: slice
    weights: Tensor
    index: Tensor
    levels: Tensor
    rebuilt: Tensor
    before_levels: Tensor
    before_index: Tensor
    latent: Tensor | None
    params: tuple[StoredParam, ...]
    signs: tuple[StoredBit, ...]
    bitmap: tuple[StoredBit, ...]
    second: tuple[StoredBit, ...] = ()


def stored_bits(place: StoredTensor, row: int, columns: slice, planes: Tensor) -> list[tuple[StoredBit, ...]]:
    """The bits of some columns of a row in each plane. ``place``: where the layer's planes lie, uint8 (out, planes,
    bytes of a row); ``planes``: those of this row, uint8 (planes, bytes)."""
    start = place.start + row * place.row_bytes
    found = []
    for number, plane in enumerate(planes.tolist()):
        first = start + number * len(plane)
        bits = [(plane[column // 8], column) for column in range(columns.start, columns.stop)]
        found.append(
            tuple(
                StoredBit(bool(byte >> column % 8 & 1), place.file.name, first + column // 8, column % 8, byte)
                for byte, column in bits
            )
        )
    return found


def stored_params(
    place: StoredTensor, row: int, group: int, fmt: LayerFormat, params: Tensor, values: Tensor, affine: Tensor | None
) -> tuple[StoredParam, ...]:
    """The K parameters of a group. ``place``: where the layer's parameters lie; ``params``: those of this row as
    stored, see ``lbllm.quant.packing``; ``values``: float32 (K,); ``affine``: minimum and step (K, 2), float16."""
    data, first = params.numpy().tobytes(), place.start + row * place.row_bytes
    names = PARAMS if len(values) > 1 else (SCALE,)
    found = []
    for number, value in enumerate(values.tolist()):
        begin = (group * len(values) + number) * fmt.param_bits
        held = data[begin // 8 : -(-(begin + fmt.param_bits) // 8)]
        code = int.from_bytes(held, "little") >> begin % 8 & 2**fmt.param_bits - 1
        low, step = (None, None) if affine is None else affine[number].tolist()
        where = place.file.name, first + begin // 8, begin % 8
        found.append(StoredParam(names[number], value, fmt.param_bits, code, *where, held, low, step))
    return tuple(found)
