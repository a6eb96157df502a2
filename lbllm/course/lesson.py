"""What a lesson is made of: the form in which lessons, their scenes and their questions reach a page.

All of it is data that turns into JSON with ``dataclasses.asdict``; the same renderer draws it in the workbench and in
the exported course. A lesson has dials. Each dial has a position, counted from 0, and for the positions of all its
dials a lesson has one ``Scene``: pictures, figures and one sentence about them.

No number in a text is typed by hand. A ``Figure`` is the value of a function of the engine, whose name stands beside
it; texts and the options of questions are formatted from figures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from lbllm.course.data import CourseData

Positions = tuple[int, ...]

# A question about a number has this many options, where its wrong ones differ as shown.
OPTIONS = 3
APART = 1.2
# Wrong options beside those that a lesson computes, as multiples of the right one: for other checkpoints, where some of
# them can be the same number as shown.
_SPARE = (2.0, 0.5, 4.0, 0.25, 8.0)
_FIXED = (0.1, 0.5, 1.0, 10.0)  # where the right one is shown as zero


@dataclass(frozen=True)
class Figure:
    """A number beside a picture. ``text``: as it is shown; ``formula``: MathML, or empty; ``function``: the dotted name
    of the function of the engine that computes it."""

    label: str
    value: float
    text: str
    formula: str
    function: str


def computed(label: str, form: str, formula: str, function: Callable[..., Any], *args: Any, **options: Any) -> Figure:
    """The figure that ``function(*args, **options)`` is, shown in the format ``form``, like "{:.1%}"."""
    value = float(function(*args, **options))
    return Figure(label, value, form.format(value), formula, dotted(function))


def worse_than_none(error: float) -> str:
    """A sentence for a relative error of weights above 1, with a space before it; empty for others."""
    if error <= 1:
        return ""
    return f" More than {1:.0%} is worse than no weights at all: with zeros in their place it would be {1:.0%}."


def dotted(function: Callable[..., Any]) -> str:
    """The name under which a function, class or method can be imported: "lbllm.quant.levels.fit_levels"."""
    return f"{function.__module__}.{function.__qualname__}"


@dataclass(frozen=True)
class Picture:
    """Something to see. ``lbllm.course.pictures`` makes the kinds, and says what ``data`` each of them has."""

    kind: str
    label: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """What is shown at one position of the dials. ``say``: one sentence about it."""

    pictures: tuple[Picture, ...]
    figures: tuple[Figure, ...]
    say: str


@dataclass(frozen=True)
class Dial:
    """Something to move: it has one of ``values``, as shown; ``start`` is the position at the beginning."""

    name: str
    label: str
    values: tuple[str, ...]
    start: int = 0


@dataclass(frozen=True)
class Question:
    """A question with a right option (its position), and the reason for it. ``right`` is None, and ``because`` empty,
    as long as nobody can know: what the question is about happens after the answer."""

    text: str
    options: tuple[str, ...]
    right: int | None
    because: str


def number_question(text: str, right: float, wrong: Sequence[float], form: str, because: str) -> Question:
    """A question whose options are numbers, shown in the format ``form`` in ascending order.

    A wrong number that is shown like the right one or an earlier wrong one, or is nearer to it than by the factor
    ``APART``, is left out; where fewer than ``OPTIONS`` are left, multiples of the right one take their places.
    """
    options = {form.format(right): right}
    for value in (*wrong, *(right * factor for factor in _SPARE), *_FIXED):
        clear = all(max(value, other) >= APART * min(value, other) for other in options.values())
        if len(options) < OPTIONS and clear:
            options.setdefault(form.format(value), value)
    ordered = sorted(options, key=lambda option: options[option])
    return Question(text, tuple(ordered), ordered.index(form.format(right)), because)


@dataclass(frozen=True)
class Lesson:
    """A lesson without its scenes. ``idea``: two sentences; ``guess``: asked and scored before the first scene is
    shown; ``check``: asked at the end, None as long as ``LessonMaker.watch`` has not ended; ``inspect``: the address of
    what the lesson is about, for the page Inspect, or empty."""

    key: str
    title: str
    idea: str
    guess: Question
    dials: tuple[Dial, ...]
    check: Question | None
    inspect: str = ""

    def positions(self) -> Iterator[Positions]:
        """All positions of the dials; without dials, the one position ()."""
        return product(*(range(len(dial.values)) for dial in self.dials))

    @property
    def start(self) -> Positions:
        """The positions of the dials at the beginning."""
        return tuple(dial.start for dial in self.dials)

    @property
    def complete(self) -> bool:
        """Whether both questions have their answers."""
        return self.check is not None and None not in (self.guess.right, self.check.right)


@dataclass(frozen=True)
class Progress:
    """How far the preparation of a lesson is: ``share`` from 0 to 1, a sentence, and what can be seen already."""

    share: float
    say: str
    pictures: tuple[Picture, ...] = ()


class LessonMaker(ABC):
    """Makes one lesson from a checkpoint and its teacher. ``title`` has no numbers, so it is known without computing.

    What a lesson computes it keeps, so that another scene is fast. ``Course`` calls ``prepare`` to its end before
    ``lesson``, and ``watch`` to its end before ``scene``; one thread at a time.
    """

    key: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, data: CourseData) -> None:
        self.data = data

    def prepare(self) -> Iterator[Progress]:
        """Compute what takes more than a moment, and yield how far it is. Raises LbllmError."""
        return iter(())

    def watch(self) -> Iterator[Progress]:
        """Compute what the reader watches after the guess, and yield how far it is. Then ``lesson`` is complete. Raises
        LbllmError."""
        return iter(())

    @abstractmethod
    def lesson(self) -> Lesson:
        """The lesson's texts, questions and dials. Raises LbllmError."""

    @abstractmethod
    def scene(self, positions: Positions) -> Scene:
        """The scene at these positions of the dials, which are in range. Raises LbllmError."""
