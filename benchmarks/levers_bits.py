"""Bits by sensitivity, tried on the first blocks of a model: stage 1 with formats chosen layer by layer, at the bits of
one format for all."""

from __future__ import annotations

from torch import Tensor

from benchmarks.levers_model import Bench
from lbllm.measure.sensitivity import allocate, as_overrides, sensitivities, with_measured_kinds
from lbllm.models.blocks import decoder_blocks
from lbllm.sections import LayerFormat, QuantConfig

SIZES = (16, 32, 64, 128)  # group sizes to choose from
ONE = 32  # the group size of one format for all

UNIFORM, ESTIMATED, MEASURED = "one format", "by sensitivity", "by sensitivity, kinds of layers measured"


def quant_of(
    variant: str, bench: Bench, count: int, sequences: Tensor, sizes: tuple[int, ...] = SIZES, one: int = ONE
) -> QuantConfig:
    """The format of a variant, with groups of ``sizes``; its first ``count`` blocks take at most the bits of groups of
    ``one``. Sensitivities are those of token ids (n, T)."""
    plain = bench.quant.model_copy(update={"group_size": one})
    if variant == UNIFORM:
        return plain
    path, _ = decoder_blocks(bench.teacher.model)
    first = tuple(f"{path}.{number}." for number in range(count))
    formats = [
        LayerFormat(format=plain.format, group_size=size, param_bits=plain.param_bits, act_bits=16) for size in sizes
    ]
    found = sensitivities(
        bench.teacher, formats, sequences, wanted=lambda name: name.startswith(first), autocast=bench.autocast
    )
    reference = sizes.index(one)
    if variant == MEASURED:
        found = with_measured_kinds(bench.teacher, found, sequences, reference)
    budget = sum(layer.options[reference].bits for layer in found) / sum(layer.weights for layer in found)
    return plain.model_copy(update={"overrides": as_overrides(allocate(found, budget))})
