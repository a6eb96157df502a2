"""Which layers deserve more bits: how much each of them raises the loss in each of several formats, and the choice of
formats that raises it least for a given number of bits.

    found = sensitivities(teacher, formats, sequences)       one backward pass
    found = with_measured_kinds(teacher, found, sequences)   one forward pass for each kind of layer
    chosen = allocate(found, bits_per_weight=2.5)
    overrides = as_overrides(chosen)                         for ``quant.overrides``

The rise of the loss is estimated to second order with the diagonal of the Fisher information: half the sum, over tokens
and outputs, of squared gradient times squared error of the output. The error is that of plain clustering in the format,
which stage 1 lowers for all layers and formats alike, about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lbllm.errors import ConfigError, ResourceError
from lbllm.machine import free_memory
from lbllm.measure.gradients import output_gradients
from lbllm.measure.perplexity import divergence
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight, set_linear_weight, share_copy
from lbllm.models.teacher import Teacher
from lbllm.quant.plan import layer_bits
from lbllm.quant.table import clustered
from lbllm.sections import LayerFormat, LayerOverride
from lbllm.units import size


@dataclass(frozen=True)
class Option:
    """A layer in one format: its ``bits``, all parameters counted, and the estimated ``rise`` of the loss, in nats per
    token."""

    format: LayerFormat
    bits: float
    rise: float


@dataclass(frozen=True)
class Sensitivity:
    """A layer, by its full name, with its number of weights and its options, in the order of the formats."""

    name: str
    weights: int
    options: tuple[Option, ...]

    @property
    def kind(self) -> str:
        """What layers of this kind have in common: the last part of the name."""
        return self.name.rpartition(".")[2]


def sensitivities(
    teacher: Teacher,
    formats: Sequence[LayerFormat],
    sequences: Tensor,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    autocast: Any = nullcontext,
) -> list[Sensitivity]:
    """Estimate the rise for the layers whose full names are ``wanted``, from token ids (n, T).

    Gradients of little text are noisy: use some thousand tokens, of the kinds that the model will be used for. Raises
    ResourceError if memory is too short: the whole model is in memory, and the error of each weight in each format.
    """
    layers = _layers(teacher, wanted)
    needed = 2 * len(formats) * sum(linear_weight(layer).numel() for layer in layers.values())
    if needed > free_memory("cpu"):
        raise ResourceError(
            f"the errors of all weights in {len(formats)} formats take {size(needed)}, more than is free; give fewer "
            "formats or fewer layers"
        )
    errors = {
        name: [(clustered(linear_weight(layer), fmt) - linear_weight(layer)).bfloat16() for fmt in formats]
        for name, layer in layers.items()
    }
    sums = {name: [0.0] * len(formats) for name in layers}

    def seen(name: str, entered: Tensor, grad: Tensor) -> None:
        squared = grad.square()
        for number, error in enumerate(errors[name]):
            sums[name][number] += float((entered @ error.float().t()).square_().mul_(squared).sum()) / 2

    output_gradients(teacher.model, layers, sequences, seen, autocast)
    tokens = sequences[:, 1:].numel()
    found = []
    for name, layer in layers.items():
        shape = linear_weight(layer).shape
        rises = zip(formats, sums[name], strict=True)
        options = tuple(Option(fmt, layer_bits(fmt, *shape), total / tokens) for fmt, total in rises)
        found.append(Sensitivity(name, shape.numel(), options))
    return found


def with_measured_kinds(
    teacher: Teacher, found: Sequence[Sensitivity], sequences: Tensor, reference: int = 0
) -> list[Sensitivity]:
    """Scale the estimates so that, for each kind of layer, their sum is the KL divergence that was measured with all
    layers of this kind clustered in the format number ``reference``, on token ids (n, T)."""
    scaled: dict[str, float] = {}
    for kind in dict.fromkeys(one.kind for one in found):
        same = [one for one in found if one.kind == kind]
        with _clustered(teacher, {one.name: one.options[reference].format for one in same}) as model:
            measured = divergence(teacher.model, model, sequences).kl
        scaled[kind] = measured / max(sum(one.options[reference].rise for one in same), 1e-30)
    return [
        replace(one, options=tuple(replace(option, rise=option.rise * scaled[one.kind]) for option in one.options))
        for one in found
    ]


def allocate(found: Sequence[Sensitivity], bits_per_weight: float) -> dict[str, Option]:
    """Choose an option for each layer: about the least sum of rises for at most ``bits_per_weight`` over all layers.

    Greedy on the lower convex hull of each layer's options: always the step that lowers the sum most for its bits, as
    long as it fits. Raises ConfigError if the smallest options take more bits.
    """
    budget = bits_per_weight * sum(one.weights for one in found)
    hulls = {one.name: _hull(one.options) for one in found}
    place = dict.fromkeys(hulls, 0)
    used = sum(hull[0].bits for hull in hulls.values())
    if used > budget:
        least = used / sum(one.weights for one in found)
        raise ConfigError(f"{bits_per_weight:g} bits per weight are too few: the smallest formats take {least:.3f}")
    steps = [
        ((before.rise - after.rise) / (after.bits - before.bits), name, number)
        for name, hull in hulls.items()
        for number, (before, after) in enumerate(pairwise(hull))
    ]
    for _, name, number in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        more = hulls[name][number + 1].bits - hulls[name][number].bits
        if place[name] == number and used + more <= budget:
            place[name], used = number + 1, used + more
    return {name: hulls[name][number] for name, number in place.items()}


def as_overrides(chosen: Mapping[str, Option]) -> dict[str, LayerOverride]:
    """The settings per layer of a choice, for ``quant.overrides``."""
    return {
        name: LayerOverride(
            format=option.format.format, group_size=option.format.group_size, param_bits=option.format.param_bits
        )
        for name, option in chosen.items()
    }


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of rise over bits, from the fewest bits to the least rise."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (one.bits, one.rise)):
        if hull and option.rise >= hull[-1].rise:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (after.rise - before.rise) / max(after.bits - before.bits, 1e-30)


def _layers(teacher: Teacher, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    path, blocks = decoder_blocks(teacher.model)
    named = {
        f"{path}.{number}.{name}": layer
        for number, block in enumerate(blocks)
        for name, layer in linear_layers(block).items()
    }
    return {name: layer for name, layer in named.items() if wanted(name)}


@contextmanager
def _clustered(teacher: Teacher, formats: Mapping[str, LayerFormat]) -> Iterator[Any]:
    """The teacher with some layers clustered; other layers are shared with it."""
    model = share_copy(teacher.model)
    for name, fmt in formats.items():
        layer = model.get_submodule(name)
        set_linear_weight(layer, clustered(linear_weight(layer), fmt))
    yield model
