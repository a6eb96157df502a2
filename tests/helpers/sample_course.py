"""A course of invented numbers with every kind of picture: what draws and exports lessons is tried on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lbllm.course import mathml, pictures
from lbllm.course.course import Course
from lbllm.course.data import CourseData
from lbllm.course.lesson import Dial, Figure, Lesson, LessonMaker, Picture, Positions, Question, Scene, computed
from lbllm.microscope.layer import relative_error

HOSTILE = "</script><b>word</b>"
TITLE = "sample, W(1+1)A4KV4"
FINGERPRINT = "0123456789abcdef" * 4
GUESS = Question("How large is the error?", ("5.4%", "18.4%", "34.0%"), 1, "Two decimal places keep most of it.")
CHECK = Question("What is stored for one weight?", ("Its value", f"Two bits {HOSTILE}"), 1, "The levels are shared.")


@dataclass(frozen=True)
class SampleData:
    """What a course says of its checkpoint."""

    title: str = TITLE
    teacher_title: str = "sample"
    fingerprint: str = FINGERPRINT


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.08


def _bits(count: int) -> str:
    return pictures.plane_text(_noise(count) > 0)


def _line(positions: Positions) -> list[Picture]:
    weights, levels = _noise((16, 64)[positions[1]]), torch.linspace(-0.12, 0.12, (0, 2, 4, 16)[positions[0]])
    index = (weights[:, None] - levels).abs().argmin(1) if len(levels) else None
    labels = [f"{level:.3f}" for level in levels.tolist()]
    return [pictures.line("Weights of a group", weights, levels, index, level_labels=labels)]


def _histogram(positions: Positions) -> list[Picture]:
    edges = torch.linspace(-0.3, 0.3, 31)
    before, after = (torch.histogram(_noise(5000) * factor, edges)[0] for factor in (1.0, 0.4 + 0.1 * positions[0]))
    marks = [(-0.1, "level 1"), (-0.09, "level 2"), (0.1, "level 4")]
    return [pictures.histogram("Before and after", edges, {"before": before, "after": after}, marks)]


def _bars(positions: Positions) -> list[Picture]:
    return [
        pictures.bars("Errors", ["1 bit", "1+1 bits", "4 bits"], {"": [0.34, 0.184, None]}, percent=True),
        pictures.bars(
            "Bytes",
            ["signs", "what stays in 16 bits, such as norms and embeddings"],
            {"here": [12.1, 6.3], "in 16 bits": [193.0, -0.1]},
            unit="MB",
        ),
    ]


def _curve(positions: Positions) -> list[Picture]:
    series: dict[str, pictures.Numbers] = {
        "EM": [0.3 * math.exp(-step / 4) for step in range(21)],
        "start": [0.35] * 20 + [None],
    }
    loss = [3 * math.exp(-x / 9) for x in range(60)]
    return [
        pictures.curve(
            "Error after each step", range(21), series, mark=4 * positions[0], x_label="step", y_label="error"
        ),
        pictures.curve("Loss", range(60), {"loss": loss}, log=True, x_label="step", y_label="error"),
    ]


def _grid(positions: Positions) -> list[Picture]:
    part = _noise(8, 16)
    names = [f"row {row}" for row in range(8)]
    return [
        pictures.grid("A part of the matrix", part, row_labels=names, column_labels=[str(c) for c in range(16)]),
        pictures.grid("Its signs", (part > 0).int(), scale="binary"),
        pictures.grid("A layer", _noise(32, 64).abs(), scale="sequential", unit="rms"),
    ]


def _stored(positions: Positions) -> list[Picture]:
    planes = [("Signs", _bits(16), "sign"), ("Bitmap", _bits(16), "bitmap"), ("Levels", _bits(16), "params")]
    return [pictures.bits("One group in the file", [*planes, ("Scales", _bits(8), "other")], "3.5 bits a weight")]  # type: ignore[list-item]


def _answer(positions: Positions) -> list[Picture]:
    tokens = [(word, value**2, "seen") for value, word in enumerate(["The", " sky", " is", "\n", " blue", HOSTILE])]
    rows = [["blue", "61.2%", "48.0%"], [HOSTILE, "3%", "–"]]
    wide = ["Input", "Its value", "Weight", "Product", "Rounded weight", "Product then"]
    return [
        pictures.text("Differences", tokens, unit="nats"),
        pictures.table("Next words", ["word", "teacher", "student"], rows),
        pictures.table("Products", wide, [["input 247", "-1.330", "-0.100", "0.1324", "-0.105", "0.1395"]]),
    ]


def _maker(
    key: str, title: str, dials: tuple[Dial, ...], draw: Callable[[Positions], list[Picture]]
) -> type[LessonMaker]:
    class Sample(LessonMaker):
        def lesson(self) -> Lesson:
            return Lesson(key, title, "A weight is a number. Round it.", GUESS, dials, CHECK, "14/mlp.up_proj/211/7")

        def scene(self, positions: Positions) -> Scene:
            over = mathml.square(mathml.norm("w", "−", mathml.sub("w", "q")))
            formula = mathml.math(mathml.frac(over, mathml.square(mathml.norm("w"))))
            weights = _noise(16)
            error = computed("Relative error", "{:.1%}", formula, relative_error, weights, weights.round(decimals=1))
            count = Figure("Position", float(sum(positions)), str(sum(positions)), "", "builtins.sum")
            return Scene(tuple(draw(positions)), (error, count), f"The dials stand at {list(positions)}.")

    Sample.key, Sample.title = key, title
    return Sample


def _steps(count: int) -> tuple[str, ...]:
    return tuple(str(step) for step in range(count))


LESSONS = (
    _maker(
        "line",
        "Weights",
        (Dial("levels", "Levels", ("0", "2", "4", "16"), 2), Dial("n", "Weights", ("16", "64"))),
        _line,
    ),
    _maker("histogram", "Histograms", (Dial("width", "Width", _steps(7), 3),), _histogram),
    _maker("bars", "Bars", (), _bars),
    _maker("curve", "Curves", (Dial("step", "Step", _steps(6)),), _curve),
    _maker("grid", "Grids", (), _grid),
    _maker("bits", "Bits", (), _stored),
    _maker("answer", "Answers", (), _answer),
)


def sample_course(makers: tuple[type[LessonMaker], ...] = LESSONS) -> Course:
    """A course that computes at once and reads no model."""
    return Course(cast("CourseData", SampleData()), makers)
