"""The desk of the page Learn: what takes long is computed in the background, once, and does not hold up the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import pytest

from app.learn import desk as desks
from app.learn.desk import Desk
from lbllm.chat.pool import Loaded, ModelPool
from lbllm.course.course import Course
from lbllm.course.lesson import Lesson, LessonMaker, Progress
from lbllm.errors import ModelError
from tests.helpers.sample_course import LESSONS, sample_course
from tests.helpers.waiting import wait_until

soon = partial(wait_until, seconds=20.0)


def open_desk(*makers: type[LessonMaker]) -> Desk:
    def opened(load: Callable[[str], Loaded]) -> Course:
        return sample_course(makers)

    return Desk(opened, ModelPool())


def slow(go: threading.Event, steps: list[int]) -> type[LessonMaker]:
    """A lesson that works until ``go`` is set; ``steps`` gets a number for each step."""

    class Slow(LessonMaker):
        key, title = "slow", "Slow"
        lesson, scene = LESSONS[2].lesson, LESSONS[2].scene

        def prepare(self) -> Iterator[Progress]:
            while not go.wait(0.01):
                steps.append(len(steps))
                yield Progress(0.5, "Half of it is done")

    return Slow


def test_an_answer_is_what_the_course_computes() -> None:
    desk, course = open_desk(*LESSONS), sample_course()
    assert desk.ask("line", None) == {"lesson": asdict(course.lesson("line"))}
    assert desk.ask("line", (1, 1)) == {
        "scene": asdict(course.scene("line", (1, 1))),
        "lesson": asdict(course.lesson("line")),
    }


def test_what_is_watched_is_computed_for_a_scene_and_completes_the_lesson() -> None:
    go = threading.Event()

    class Watched(LessonMaker):
        key, title = "watched", "Watched"
        scene = LESSONS[2].scene

        def watch(self) -> Iterator[Progress]:
            while not go.wait(0.01):
                yield Progress(0.5, "It happens now")

        def lesson(self) -> Lesson:
            made = LESSONS[2](self.data).lesson()
            return made if go.is_set() else replace(made, guess=replace(made.guess, right=None), check=None)

    desk = open_desk(Watched)
    assert desk.ask("watched", None, 20.0)["lesson"]["check"] is None
    soon(lambda: desk.ask("watched", (), 0.0).get("progress", {}).get("say") == "It happens now")
    go.set()
    answer = desk.ask("watched", (), 20.0)
    assert answer["scene"]["figures"]
    assert answer["lesson"] == desk.ask("watched", None)["lesson"]
    assert answer["lesson"]["guess"]["right"] is not None


def test_what_takes_long_says_how_far_it_is_and_holds_up_no_other_lesson() -> None:
    go, steps = threading.Event(), list[int]()
    desk = open_desk(LESSONS[2], slow(go, steps))
    soon(lambda: desk.ask("slow", None, 0.0).get("progress", {}).get("share") == 0.5)
    assert desk.ask("slow", None, 0.0)["progress"]["say"] == "Half of it is done"
    assert "lesson" in desk.ask("bars", None, 20.0)
    go.set()
    assert desk.ask("slow", None, 20.0)["lesson"]["key"] == "bars"


def test_what_nobody_waits_for_stops_and_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "PATIENCE", 0.05)
    go, steps = threading.Event(), list[int]()
    desk = open_desk(slow(go, steps))
    desk.ask("slow", None, 0.0)
    soon(lambda: not any(thread.name == "lbllm-course" for thread in threading.enumerate()))
    done = len(steps)
    desk.ask("slow", None, 0.0)
    soon(lambda: len(steps) > done)
    go.set()
    soon(lambda: "lesson" in desk.ask("slow", None))


def test_errors_are_sentences_and_the_next_question_tries_again() -> None:
    class Broken(LessonMaker):
        key, title = "broken", "Broken"
        errors = iter([ModelError("the teacher is gone; choose another"), ValueError("no")])
        scene = LESSONS[2].scene

        def lesson(self):  # type: ignore[no-untyped-def]
            raise next(self.errors)

    desk = open_desk(Broken, LESSONS[0])
    assert desk.ask("broken", None, 20.0) == {"error": "The teacher is gone; choose another"}
    assert desk.ask("broken", None, 20.0) == {"error": "This lesson can't be computed (ValueError: no)"}
    assert "there is no lesson 'none'" in desk.ask("none", None, 20.0)["error"].lower()
    assert "there is no position [5, 0]" in desk.ask("line", (5, 0), 20.0)["error"]
