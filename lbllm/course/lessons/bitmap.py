"""Lesson 3: the bitmap gives a group four levels, and is compared with one bit at as many stored bits."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lbllm.course import pictures
from lbllm.course.data import SHOWN, layer_words
from lbllm.course.formulas import INNER_PAIR, LAYER_BITS, OUTER_PAIR, RELATIVE_ERROR, TWO_LEVELS
from lbllm.course.lesson import Dial, Figure, Lesson, LessonMaker, Positions, Scene, computed, dotted, number_question
from lbllm.microscope.hybrid import fitted
from lbllm.microscope.layer import relative_error
from lbllm.quant.levels import LEVELS, assign, fit_levels, index_to_planes, levels_to_params
from lbllm.quant.plan import layer_bits
from lbllm.sections import Format, LayerFormat

SIZES = (8, 16, 32, 64, 128)
EM_STEPS = 20
KINDS: dict[Format, str] = {"w1": "sign only", "w1+1": "sign and bitmap"}


class Bitmap(LessonMaker):
    """Two against four levels, in groups of the same size and at the same stored size."""

    key = "bitmap"
    title = "What the bitmap buys"

    @cached_property
    def sizes(self) -> list[int]:
        """Group sizes: the usual ones and the checkpoint's own, at most a row."""
        columns = self.data.example.original.shape[1]
        return sorted({size for size in SIZES if size <= columns} | {self.data.example.length})

    def format(self, kind: Format, size: int) -> LayerFormat:
        """The checkpoint's format of the layer with other levels and groups."""
        return self.data.example.fmt.model_copy(update={"format": kind, "group_size": size})

    def bits(self, fmt: LayerFormat) -> float:
        """Stored bits a weight of the layer, with the parameters of the groups."""
        rows, columns = self.data.example.original.shape
        return layer_bits(fmt, rows, columns) / (rows * columns)

    def as_large(self, size: int) -> LayerFormat:
        """One bit a weight in groups that are so small that the stored bits are nearest to those of sign and bitmap in
        groups of this size."""
        wanted = self.bits(self.format("w1+1", size))
        return min((self.format("w1", n) for n in range(1, size + 1)), key=lambda fmt: abs(self.bits(fmt) - wanted))

    @cached_property
    def _errors(self) -> dict[LayerFormat, Figure]:
        return {}

    def error(self, fmt: LayerFormat) -> Figure:
        """The error of the example's rows in a format, with levels fitted to the teacher's weights."""
        if fmt not in self._errors:
            rows, name = self.data.example_rows, str(self.data.example.address)
            rounded = fitted(rows, fmt, name)
            self._errors[fmt] = computed("Error", "{:.1%}", RELATIVE_ERROR, relative_error, rows, rounded)
        return self._errors[fmt]

    def group(self, size: int) -> tuple[Tensor, slice]:
        """The weights of the group of this size that the shown weights begin in, and which of them are shown."""
        at, line = self.data.example_group, self.data.example_row
        assert at.group is not None
        first = at.group * self.data.example.length
        start = first // size * size
        shown = slice(first - start, min(first - start + SHOWN, size, len(line) - start))
        return line[start : start + size], shown

    def lesson(self) -> Lesson:
        data, own = self.data, self.data.example.length
        sign, both = self.format("w1", own), self.format("w1+1", own)
        e_sign, e_both = (self.error(fmt).value for fmt in (sign, both))
        guess = number_question(
            f"In groups of {own}, two levels leave an error of {e_sign:.1%} in this layer. A second bit a weight gives "
            "four levels. How large is the error then?",
            e_both,
            [e_sign / 2, e_both / 4],
            "{:.1%}",
            f"The error is {e_sign / e_both:.1f} times smaller than with two levels. With twice as many levels the "
            "nearest one is about half as far, and the error adds up the squares of the distances.",
        )
        # Another size than the one that is shown first, so that the dial must be moved or the answer understood.
        size = next((size for size in self.sizes if size > own), own)
        rivals = self.format("w1", size), self.format("w1+1", size), self.as_large(size)
        r_sign, r_both, r_small = (self.error(fmt).value for fmt in rivals)
        check = number_question(
            f"In groups of {size}, the sign alone leaves an error of {r_sign:.1%}; sign and bitmap take more bits and "
            f"leave {r_both:.1%}. Spend as many bits on smaller groups instead: only the sign, in groups of "
            f"{rivals[-1].group_size}. How large is the error?",
            r_small,
            [r_both / 2, r_both],
            "{:.1%}",
            f"Both take about as many bits a weight, levels included: {self.bits(rivals[-1]):.2f} the sign alone in "
            f"small groups, {self.bits(rivals[1]):.2f} sign and bitmap. So compare {r_small:.1%} with {r_both:.1%}: "
            "this is what the bitmap buys.",
        )
        return Lesson(
            self.key,
            self.title,
            "A second bit for each weight, the bitmap, chooses between two pairs of levels: an outer pair for large "
            "weights and an inner pair for small ones. The first bit, the sign, chooses the lower or the upper level "
            "of the pair, so a group has four levels.",
            guess,
            (
                Dial("bits", "Bits of a weight", tuple(KINDS.values())),
                Dial("group", "Weights in a group", tuple(map(str, self.sizes)), self.sizes.index(own)),
            ),
            check,
            str(data.example_group),
        )

    def scene(self, positions: Positions) -> Scene:
        kind, size = list(KINDS)[positions[0]], self.sizes[positions[1]]
        weights, shown = self.group(size)
        levels = fit_levels(weights[None, None], torch.ones(1), LEVELS[kind], EM_STEPS)
        index = assign(weights[None, None], levels)[0, 0, shown]
        sign, *others = index_to_planes(index, LEVELS[kind])
        bitmap = others[0] if others else None
        names: tuple[str, ...] = ("sign −", "sign +")
        if bitmap is not None:
            names = ("outer −", "inner −", "inner +", "outer +")
        line = pictures.line(
            f"{len(index)} weights of a group of {len(weights)} in {layer_words(self.data.example.address)}, and the "
            f"group's {LEVELS[kind]} levels",
            weights[shown],
            levels[0, 0],
            index,
            notes=[f"{weight:.3f}" for weight in weights[shown].tolist()],
            level_labels=names,
        )
        parts: list[tuple[str, str, pictures.Plane]] = [
            ("Sign: filled for the upper level of its pair", pictures.plane_text(sign), "sign")
        ]
        if bitmap is not None:
            parts.append(("Bitmap: filled for the outer pair", pictures.plane_text(bitmap), "bitmap"))
        fmt = self.format(kind, size)
        bits = pictures.bits(
            "The bits of these weights",
            parts,
            f"With the levels of the groups, {self.bits(fmt):.2f} bits a weight are stored.",
        )
        rivals = self._rivals(size)
        bars = pictures.bars(
            f"Error in the first {len(self.data.example_rows)} rows of the layer",
            list(rivals),
            {"error": [self.error(one).value for one in rivals.values()]},
            percent=True,
        )
        stored = pictures.bars(
            "Stored bits a weight", list(rivals), {"bits": [self.bits(one) for one in rivals.values()]}
        )
        return Scene((line, bits, bars, stored), self._figures(fmt, levels), self._say(size))

    def _rivals(self, size: int) -> dict[str, LayerFormat]:
        smaller = self.as_large(size)
        return {
            f"sign only, groups of {size}": self.format("w1", size),
            f"sign only, groups of {smaller.group_size}: as many bits": smaller,
            f"sign and bitmap, groups of {size}": self.format("w1+1", size),
        }

    def _figures(self, fmt: LayerFormat, levels: Tensor) -> tuple[Figure, ...]:
        bits = Figure("Stored bits a weight", self.bits(fmt), f"{self.bits(fmt):.2f}", LAYER_BITS, dotted(layer_bits))
        params = levels_to_params(levels)[0, 0].tolist()
        names = (
            [("Levels", TWO_LEVELS)] if len(params) == 2 else [("Outer pair", OUTER_PAIR), ("Inner pair", INNER_PAIR)]
        )
        pairs = [
            Figure(label, alpha, f"{mu:.3f} ± {alpha:.3f}", formula, dotted(levels_to_params))
            for (label, formula), alpha, mu in zip(names, params[::2], params[1::2], strict=True)
        ]
        return (self.error(fmt), bits, *pairs)

    def _say(self, size: int) -> str:
        _, smaller, both = self._rivals(size).values()
        return (
            f"With {self.bits(both):.2f} bits a weight, sign and bitmap leave an error of {self.error(both).text}; the "
            f"sign alone, in smaller groups ({smaller.group_size}) so that it takes {self.bits(smaller):.2f} bits, "
            f"leaves {self.error(smaller).text}."
        )
