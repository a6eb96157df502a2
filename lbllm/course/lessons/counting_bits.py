"""Lesson 9: the name of a format counts the planes; a file also has levels, scales and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from lbllm.course import pictures
from lbllm.course.counting import (
    PARAMETERS,
    PLANES,
    Counter,
    code_bits,
    dense_bits,
    file_bits,
    file_bits_with,
    part_bits,
    share_of_file,
    store_group,
)
from lbllm.course.data import layer_words
from lbllm.course.formulas import BITS_PER_WEIGHT, FILE_BITS, PART_BITS
from lbllm.course.lesson import (
    Dial,
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
from lbllm.labels import BINARIZED_BITS
from lbllm.measure.estimate import Estimate
from lbllm.quant.plan import bits_per_weight
from lbllm.sections import WHOLE_ROW, ParamBits
from lbllm.units import against_16_bits, size

SIZES = (8, 16, 32, 64, 128)
LARGER = 10  # times as many binarized weights
PARAM_BITS: tuple[ParamBits, ...] = (4, 8, 16)
ROWS, DRAWN = 64, 64  # rows whose parameters share a grid, and weights of a group that are drawn
NAMES = {
    "bits": "sign bits",
    "bitmap": "bitmap bits",
    "parameters": "levels of the groups, with scales",
    "embeddings": "embeddings, the table of tokens",
    "output head": "output head, which scores next tokens",
    "other": "norms, the file's table of contents and others",
}


class CountingBits(LessonMaker):
    """Choose groups and their parameters, and count the file."""

    key = "counting-bits"
    title = "Counting bits honestly"

    def prepare(self) -> Iterator[Progress]:
        """Find the checkpoint's file, and count files for all settings."""
        yield Progress(0.0, "The parts of the file are counted.")
        self._counter = Counter(self.data)
        self._sizes = self._counter.sizes(SIZES)
        self._counts = {(g, b): self._counter.count(g, b) for g in self._sizes for b in PARAM_BITS}

    @property
    def _own(self) -> tuple[int, ParamBits]:
        return self.data.quant.group_size, self.data.quant.param_bits

    def lesson(self) -> Lesson:
        """The texts: the guess is on the whole file, the check on that of a larger model."""
        own, planes = self._counts[self._own], code_bits(self.data.quant)
        whole = file_bits(own)
        guess = number_question(
            f"A binarized weight of this model is {planes} {'bits' if planes > 1 else 'bit'}, which choose its level. "
            "How many bits does the file have for each weight of the model?",
            whole,
            [planes, own.bpw],
            "{:.2f}",
            f"With the levels of the groups it is {own.bpw:.2f} bits for a binarized weight. The file also has "
            f"{own.dense_weights / 1e6:,.1f} million weights that are not binarized, "
            f"{own.dense_weights / own.parameters:.0%} of all, with {dense_bits(own):.0f} bits each.",
        )
        return Lesson(
            self.key,
            self.title,
            "The name of a format counts the bits that choose a level. A file must also hold the levels themselves, "
            "and the parts of the model that are not binarized.",
            guess,
            (
                Dial(
                    "group",
                    "Weights in a group",
                    tuple(map(group_words, self._sizes)),
                    self._sizes.index(self.data.quant.group_size),
                ),
                Dial(
                    "params",
                    "Bits of each number that gives the levels",
                    tuple(map(str, PARAM_BITS)),
                    PARAM_BITS.index(self.data.quant.param_bits),
                ),
            ),
            self._check(own),
        )

    def _check(self, own: Estimate) -> Question:
        here, larger = file_bits(own), file_bits_with(own, LARGER)
        rest = 1 - sum(share_of_file(own, part) for part in (*PLANES, *PARAMETERS))
        return number_question(
            f"A larger model has {LARGER} times as many binarized weights in the same format, and as many others as "
            f"this one, with {dense_bits(own):.0f} bits each. This file has {here:.2f} bits for each weight of the "
            "model. How many has that of the larger model?",
            larger,
            [here, here / LARGER],
            "{:.2f}",
            f"Here the other weights take {rest:.0%} of the file. In the larger model they are a small share of all "
            f"weights, so its file comes close to the {own.bpw:.2f} bits of a binarized weight; it can't come below "
            "them.",
        )

    def scene(self, positions: Positions) -> Scene:
        """The bits of a weight, and the bytes of the file, by their parts."""
        chosen = self._sizes[positions[0]], PARAM_BITS[positions[1]]
        count = self._counts[chosen]
        figures = (
            computed("Bits that choose the level, a weight", "{:.2f}", PART_BITS, part_bits, count, PLANES),
            computed("Bits of the levels, a weight", "{:.2f}", PART_BITS, part_bits, count, PARAMETERS),
            computed(
                BINARIZED_BITS.capitalize(), "{:.2f}", BITS_PER_WEIGHT, bits_per_weight, *self._counter.formats(*chosen)
            ),
            computed("Bits of the whole file, for each weight of the model", "{:.2f}", FILE_BITS, file_bits, count),
        )
        compared = against_16_bits(count.disk_bytes, count.parameters)
        said = f"The file has {size(count.disk_bytes)} and is {compared}."
        if chosen == self._own:
            said = (
                f"This is the checkpoint as it is: we count {count.disk_bytes:,} bytes, and its file has "
                f"{self._counter.file_bytes:,}; it is {compared}."
            )
            if self.data.quant.overrides:
                said += " Some of its layers have other groups than these; the bits are means over all layers."
        return Scene((self._group(*chosen), self._weight(count), self._file(count)), figures, said)

    def _group(self, group_size: int, param_bits: int) -> Picture:
        """One group of real weights in these bits; of a long group only the first weights are drawn."""
        at = self.data.example_group
        assert at.row is not None
        assert at.group is not None
        rows = self.data.example.original[at.row : at.row + ROWS]
        quant = self._counter.quant(group_size, param_bits).model_copy(update={"overrides": {}})
        group = store_group(rows, quant, at.group * self.data.example.length)
        count, shown = len(group.signs), min(len(group.signs), DRAWN)
        of = "" if shown == count else f", the first {shown} of {count}"
        parts: list[tuple[str, str, Literal["sign", "bitmap", "params"]]] = [
            (f"sign bits{of}", pictures.plane_text(group.signs[:shown]), "sign")
        ]
        if group.bitmap is not None:
            parts.append((f"bitmap bits{of}", pictures.plane_text(group.bitmap[:shown]), "bitmap"))
        parts += [(name, code, "params") for name, code in group.params]
        return pictures.bits(
            f"{count} weights of {layer_words(at)}, with levels fitted to them: each pair of levels is μ ± α",
            parts,
            f"{group.bits} bits for {count} weights: {group.bits / count:.2f} bits a weight, without the "
            "scales that groups share",
        )

    def _weight(self, count: Estimate) -> Picture:
        parts = [part for part in (*PLANES, *PARAMETERS) if count.parts[part]]
        values = [part_bits(count, [part]) for part in parts]
        return pictures.bars("Bits of one binarized weight", [NAMES[part] for part in parts], {"bits": values})

    def _file(self, count: Estimate) -> Picture:
        parts = [part for part in NAMES if count.parts[part]]
        values = [count.parts[part] / 1e6 for part in parts]
        return pictures.bars("The file by its parts", [NAMES[part] for part in parts], {"MB": values}, unit="MB")


def group_words(group_size: int) -> str:
    """A group size as a dial shows it."""
    return "a whole row" if group_size == WHOLE_ROW else str(group_size)
