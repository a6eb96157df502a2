"""The course on invented lessons: what is computed when, positions, questions, and the document of everything."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.course import mathml, pictures
from lbllm.course.course import Course, check_numbers, position_key
from lbllm.course.data import CourseData
from lbllm.course.lesson import (
    Dial,
    Lesson,
    LessonMaker,
    Positions,
    Progress,
    Question,
    Scene,
    computed,
    dotted,
    number_question,
)
from lbllm.errors import ConfigError, ResourceError
from lbllm.microscope.layer import relative_error
from tests.helpers.cases import cases

QUESTION = Question("Which?", ("this", "that"), 1, "So it is.")


@dataclass
class Data:
    title: str = "student"
    teacher_title: str = "teacher"
    fingerprint: str = "ab" * 32
    calls: list[Any] = field(default_factory=list)


class Plain(LessonMaker):
    key, title = "plain", "Without dials"

    def lesson(self) -> Lesson:
        return Lesson(self.key, self.title, "One idea.", QUESTION, (), QUESTION)

    def scene(self, positions: Positions) -> Scene:
        return Scene((pictures.table("t", ["a"], [["b"]]),), (), "There it is.")


class Moving(LessonMaker):
    key, title = "moving", "With two dials"

    def prepare(self) -> Iterator[Progress]:
        for step in range(3):
            cast(Any, self.data).calls.append(step)
            yield Progress(step / 2, f"Step {step}.")

    def lesson(self) -> Lesson:
        assert cast(Any, self.data).calls[-1] == 2
        return Lesson(
            self.key,
            self.title,
            "Idea.",
            QUESTION,
            (Dial("a", "A", ("0", "1")), Dial("b", "B", ("x", "y", "z"), 2)),
            QUESTION,
        )

    def scene(self, positions: Positions) -> Scene:
        cast(Any, self.data).calls.append(positions)
        one = torch.tensor([1.0, 2.0])
        figure = computed("Error", "{:.1%}", "", relative_error, one, one + positions[0])
        return Scene((pictures.curve("c", [0, 1], {"y": [None, 1.0]}, x_label="x", y_label="y"),), (figure,), "Said.")


def course(*makers: type[LessonMaker]) -> Course:
    return Course(cast(CourseData, Data()), makers or (Plain, Moving))


def test_nothing_is_computed_before_it_is_asked_for_and_then_once() -> None:
    made = course()
    calls = cast(Any, made.data).calls
    assert made.outline == (("plain", "Without dials"), ("moving", "With two dials"))
    assert calls == []
    assert not made.prepared("moving")
    assert [step.share for step in made.prepare("moving")] == [0, 0.5, 1]
    assert made.prepared("moving")
    assert list(made.prepare("moving")) == []
    first = made.scene("moving", (1, 0))
    assert made.scene("moving", (1, 0)) is first
    assert calls == [0, 1, 2, (1, 0)]
    assert first.figures[0].function == "lbllm.microscope.layer.relative_error"
    assert [lesson.key for lesson in made.lessons] == ["plain", "moving"]


def test_a_reader_who_leaves_leaves_the_rest_to_the_next() -> None:
    made = course()
    steps = made.prepare("moving")
    assert next(steps).say == "Step 0."
    cast(Any, steps).close()
    assert made.lesson("moving").start == (0, 2)
    assert cast(Any, made.data).calls == [0, 1, 2]


def test_threads_share_one_preparation() -> None:
    made = course()
    threads = [threading.Thread(target=made.lesson, args=("moving",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cast(Any, made.data).calls == [0, 1, 2]


def test_a_preparation_that_failed_starts_anew() -> None:
    class Failing(Moving):
        def prepare(self) -> Iterator[Progress]:
            yield Progress(0, "Begun.")
            if not cast(Any, self.data).calls:
                cast(Any, self.data).calls.append("failed")
                raise ResourceError("no memory; close a program")
            yield from super().prepare()

    made = course(Failing)
    with pytest.raises(ResourceError, match="no memory"):
        made.lesson("moving")
    assert made.lesson("moving").key == "moving"


@pytest.mark.parametrize("positions", [(), (0,), (0, 3), (2, 0), (-1, 0), (0, 0, 0)])
def test_a_position_that_is_not_on_its_dial_is_refused(positions: Positions) -> None:
    with pytest.raises(ConfigError, match=r"lesson moving: there is no position .*\[2, 3\]"):
        course().scene("moving", positions)


def test_an_unknown_lesson_is_refused_with_the_known_ones() -> None:
    for ask in (lambda c: c.lesson("other"), lambda c: c.scene("other", ()), lambda c: list(c.prepare("other"))):
        with pytest.raises(ConfigError, match="no lesson 'other'; the lessons are plain, moving"):
            ask(course())


def test_the_document_has_every_scene_and_is_json() -> None:
    done: list[str] = []
    document = course().document(done.append)
    assert done == ["plain", "moving"]
    plain, moving = document["lessons"]
    assert list(plain["scenes"]) == [""]
    assert sorted(moving["scenes"]) == ["0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]
    assert moving["scenes"]["1,0"]["figures"][0]["text"] == "40.0%"
    assert document["checkpoint"] == {"name": "student", "teacher": "teacher", "fingerprint": "ab" * 32}
    assert json.loads(json.dumps(document, allow_nan=False))["lessons"][1]["dials"][1]["start"] == 2
    assert json.dumps(document) == json.dumps(course().document())
    assert position_key((2, 0)) == "2,0"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_named_with_its_place(value: float) -> None:
    with pytest.raises(ValueError, match=r"course\.a\.1\.b is"):
        check_numbers({"a": [1.0, {"b": value}]})


@given(st.floats(0, 1.5), st.lists(st.floats(0, 2), max_size=4))
@cases(100)
def test_options_of_a_number_differ_as_shown_and_one_is_right(right: float, wrong: list[float]) -> None:
    question = number_question("How much?", right, wrong, "{:.2%}", "So.")
    assert len(question.options) == len(set(question.options)) == 3
    assert question.right is not None
    assert question.options[question.right] == f"{right:.2%}"
    values = [float(option.rstrip("%")) for option in question.options]
    assert values == sorted(values)


def test_names_of_functions_can_be_imported() -> None:
    assert dotted(relative_error) == "lbllm.microscope.layer.relative_error"
    assert dotted(Course.open) == "lbllm.course.course.Course.open"


def test_pictures_are_short_numbers() -> None:
    made = pictures.line("w", torch.tensor([1 / 3, -0.0]), [1 / 7], [0, None], notes=["a", "b"], level_labels=["l"])
    assert made.data["points"] == [{"x": 0.33333, "level": 0, "note": "a"}, {"x": 0.0, "level": None, "note": "b"}]
    assert str(made.data["points"][1]["x"]) == "0.0"
    assert made.data["levels"] == [{"x": 0.14286, "label": "l"}]
    assert made.data["low"] < 0
    assert made.data["high"] > 1 / 3
    equal = pictures.line("w", [2.0, 2.0], [])
    assert equal.data["low"] < 2 < equal.data["high"]
    assert pictures.grid("g", torch.eye(2)).data["rows"] == [[1.0, 0.0], [0.0, 1.0]]
    assert pictures.plane_text(torch.tensor([True, False, True])) == "101"


def test_formulas_are_well_formed() -> None:
    formula = mathml.math(
        mathml.frac(mathml.square(mathml.norm("w", "<", "a&b")), "2.5"),
        "=",
        mathml.total("j", mathml.sub("w", "j")),
        mathml.words("a < b"),
    )
    tree = ElementTree.fromstring(formula)
    assert tree.tag == "math"
    assert [node.text for node in tree.iter("mo")] == ["‖", "<", "‖", "=", "∑"]
    assert [node.text for node in tree.iter("mn")] == ["2", "2.5"]
    assert [node.text for node in tree.iter("mi")] == ["w", "a&b", "j", "w", "j"]
