"""One group of weights, and the very bits that the file holds of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lbllm.microscope.address import Address


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
    """One group parameter. ``name``: alpha_0, mu_0, alpha_1 or mu_1; ``value``: as the kernels use it; ``bits``: 16, 8
    or 4; ``code``: the stored bits as a number; ``data``: the bytes that hold them, from byte ``offset`` of ``file`` on;
    ``bit``: where the code begins in them (4: the upper half of the byte). ``minimum``, ``step``: value = minimum +
    code * step, before rounding to float32; None for 16 bits, where the code is a float16."""

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
    (g,). ``levels``: float32 (K,), ascending in a checkpoint that a run made. ``rebuilt``: levels[index], float32
    (g,). ``before_levels`` float32 (K,), ``before_index`` uint8 (g,): before training. ``latent``: float32 (g,), or
    None where the run kept none. ``params``: K of them. ``signs``: g bits; ``bitmap``: g bits, none for W1.
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

    @property
    def error(self) -> float:
        """||w - w_q||^2 / ||w||^2 of the group."""
        raise NotImplementedError
