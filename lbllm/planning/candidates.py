"""The formats that a plan chooses from, and what one of them is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from lbllm.labels import FORMAT_NAMES, group_name
from lbllm.sections import WHOLE_ROW, Format, LayerFormat, ParamBits

SIZES = (16, 32, 64, 128)


def weight_format(fmt: LayerFormat) -> LayerFormat:
    """The format of the weights alone: with activations in 16 bits."""
    return made(fmt.format, fmt.group_size, fmt.param_bits)


def made(kind: Format, group_size: int, param_bits: ParamBits) -> LayerFormat:
    """A format of weights, with activations in 16 bits."""
    return LayerFormat(format=kind, group_size=group_size, param_bits=param_bits, act_bits=16)


# Measured as formats for the whole model: what plans are predicted from.
ANCHORS: tuple[LayerFormat, ...] = (made("w1+1", 128, 4), made("w1+1", 32, 4), made("w1+1+1", WHOLE_ROW, 16))
# The format in which layers are binarized alone.
REFERENCE = made("w1+1", 64, 4)


def candidates(own: Iterable[LayerFormat] = ()) -> tuple[LayerFormat, ...]:
    """All formats that a plan may give a layer: every format in groups of 16 to 128 with each number of parameter bits,
    whole rows, and the layers' ``own``."""
    found = [
        made(kind, size, bits)
        for kind in get_args(Format)
        for size in (*SIZES, WHOLE_ROW)
        for bits in get_args(ParamBits)
    ]
    return tuple(dict.fromkeys([*found, *sorted(map(weight_format, own), key=str)]))


def format_words(fmt: LayerFormat) -> str:
    """A format of weights for people: "W(1+1), groups of 64, 4-bit parameters"."""
    return f"{FORMAT_NAMES[fmt.format]}, {group_name(fmt.group_size)}, {fmt.param_bits}-bit parameters"
