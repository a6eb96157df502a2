"""The types that a GGUF file of a packed model can have, without the libraries that write it."""

from __future__ import annotations

from typing import Literal, NamedTuple

GgufType = Literal["bf16", "q8_0", "q5_1", "q5_k", "q4_1", "q4_k"]


class Shape(NamedTuple):
    """The weights and the bytes of a type's block."""

    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights


SHAPES: dict[GgufType, Shape] = {
    "bf16": Shape(1, 2),
    "q8_0": Shape(32, 34),
    "q5_1": Shape(32, 24),
    "q5_k": Shape(256, 176),
    "q4_1": Shape(32, 20),
    "q4_k": Shape(256, 144),
}
# What rows get that are no whole blocks of a type.
INSTEAD: dict[GgufType, GgufType] = {"q5_k": "q5_1", "q4_k": "q4_1"}
TYPES_HELP = (
    "BF16 and Q8_0 answer like the packed weights. Q5_1 is the smallest type that holds groups of 16 well, Q4_1 the "
    "smallest for groups of 32 and more. Q5_K and Q4_K are smaller; layers whose rows are no multiple of 256 get Q5_1 "
    "or Q4_1."
)


def type_name(kind: GgufType) -> str:
    """A type's name for people, with its bits: "Q4_1 (5 bits a weight)"."""
    return f"{kind.upper()} ({SHAPES[kind].bits:g} bits a weight)"
