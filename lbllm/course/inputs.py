"""The inputs of a model's layers on a text, how they are spread, and what a quantizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm.chat.lens import pieces_of
from lbllm.course.data import CourseData
from lbllm.microscope.activations import grid_values, layer_inputs_on
from lbllm.microscope.address import Address
from lbllm.quant.activations import ActivationGrid, ActQuantizer
from lbllm.stages.distill import token_error
from lbllm.texts.prompts import example_prompts

BITS = 4  # of the quantizers that lessons show
OF_RANGE = (1.0, 1.0)  # both clips: a range is not narrowed


@dataclass(frozen=True)
class LayerInputs:
    """The inputs X of a layer of the teacher on a text of T tokens: ``inputs`` (T, in), ``weight`` (out, in), both
    float32."""

    address: Address
    inputs: Tensor
    weight: Tensor

    def outputs(self, inputs: Tensor) -> Tensor:
        """The layer's outputs (T, out) for inputs (T, in), without the bias."""
        return inputs @ self.weight.t()

    def output_error(self, rounded: Tensor) -> float:
        """``token_error`` of the layer's outputs where its inputs are rounded (T, in)."""
        return float(token_error(self.outputs(rounded), self.outputs(self.inputs)))

    def cpu(self) -> LayerInputs:
        """The same in main memory."""
        return LayerInputs(self.address, self.inputs.cpu(), self.weight.cpu())


def read_layers(data: CourseData) -> tuple[list[str], list[LayerInputs]]:
    """Return the tokens of the course's text, and its inputs in the teacher of all layers that are binarized in the
    checkpoint. The text is the first kind of example prompts, one after the other. Raises LbllmError."""
    pair = data.pair
    ids, _ = pair.ids(" ".join(example_prompts()[0].prompts))
    layers = []
    for number, names in enumerate(pair.binarized):
        seen = layer_inputs_on(pair, "teacher", ids, number, names) if names else {}
        layers += [LayerInputs(Address(number, name), seen[name], pair.weight(number, name)) for name in names]
    return pieces_of(pair.tokenizer, ids[0].tolist()), layers


def in_use(data: CourseData) -> str:
    """A sentence that says whether the checkpoint rounds the inputs of its layers."""
    bits = data.quant.act_bits
    if bits > BITS:
        return f"This checkpoint keeps its inputs in {bits} bits: the rounding is tried here, on the teacher's layers."
    return (
        f"This checkpoint does round its inputs to {bits} bits; here it is done to the inputs of the teacher's layers."
    )


def even_quantizer(bits: int) -> ActQuantizer:
    """A quantizer with evenly spaced values between a token's smallest and largest input."""
    return ActQuantizer(bits, 0)


def knee_quantizer(knee: float, size: int, tail: int) -> ActQuantizer:
    """A quantizer with a knee and ``tail`` steps in each tail, for ranges of ``size`` inputs that are not narrowed."""
    quantizer = ActQuantizer(BITS, tail, group_size=size)
    quantizer.act.data.copy_(torch.tensor([knee, *OF_RANGE]))
    return quantizer


def most_affected(layers: Sequence[LayerInputs]) -> LayerInputs:
    """The layer with the largest output error where each token's inputs are rounded to evenly spaced values."""
    return max(layers, key=lambda layer: layer.output_error(round_apart(layer.inputs, even_quantizer(BITS), [])))


def largest_to_median(inputs: Tensor) -> float:
    """The largest absolute input of a token (in,), as a multiple of the median of those that are not zero; 1 if all
    are zero."""
    size = inputs.abs()
    size = size[size > 0]
    return float(size.max() / size.median()) if len(size) else 1.0


def channel_maxima(inputs: Tensor) -> Tensor:
    """The largest absolute input (in,) of each channel over the tokens of inputs (T, in)."""
    return inputs.abs().amax(0)


def largest_channels(inputs: Tensor, count: int) -> list[int]:
    """The ``count`` channels with the largest inputs (T, in), the largest first."""
    return channel_maxima(inputs).topk(count).indices.tolist()


def channels_of_largest(inputs: Tensor) -> int:
    """In how many different channels the largest inputs of the tokens lie, for inputs (T, in)."""
    return len(inputs.abs().argmax(-1).unique())


@torch.no_grad()
def round_apart(inputs: Tensor, quantizer: ActQuantizer, apart: Sequence[int]) -> Tensor:
    """Return inputs (T, in) rounded by a quantizer, except for the channels ``apart``: they keep their values, and no
    range reaches to them."""
    others = inputs.clone()
    others[:, list(apart)] = 0
    rounded = quantizer(others)
    rounded[:, list(apart)] = inputs[:, list(apart)]
    return rounded


def share_of_zeros(inputs: Tensor, rounded: Tensor) -> float:
    """The share of the inputs other than zero that are zero when rounded; 0 if there are none."""
    there = inputs != 0
    return float(((rounded == 0) & there).sum() / there.sum()) if there.any() else 0.0


@torch.no_grad()
def step(inputs: Tensor, quantizer: ActQuantizer) -> float:
    """The distance of two neighbouring values around zero, in the first range of one token's inputs (in,)."""
    return float(quantizer.grid(quantizer.ranges(inputs)).body[0])


@torch.no_grad()
def tail_step(inputs: Tensor, quantizer: ActQuantizer) -> float:
    """The distance of two neighbouring values in the longer tail of the first range of one token's inputs (in,)."""
    grid = quantizer.grid(quantizer.ranges(inputs))
    return float(torch.maximum(grid.low[0], grid.high[0]))


@torch.no_grad()
def range_values(inputs: Tensor, quantizer: ActQuantizer) -> Tensor:
    """All different values (n,), ascending, that the first range of one token's inputs (in,) can be rounded to."""
    grid = quantizer.grid(quantizer.ranges(inputs)[:1])
    first = ActivationGrid(*(part[0] for part in grid))
    return torch.tensor(grid_values(first, quantizer.bits, quantizer.tail))
