"""Lesson 1: a weight is a number that an input is multiplied by; bits decide how many values it can have."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lbllm.baselines.layer import HALF, Settings
from lbllm.baselines.rtn import even_bits, even_levels, rtn
from lbllm.course import pictures
from lbllm.course.data import layer_words
from lbllm.course.formulas import RELATIVE_ERROR, STORED_EVENLY
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Picture,
    Positions,
    Question,
    Scene,
    computed,
    dotted,
    number_question,
    worse_than_none,
)
from lbllm.course.stream import stream_inputs
from lbllm.microscope.layer import relative_error
from lbllm.quant.levels import assign
from lbllm.sections import WHOLE_ROW
from lbllm.units import size

BITS = (8, 6, 4, 3, 2, 1)
WORDS = 6
ASKED, FINER = 2, 3  # bits: of the guess, and of a wrong option
_PRODUCTS = 5  # in the table
_MOST_LEVELS = 16  # that can be told apart on the line


class WhatAWeightIs(LessonMaker):
    """Round the weights of a real row, and see its output for a real word."""

    key = "what-a-weight-is"
    title = "What a weight is"

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The first different pieces of the question that have letters."""
        return tuple(word for word, _ in self._said)

    @cached_property
    def _said(self) -> list[tuple[str, Tensor]]:
        """These pieces, with the layer's input (in,) for each."""
        tokenizer, at = self.data.teacher.tokenizer, self.data.example.address
        assert at.block is not None
        assert at.layer is not None
        ids = tokenizer(self.data.question, return_tensors="pt").input_ids.long()
        steps = stream_inputs(self.data.teacher.model, at.block, at.layer, ids)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                inputs: Tensor = end.value
                break
        said: dict[str, Tensor] = {}
        for token, row in zip(ids[0].tolist(), inputs, strict=True):
            word = str(tokenizer.decode([token])).strip()
            if any(letter.isalpha() for letter in word):
                said.setdefault(word, row)
        return list(said.items())[:WORDS]

    def rounded(self, bits: int) -> Tensor:
        """The row's weights (in,) in so many bits: rounded to evenly spaced values."""
        return rtn(self.data.example_row[None], None, Settings(WHOLE_ROW, bits)).weight[0]

    def error(self, bits: int) -> Figure:
        """What the rounding loses."""
        row = self.data.example_row
        return computed("Error of the row's weights", "{:.1%}", RELATIVE_ERROR, relative_error, row, self.rounded(bits))

    def central(self) -> float:
        """The share of the row's weights that lie in the middle half of its range."""
        row = self.data.example_row
        low, high = row.aminmax()
        return float(((row - (low + high) / 2).abs() <= (high - low) / 4).float().mean())

    def lesson(self) -> Lesson:
        data, row = self.data, self.data.example_row
        layer, columns = data.example, len(self.data.example_row)
        outputs = {word: float(inputs @ row) for word, inputs in self._said}
        loudest = max(range(len(self.words)), key=lambda n: abs(outputs[self.words[n]]))
        first, last = (f"{outputs[word]:+.3f} for “{word}”" for word in (self.words[0], self.words[-1]))
        asked = self.error(ASKED)
        guess = number_question(
            f"Each weight in a row is rounded to the nearest of {2**ASKED} evenly spaced values, which takes {ASKED} "
            f"bits. The error is {0:.0%} if no weight changes, and {1:.0%} if all weights become zero. How large "
            "is it?",
            asked.value,
            [self.error(FINER).value, (1 + asked.value) / 2],
            "{:.1%}",
            f"With {FINER} bits the error is only {self.error(FINER).text}. The {2**ASKED} values are spread over the "
            f"whole range of the row, but {self.central():.0%} of its weights lie in the middle half.",
        )
        check = Question(
            "You ask the model another question. Which numbers of this layer change?",
            ("The weights", "The inputs and the outputs", "The weights, the inputs and the outputs"),
            1,
            f"The output of this row is {first} and {last}, with the same {columns} weights. They are learned once and "
            "then stay; that is why they can be stored in few bits.",
        )
        return Lesson(
            self.key,
            self.title,
            f"A language model like {data.teacher_title} is made of numbers, its weights: each weight in a row "
            "multiplies one input, and the sum of the products is one output. Weights are stored in bits, each of "
            "which says yes or no; each bit less halves the number of values that a weight can have, so weights are "
            "rounded and the output changes.",
            guess,
            (
                Dial("bits", "Bits for each weight", tuple(map(str, BITS))),
                Dial("word", "Word that the model reads", self.words, loudest),
            ),
            check,
            str(layer.address),
        )

    def scene(self, positions: Positions) -> Scene:
        bits, (word, inputs) = BITS[positions[0]], self._said[positions[1]]
        data, row, rounded = self.data, self.data.example_row, self.rounded(BITS[positions[0]])
        exact, now, error = float(inputs @ row), float(inputs @ rounded), self.error(bits)
        weights = data.example_weights
        levels = even_levels(row[None], bits)[0]
        few = len(levels) <= _MOST_LEVELS
        index = assign(weights[None], levels[None])[0] if few else None
        where = f"row {data.example_group.row} in {layer_words(data.example.address)}"
        line = pictures.line(
            f"{len(weights)} of the {len(row)} weights of {where}"
            + (", and the values that they are rounded to" if few else ""),
            weights,
            levels if few else torch.empty(0),
            index,
            notes=[f"{weight:.4f}" for weight in weights.tolist()],
            ends=_ends(row),
        )
        shape = data.example.original.shape
        stored = even_bits(shape[0], shape[1], Settings(WHOLE_ROW, bits))
        figures = (
            error,
            Figure(
                f"This layer, stored ({size(shape[0] * shape[1] * HALF / 8)} in {HALF} bits)",
                stored,
                size(stored / 8),
                STORED_EVENLY,
                dotted(even_bits),
            ),
        )
        say = (
            f"For “{word}” this row gives {exact:+.3f}; with weights of {bits} {'bit' if bits == 1 else 'bits'}, so "
            f"{2**bits} different values, it gives {now:+.3f}."
        )
        if error.value > 1:
            say += f" The error of the weights is {error.text}.{worse_than_none(error.value)}"
        return Scene((line, self._products(inputs, row, rounded), self._places()), figures, say)

    def _places(self) -> Picture:
        """What a weight is a part of."""
        scope, layer = self.data.microscope, self.data.example
        rows, columns = layer.shape
        block = layer.address.block or 0
        return pictures.table(
            "From the model to one weight",
            ("part", "what it has"),
            (
                (f"the model {scope.teacher_title}", f"{scope.blocks} blocks, one after the other"),
                (f"block {block + 1}", f"{len(scope.shapes[block])} layers of weights"),
                (f"{layer.address.layer}, one of them", f"{rows:,} rows, each of which computes one output"),
                ("a row", f"{columns:,} weights, one for each input"),
                (
                    f"the {len(self.data.example_weights)} weights above",
                    f"{len(self.data.example_weights.unique())} different values",
                ),
            ),
        )

    def _products(self, inputs: Tensor, row: Tensor, rounded: Tensor) -> Picture:
        products, others = inputs * row, inputs * rounded
        largest = products.abs().argsort(descending=True, stable=True)[:_PRODUCTS]
        rest = len(row) - len(largest)
        lines = [
            [
                f"input {n}",
                f"{inputs[n]:.3f}",
                f"{row[n]:.3f}",
                f"{products[n]:.4f}",
                f"{rounded[n]:.3f}",
                f"{others[n]:.4f}",
            ]
            for n in largest.tolist()
        ]
        left = [float(one.sum() - one[largest].sum()) for one in (products, others)]
        sums = [float(one.sum()) for one in (products, others)]
        return pictures.table(
            f"From inputs to the output: the {len(largest)} largest of {len(row)} products",
            ("Input", "Its value", "Weight", "Product", "Rounded weight", "Product then"),
            [
                *lines,
                [f"{rest} other inputs", "", "", f"{left[0]:.4f}", "", f"{left[1]:.4f}"],
                ["Output: the sum", "", "", f"{sums[0]:.4f}", "", f"{sums[1]:.4f}"],
            ],
        )


def _ends(row: Tensor) -> tuple[float, float]:
    low, high = row.aminmax()
    room = 0.05 * float(high - low)
    return float(low) - room, float(high) + room
