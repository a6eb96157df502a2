"""The course: its lessons in their order, computed when they are asked for and kept.

course = Course.open("shipped")
course.outline                          keys and titles, known at once
for step in course.prepare("one-bit"): ...       what takes more than a moment, with its progress
course.lesson("one-bit")                texts, questions, dials
for step in course.watch("one-bit"): ...         what is watched after the guess
course.scene("one-bit", (3,))           what is shown there
course.document()                       everything, for a site that needs no server
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from lbllm.chat.pool import Loaded
from lbllm.course.data import CourseData
from lbllm.course.lesson import Lesson, LessonMaker, Positions, Progress, Scene
from lbllm.course.lessons import LESSONS
from lbllm.errors import ConfigError

VERSION = 1


class Course:
    """The lessons on one checkpoint. Threads may share it: one of them computes at a time."""

    def __init__(self, data: CourseData, makers: tuple[type[LessonMaker], ...] = LESSONS) -> None:
        self.data = data
        self._makers = {maker.key: maker(data) for maker in makers}
        self._steps: dict[tuple[str, str], Iterator[Progress]] = {}
        self._over: set[tuple[str, str]] = set()
        self._lessons: dict[str, Lesson] = {}
        self._scenes: dict[tuple[str, Positions], Scene] = {}
        self._turn = threading.RLock()

    @classmethod
    def open(
        cls,
        checkpoint: str = "shipped",
        teacher: str | None = None,
        load: Callable[[str], Loaded] | None = None,
    ) -> Course:
        """The course on a checkpoint, named as ``find_checkpoint`` takes it; nothing is computed yet.

        ``teacher``: by default the one that the checkpoint names. ``load`` gives loaded models by their names, so that
        a page can share those that it has. Raises CheckpointError, ModelError, RunError.
        """
        return cls(CourseData.open(checkpoint, teacher, load))

    @property
    def outline(self) -> tuple[tuple[str, str], ...]:
        """Key and title of each lesson, in order."""
        return tuple((key, maker.title) for key, maker in self._makers.items())

    @property
    def lessons(self) -> tuple[Lesson, ...]:
        """All lessons, in order. Raises LbllmError."""
        return tuple(self.lesson(key) for key in self._makers)

    def prepared(self, key: str) -> bool:
        """Whether ``lesson`` returns without a long computation."""
        self._maker(key)
        return (key, "prepare") in self._over

    def prepare(self, key: str) -> Iterator[Progress]:
        """Compute what the lesson needs, and yield how far it is; nothing to yield if that is done.

        Who stops reading leaves the rest to the next reader; two readers at once share the work. Raises LbllmError.
        """
        yield from self._read(key, "prepare", self._maker(key).prepare)

    def watch(self, key: str) -> Iterator[Progress]:
        """The same for what is watched after the guess: then the lesson is complete, and its scenes can be shown."""
        yield from self.prepare(key)
        yield from self._read(key, "watch", self._maker(key).watch)

    def _read(self, key: str, part: str, begin: Callable[[], Iterator[Progress]]) -> Iterator[Progress]:
        while True:
            with self._turn:
                if (key, part) in self._over:
                    return
                if (key, part) not in self._steps:
                    self._steps[key, part] = begin()
                try:
                    progress = next(self._steps[key, part], None)
                except BaseException:
                    del self._steps[key, part]  # it starts anew when it is asked for again
                    raise
                if progress is None:
                    self._over.add((key, part))
                    return
            yield progress

    def lesson(self, key: str) -> Lesson:
        """A lesson by its key, complete if what is watched in it is over. Raises ConfigError for an unknown key,
        LbllmError."""
        maker = self._maker(key)
        for _ in self.prepare(key):
            pass
        with self._turn:
            known = self._lessons.get(key)
            if known is None or (not known.complete and (key, "watch") in self._over):
                known = self._lessons[key] = maker.lesson()
            return known

    def scene(self, key: str, positions: Positions) -> Scene:
        """A lesson's scene at these positions of its dials. Raises ConfigError if a position is not on its dial,
        LbllmError."""
        lesson = self.lesson(key)
        counts = [len(dial.values) for dial in lesson.dials]
        if len(positions) != len(counts) or any(not 0 <= p < n for p, n in zip(positions, counts, strict=False)):
            raise ConfigError(
                f"lesson {key}: there is no position {list(positions)}; its dials have {counts} positions each"
            )
        for _ in self.watch(key):
            pass
        with self._turn:
            if (key, positions) not in self._scenes:
                self._scenes[key, positions] = self._makers[key].scene(positions)
            return self._scenes[key, positions]

    def document(self, done: Callable[[str], None] = lambda key: None) -> dict[str, Any]:
        """The whole course as JSON: all lessons, and their scenes at all positions of their dials.

        ``done`` is called with a lesson's key when it is complete. The scene of positions (2, 0) is
        ``lessons[n]["scenes"]["2,0"]``, see ``position_key``. Raises LbllmError.
        """
        lessons = []
        for key in self._makers:
            for _ in self.watch(key):
                pass
            lesson = self.lesson(key)
            scenes = {position_key(where): asdict(self.scene(key, where)) for where in lesson.positions()}
            lessons.append(asdict(lesson) | {"scenes": scenes})
            done(key)
        data = self.data
        checkpoint = {"name": data.title, "teacher": data.teacher_title, "fingerprint": data.fingerprint}
        document = {"version": VERSION, "checkpoint": checkpoint, "lessons": lessons}
        check_numbers(document)
        return document

    def _maker(self, key: str) -> LessonMaker:
        if key not in self._makers:
            raise ConfigError(f"there is no lesson {key!r}; the lessons are {', '.join(self._makers)}")
        return self._makers[key]


def position_key(positions: Positions) -> str:
    """The name of a scene in the document: "2,0"; empty without dials."""
    return ",".join(map(str, positions))


def check_numbers(value: Any, place: str = "course") -> None:
    """Raise ValueError, naming the place, if a number in nested dictionaries and lists is not finite."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_numbers(part, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            check_numbers(part, f"{place}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}")
