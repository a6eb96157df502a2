"""Lesson 7: a few inputs are huge, and one range with few values leaves nothing of the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lbllm.course import pictures
from lbllm.course.data import layer_words
from lbllm.course.formulas import INPUTS_ERROR, MAX_TO_MEDIAN, STEP, ZEROS
from lbllm.course.inputs import (
    BITS,
    LayerInputs,
    channel_maxima,
    channels_of_largest,
    even_quantizer,
    in_use,
    largest_channels,
    largest_to_median,
    most_affected,
    range_values,
    read_layers,
    round_apart,
    share_of_zeros,
    step,
)
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Picture,
    Positions,
    Progress,
    Scene,
    computed,
    number_question,
)
from lbllm.stages.distill import token_error

APART = (0, 1, 2, 4, 8, 16)  # channels that are not rounded
MORE_BITS = 8
BARS = 8
POINTS = 24


class MassiveActivations(LessonMaker):
    """Round the inputs of real layers, take the largest channels away, and see what they did to the others."""

    key = "massive-activations"
    title = "A few inputs are huge"

    def prepare(self) -> Iterator[Progress]:
        """Read the text with the teacher, and choose the layers: the most affected, the most uneven, the calmest."""
        yield Progress(0.0, f"{self.data.teacher_title} reads a text.")
        self._pieces, layers = read_layers(self.data)
        spread = {id(layer): max(map(largest_to_median, layer.inputs)) for layer in layers}
        chosen = [most_affected(layers), *(pick(layers, key=lambda one: spread[id(one)]) for pick in (max, min))]
        self._layers = [one.cpu() for number, one in enumerate(chosen) if one not in chosen[:number]]
        # The token that is shown is the one whose largest input stands out most, as the picture of all tokens has it.
        self._tokens = [max(range(len(x)), key=lambda n: largest_to_median(x[n])) for x in self._inputs()]

    def _inputs(self) -> list[torch.Tensor]:
        return [layer.inputs for layer in self._layers]

    def lesson(self) -> Lesson:
        """The texts: the guess is on zeros, the check on channels."""
        layer, values = self._layers[0], 2**BITS
        tokens, width = layer.inputs.shape
        zeros, distance = self._zeros(0, 0, BITS), self._step(0, 0, BITS)
        lost = self._error(0, 0, BITS)
        shown = layer.inputs[self._tokens[0]].abs()
        guess = number_question(
            f"Of all layers, {layer_words(layer.address)} suffers most from what follows. For each of the {tokens} "
            f"tokens (pieces of words) of a text it gets {width} inputs, one in each of its channels. They are rounded "
            f"to {values} evenly spaced values between the token's smallest and largest input, which takes {BITS} bits "
            "an input. What share of the inputs becomes exactly zero?",
            zeros.value,
            [1 / values, 0.5],
            "{:.0%}",
            f"In {self._token_words(0)} the values are {distance.text} apart, and what is nearer to zero than half of "
            f"that becomes zero; but half of its inputs are nearer to zero than {shown.median():.2g}. "
            f"The layer's output gets an error of {lost.text}. {in_use(self.data)}",
        )
        count = computed("", "{:.0f}", "", channels_of_largest, layer.inputs)
        check = number_question(
            f"Each of the {tokens} tokens has one largest input. In how many different ones of the {width} channels "
            "do these lie?",
            count.value,
            [tokens, width],
            "{:.0f}",
            "The huge inputs come back in the same few channels, whatever the token is. That is why it helps to treat "
            "a few channels apart, or to give them ranges of their own.",
        )
        words = tuple(layer_words(one.address) for one in self._layers)
        return Lesson(
            self.key,
            self.title,
            "The numbers that flow into a layer can be rounded as well, but a few of them are many times larger than "
            f"all others. If {values} values must reach from the smallest to the largest, they are so far apart that "
            "the ordinary numbers become zero.",
            guess,
            (
                Dial("layer", "Layer", words),
                Dial("apart", "Largest channels that are not rounded", tuple(map(str, APART[: self._most]))),
                Dial("bits", "Bits an input", (str(BITS), str(MORE_BITS))),
            ),
            check,
            str(layer.address),
        )

    @property
    def _most(self) -> int:
        """How many positions the second dial has: at least half of all channels are rounded."""
        width = min(x.shape[1] for x in self._inputs())
        return sum(count <= width // 2 for count in APART)

    def _token_words(self, layer: int) -> str:
        at = self._tokens[layer]
        return f"token {at + 1}, “{self._pieces[at].strip()}”,"

    def _rounded(self, layer: int, apart: int, bits: int) -> torch.Tensor:
        x = self._inputs()[layer]
        return round_apart(x, even_quantizer(bits), largest_channels(x, apart))

    def _others(self, layer: int, apart: int) -> list[int]:
        x = self._inputs()[layer]
        gone = set(largest_channels(x, apart))
        return [channel for channel in range(x.shape[1]) if channel not in gone]

    def _zeros(self, layer: int, apart: int, bits: int) -> Figure:
        rest, x, rounded = self._others(layer, apart), self._inputs()[layer], self._rounded(layer, apart, bits)
        label = "Rounded inputs that become zero"
        return computed(label, "{:.0%}", ZEROS, share_of_zeros, x[:, rest], rounded[:, rest])

    def _step(self, layer: int, apart: int, bits: int) -> Figure:
        shown = self._inputs()[layer][self._tokens[layer], self._others(layer, apart)]
        return computed("Distance of two values in this token", "{:.2g}", STEP, step, shown, even_quantizer(bits))

    def _error(self, layer: int, apart: int, bits: int) -> Figure:
        one, rounded = self._layers[layer], self._rounded(layer, apart, bits)
        outputs = one.outputs(rounded), one.outputs(one.inputs)
        return computed("Error of the layer's output", "{:.1%}", INPUTS_ERROR, token_error, *outputs)

    def scene(self, positions: Positions) -> Scene:
        """The channels, the tokens, and one token's inputs on their grid."""
        number, apart, bits = positions[0], APART[positions[1]], (BITS, MORE_BITS)[positions[2]]
        layer, at = self._layers[number], self._tokens[number]
        rest = layer.inputs[at, self._others(number, apart)]
        label = f"Largest input ÷ median, token {at + 1}"
        spread = computed(label, "{:,.0f}", MAX_TO_MEDIAN, largest_to_median, rest)
        zeros, error = self._zeros(number, apart, bits), self._error(number, apart, bits)
        channels = "the largest channel" if apart == 1 else f"the {apart} largest channels"
        left = f"With {channels} left as they are, " if apart else ""
        said = f"{zeros.text} of the inputs become zero, and the error of the layer's output is {error.text}."
        return Scene(
            (self._channels(layer, apart), self._text(layer), self._line(number, apart, bits)),
            (spread, self._step(number, apart, bits), zeros, error),
            left + said if left else said,
        )

    def _channels(self, layer: LayerInputs, apart: int) -> Picture:
        maxima = channel_maxima(layer.inputs)
        order = maxima.argsort(descending=True)
        middle = int(order[len(order) // 2])
        shown = [*order[:BARS].tolist(), middle]
        names = [f"channel {channel}" for channel in shown[:-1]] + [f"channel {middle}, the median"]
        gone = set(order[:apart].tolist())
        values = [float(maxima[channel]) for channel in shown]
        series = {
            "rounded": [None if channel in gone else v for channel, v in zip(shown, values, strict=True)],
            "not rounded": [v if channel in gone else None for channel, v in zip(shown, values, strict=True)],
        }
        return pictures.bars(f"Largest inputs of {layer_words(layer.address)} in this text, by channel", names, series)

    def _text(self, layer: LayerInputs) -> Picture:
        words = zip(self._pieces, layer.inputs, strict=True)
        tokens = [(piece, largest_to_median(x), f"channel {int(x.abs().argmax())}") for piece, x in words]
        return pictures.text(
            "Largest input of each token, of all channels, as a multiple of the median", tokens, unit="times"
        )

    def _line(self, number: int, apart: int, bits: int) -> Picture:
        layer, at = self._layers[number], self._tokens[number]
        x, rounded = layer.inputs[at], self._rounded(number, apart, bits)[at]
        others = self._others(number, apart)
        order = x.abs().argsort()
        shown = order[torch.linspace(0, len(order) - 1, min(POINTS, len(order))).round().long()].tolist()
        values = range_values(x[others], even_quantizer(bits))
        if bits > BITS:  # too many to be drawn: those that are taken
            values = rounded[[channel for channel in shown if channel in set(others)]].unique()
        index = [(values - rounded[c]).abs().argmin() if c in set(others) else None for c in shown]
        taken = [None if i is None else int(i) for i in index]
        notes = [f"channel {c}: {float(x[c]):.3g} becomes {float(rounded[c]):.3g}" for c in shown]
        label = f"Inputs of {self._token_words(number)} from the smallest to the largest, and the "
        return pictures.line(label + "values they can take", x[shown], values, taken, notes=notes)
