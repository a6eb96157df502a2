"""Lesson 2: with one bit, a group of weights has two levels, and no two levels are near to all of its weights."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lbllm.course import pictures
from lbllm.course.data import layer_words
from lbllm.course.formulas import RELATIVE_ERROR, TWO_LEVELS
from lbllm.course.lesson import (
    Dial,
    Figure,
    Lesson,
    LessonMaker,
    Positions,
    Scene,
    computed,
    dotted,
    number_question,
    worse_than_none,
)
from lbllm.microscope.hybrid import fitted
from lbllm.microscope.layer import relative_error
from lbllm.quant.levels import LEVELS, assign, fit_levels, levels_to_params, take_levels

PLACES = 9  # of each level
EM_STEPS = 20  # more than any group needs
SMALL, LARGE, LARGER = 8, 16, 64  # group sizes of the check


class OneBit(LessonMaker):
    """Two levels on a line of real weights, to be moved by hand."""

    key = "one-bit"
    title = "Why one bit is hard"

    @cached_property
    def places(self) -> tuple[list[float], list[float]]:
        """Where the lower and the upper level can be put: from the smallest weight to the mean, and from there to the
        largest."""
        weights = self.data.example_weights
        low, middle, high = (float(value) for value in (weights.min(), weights.mean(), weights.max()))
        return torch.linspace(low, middle, PLACES).tolist(), torch.linspace(middle, high, PLACES).tolist()

    def best(self, count: int) -> Tensor:
        """The levels (count,) that fit these weights best."""
        weights = self.data.example_weights
        return fit_levels(weights[None, None], torch.ones(1), count, EM_STEPS)[0, 0]

    def error(self, label: str, levels: Tensor) -> Figure:
        """What is lost if each weight takes the nearest of these ascending levels."""
        weights = self.data.example_weights[None]
        rounded = take_levels(levels[None], assign(weights, levels[None]))
        return computed(label, "{:.1%}", RELATIVE_ERROR, relative_error, weights, rounded)

    @cached_property
    def everywhere(self) -> list[list[float]]:
        """The error in percent at all places of the lower (rows) and the upper level (columns)."""
        lower, upper = self.places
        return [[100 * self.error("", torch.tensor([low, high])).value for high in upper] for low in lower]

    def rows_error(self, group_size: int) -> float:
        """The error of the example's rows with one bit a weight, two levels for each group of this size."""
        rows, own = self.data.example_rows, self.data.example.fmt
        fmt = own.model_copy(update={"format": "w1", "group_size": min(group_size, rows.shape[1])})
        return relative_error(rows, fitted(rows, fmt, self.data.example.address.layer or ""))

    def lesson(self) -> Lesson:
        data, count = self.data, len(self.data.example_weights)
        weights = data.example_weights
        one = relative_error(weights, weights.mean().expand_as(weights))
        two, four = (self.error("", self.best(levels)) for levels in (2, LEVELS["w1+1"]))
        guess = number_question(
            f"One bit tells apart two values. So a group of {count} neighbouring weights shares two values, called "
            f"levels, and each weight is rounded to the nearer one. An error of {0:.0%} means that no weight changes, "
            f"{1:.0%} is what is left if all become zero. If the two levels are placed as well as possible, how large "
            "is the error?",
            two.value,
            [four.value, one],
            "{:.1%}",
            f"Even the best two levels leave so much. A single level would leave {one:.1%}, four levels {four.text}.",
        )
        small, large, larger = (self.rows_error(n) for n in (SMALL, LARGE, LARGER))
        check = number_question(
            f"If groups of {LARGE} weights have two levels each, the error of this layer is {large:.1%}. How large is "
            f"it if groups of {LARGER} weights share two levels?",
            larger,
            [large, small],
            "{:.1%}",
            f"Two levels must serve more weights now, so more of them are far from both. In groups of {SMALL} the "
            f"error is only {small:.1%}, but every group has to store its levels, so small groups take more bits.",
        )
        lower, upper = self.places
        return Lesson(
            self.key,
            self.title,
            f"With one bit a weight can have only two values, the levels that a group of {count} neighbouring weights "
            "shares. Wherever the two levels are, some weights are far from both, and their error goes into every "
            "output.",
            guess,
            (
                Dial("lower", "Lower level", tuple(f"{place:.3f}" for place in lower), 0),
                Dial("upper", "Upper level", tuple(f"{place:.3f}" for place in upper), PLACES - 1),
            ),
            check,
            str(data.example_group),
        )

    def scene(self, positions: Positions) -> Scene:
        data, weights = self.data, self.data.example_weights
        lower, upper = self.places
        levels = torch.tensor([lower[positions[0]], upper[positions[1]]])
        index = assign(weights[None], levels[None])[0]
        line = pictures.line(
            f"{len(weights)} weights of {layer_words(data.example.address)}, each with a line to its nearer level",
            weights,
            levels,
            index,
            notes=[f"{weight:.3f}" for weight in weights.tolist()],
            level_labels=("lower level", "upper level"),
        )
        everywhere = pictures.grid(
            "Error in % for all places of the two levels: a row for each lower level, a column for each upper one",
            self.everywhere,
            row_labels=_marked(lower, positions[0]),
            column_labels=_marked(upper, positions[1]),
            scale="sequential",
            unit="%",
        )
        here, best = (
            self.error("Error with your levels", levels),
            self.error("Error with the best two levels", self.best(2)),
        )
        alpha, mu = levels_to_params(levels).tolist()
        params = Figure(
            "Your levels: their middle ± half their distance",
            alpha,
            f"{mu:.3f} ± {alpha:.3f}",
            TWO_LEVELS,
            dotted(levels_to_params),
        )
        say = (
            f"Levels at {levels[0]:.3f} and {levels[1]:.3f} leave an error of {here.text}; the best two, at "
            f"{self.best(2)[0]:.3f} and {self.best(2)[1]:.3f}, leave {best.text}."
        )
        return Scene((line, everywhere), (here, best, params), say + worse_than_none(here.value))


def _marked(places: list[float], position: int) -> list[str]:
    """The places as labels; an arrow stands at the dial's."""
    return [f"{'▸ ' if number == position else ''}{place:.2f}" for number, place in enumerate(places)]
