"""Lesson 8: the knee puts most values where most inputs are, and short ranges keep a huge input from the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lbllm.course import pictures
from lbllm.course.data import layer_words
from lbllm.course.formulas import BODY_STEP, INPUTS_ERROR, TAIL_STEP
from lbllm.course.inputs import (
    BITS,
    even_quantizer,
    in_use,
    knee_quantizer,
    largest_to_median,
    most_affected,
    range_values,
    read_layers,
    round_apart,
    step,
    tail_step,
)
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Picture,
    Positions,
    Progress,
    Question,
    Scene,
    computed,
    number_question,
)
from lbllm.quant.activations import ActQuantizer
from lbllm.sections import ACT_GROUP_SIZE, WHOLE_ROW, QuantConfig
from lbllm.stages.aar import KNEES
from lbllm.stages.distill import token_error

SIZES = (WHOLE_ROW, 256, ACT_GROUP_SIZE, 16)  # inputs of a range
POINTS = 32  # on the line of the whole range
SHOWN = 16  # neighbouring inputs on the line: those of the shortest range


class Knee(LessonMaker):
    """Move the knee, shorten the ranges, and see the values move to where the inputs are."""

    key = "knee"
    title = "The knee and the ranges"

    def prepare(self) -> Iterator[Progress]:
        """Read the text with the teacher, and measure the chosen layer at all positions."""
        yield Progress(0.0, f"{self.data.teacher_title} reads a text.")
        self._pieces, layers = read_layers(self.data)
        self._layer = most_affected(layers).cpu()
        x = self._layer.inputs
        self._sizes = [size for size in SIZES if size < x.shape[1]]
        self._tail = self.data.quant.tail_steps or int(QuantConfig.model_fields["tail_steps"].default)
        self._errors = [[self._error(knee, size).value for knee in KNEES] for size in self._sizes]
        self._even = self._error_of(even_quantizer(BITS)).value
        # The token that is shown is the one in the middle when they are ordered by their largest input.
        order = sorted(range(len(x)), key=lambda token: largest_to_median(x[token]))
        self._token = order[len(order) // 2]
        self._first = self._shown_channels()

    def _shown_channels(self) -> int:
        """The first of the channels that are shown: of all short ranges that are full, the one in the middle when they
        are ordered by their largest input."""
        x = self._layer.inputs[self._token]
        length = min(SHOWN, len(x))
        parts = x[: len(x) // length * length].view(-1, length).abs().amax(-1).argsort()
        return int(parts[len(parts) // 2]) * length

    def _quantizer(self, knee: float, size: int) -> ActQuantizer:
        return knee_quantizer(knee, size, self._tail)

    def _error_of(self, quantizer: ActQuantizer) -> Figure:
        layer = self._layer
        outputs = layer.outputs(round_apart(layer.inputs, quantizer, [])), layer.outputs(layer.inputs)
        return computed("Error of the layer's output", "{:.1%}", INPUTS_ERROR, token_error, *outputs)

    def _error(self, knee: float, size: int) -> Figure:
        return self._error_of(self._quantizer(knee, size))

    def _best(self, size: int) -> float:
        """The knee with the smallest error for ranges of so many inputs."""
        errors = self._errors[self._sizes.index(size)]
        return KNEES[errors.index(min(errors))]

    def lesson(self) -> Lesson:
        """The texts: the guess is on the best knee, the check on what helps more."""
        values, body = 2**BITS, 2**BITS - 2 * self._tail
        best, whole = self._best(WHOLE_ROW), f"{max(KNEES):.0%}"
        at_best, at_whole = self._error(best, WHOLE_ROW), self._error(max(KNEES), WHOLE_ROW)
        words = layer_words(self._layer.address)
        guess = number_question(
            f"{BITS} bits give {values} values. {body} of them are put close together around zero, the other "
            f"{2 * self._tail} far apart towards both ends. Of all layers, {words} suffers most from evenly spaced "
            f"values. What share of the range from the smallest to the largest input of a token should the {body} fine "
            "values cover, so that its output is best?",
            best,
            [max(KNEES), 0.5],
            "{:.0%}",
            f"With the knee at {knee_words(best)} the error of the output is {at_best.text}; with {whole} it is "
            f"{at_whole.text}. Most inputs are close to zero, so most values should be, too. {in_use(self.data)}",
        )
        return Lesson(
            self.key,
            self.title,
            "A range goes from the smallest to the largest input, and its knee says which part of it gets fine steps; "
            "the rest gets a few coarse ones, which still reach the huge inputs. Short ranges help as well: a huge "
            "input then spoils only the steps of its neighbours.",
            guess,
            (
                Dial("knee", "Knee: share of the range with fine steps", tuple(map(knee_words, KNEES)), len(KNEES) - 1),
                Dial("range", "Inputs of one range", tuple(map(size_words, self._sizes))),
            ),
            self._check(),
            str(self._layer.address),
        )

    def _check(self) -> Question:
        shortest = next((size for size in self._sizes if size == ACT_GROUP_SIZE), self._sizes[-1])
        ways = {
            f"{2**BITS} even steps over the whole token": self._even,
            f"One range for the whole token, with the best knee ({knee_words(self._best(WHOLE_ROW))})": min(
                self._errors[0]
            ),
        }
        if shortest != WHOLE_ROW:
            name = f"Ranges of {shortest} inputs, with their best knee ({knee_words(self._best(shortest))})"
            ways[name] = min(self._errors[self._sizes.index(shortest)])
        errors = [f"{error:.1%}" for error in ways.values()]
        best = min(ways.values())
        because = f"The error of the output is {', '.join(errors[:-1])} and {errors[-1]}, in this order."
        return Question(
            f"All of them take {BITS} bits an input. Which one disturbs the output of this layer least?",
            tuple(ways),
            list(ways.values()).index(best),
            f"{because} A range follows from its inputs when they arrive, so short ranges store nothing more.",
        )

    def scene(self, positions: Positions) -> Scene:
        """The error over the knee, and neighbouring inputs with the values that they can take."""
        knee, size = KNEES[positions[0]], self._sizes[positions[1]]
        quantizer, error = self._quantizer(knee, size), self._error(knee, size)
        own = self._range(size)
        fine = computed("Step inside the knee", "{:.2g}", BODY_STEP, step, own, quantizer)
        coarse = computed("Step outside the knee", "{:.2g}", TAIL_STEP, tail_step, own, quantizer)
        best = min(self._errors[positions[1]])
        against = "which is the least for these ranges" if error.value == best else f"the best knee gives {best:.1%}"
        curve = pictures.curve(
            f"Error of the output of {layer_words(self._layer.address)}: each knee, and ranges of so many inputs",
            KNEES,
            {
                size_words(one): [100 * error for error in errors]
                for one, errors in zip(self._sizes, self._errors, strict=True)
            },
            x_label="knee",
            y_label="error, %",
            log=True,
            mark=positions[0],
        )
        inside = self._in_view(range_values(own, quantizer))
        lie = "lies" if len(inside) == 1 else "lie"
        said = (
            f"{len(inside)} of the {2**BITS} values {lie} where these inputs are; the output's error is "
            f"{error.text}, {against}."
        )
        return Scene(
            (self._line(quantizer, own, inside), self._whole(quantizer, own), curve), (fine, coarse, error), said
        )

    def _range(self, size: int) -> Tensor:
        """The inputs of the range that holds the shown channels."""
        x = self._layer.inputs[self._token]
        if size == WHOLE_ROW:
            return x
        start = self._first // size * size
        return x[start : start + size]

    def _shown(self) -> Tensor:
        return self._layer.inputs[self._token, self._first : self._first + SHOWN]

    def _ends(self) -> tuple[float, float]:
        """The ends of the line: those of the shown inputs, with zero, and some room."""
        x = self._shown()
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        room = 0.1 * ((high - low) or 1.0)
        return low - room, high + room

    def _in_view(self, values: Tensor) -> Tensor:
        low, high = self._ends()
        return values[(values >= low) & (values <= high)]

    def _line(self, quantizer: ActQuantizer, own: Tensor, inside: Tensor) -> Picture:
        x, everything = self._shown(), range_values(own, quantizer)
        nearest = [everything[(everything - value).abs().argmin()] for value in x]
        found = [int((inside == value).nonzero()[0]) if (inside == value).any() else None for value in nearest]
        notes = [
            f"channel {self._first + n}: {float(value):.3g} becomes {float(rounded):.3g}"
            for n, (value, rounded) in enumerate(zip(x, nearest, strict=True))
        ]
        words = (
            f"{len(x)} neighbouring inputs of the token “{self._pieces[self._token].strip()}”, and the "
            "values near them that they can take"
        )
        return pictures.line(words, x, inside, found, notes=notes, ends=self._ends())

    def _whole(self, quantizer: ActQuantizer, own: Tensor) -> Picture:
        values, order = range_values(own, quantizer), own.sort().values
        some = order[torch.linspace(0, len(order) - 1, min(POINTS, len(order))).round().long()]
        return pictures.line(
            f"The whole range of these inputs: its {len(values)} different values, and some of its {len(own)} inputs",
            some,
            values,
        )


def knee_words(knee: float) -> str:
    """A knee as it is shown."""
    return f"{knee:.0%}"


def size_words(size: int) -> str:
    """The inputs of a range as a dial shows them."""
    return "the whole token" if size == WHOLE_ROW else str(size)
