"""The data of a course on a tiny checkpoint, and what every lesson must keep to."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lbllm.course.data import CourseData
from lbllm.course.lesson import LessonMaker, Question
from lbllm.runs.store import RunStore
from lbllm.sections import Stage
from tests.helpers.finished_run import finished_run


def tiny_data(folder: Path, stages: tuple[Stage, ...] = ("ptq", "wat"), **changes: Any) -> CourseData:
    """The data of a checkpoint that a run in ``folder`` makes in a second or two; ``changes`` to its settings."""
    store = RunStore(folder / "runs")
    run = finished_run(store, folder, stages, **changes)
    store.close()
    return CourseData.open(str(run.folder / "checkpoint"), str(folder / "teacher"))


def prepared(maker: LessonMaker) -> LessonMaker:
    """The lesson after all that it computes before its scenes, whose progress must rise from 0 to 1 and say
    something. What it shows before the watching must be sound, too."""
    for work in (maker.prepare, maker.watch):
        steps = list(work())
        shares = [step.share for step in steps]
        assert shares == sorted(shares)
        assert all(0 <= share <= 1 for share in shares)
        assert all(step.say for step in steps)
        lesson = maker.lesson()
        assert lesson.guess.text.endswith("?")
        assert lesson.complete or work == maker.prepare
    return maker


def check_lesson(maker: LessonMaker) -> None:
    """All texts, questions, positions and figures of a prepared lesson are sound."""
    lesson = maker.lesson()
    assert (lesson.key, lesson.title) == (maker.key, maker.title)
    assert 1 <= lesson.idea.count(". ") + 1 <= 2
    for question in (lesson.guess, lesson.check):
        assert question is not None
        check_question(question)
    places = list(lesson.positions())
    assert lesson.start in places
    assert 1 < len(places) <= 120
    scenes = [maker.scene(place) for place in places]
    for scene in scenes:
        assert scene.say.endswith(".")
        assert scene.pictures
        assert scene.figures
        for figure in scene.figures:
            assert math.isfinite(figure.value)
            module, _, name = figure.function.rpartition(".")
            assert module.startswith("lbllm.")
            assert callable(getattr(importlib.import_module(module), name))
    # Something moves with each dial.
    for number, dial in enumerate(lesson.dials):
        at = {place: scene for place, scene in zip(places, scenes, strict=True) if _others(place, number) == 0}
        assert len(at) == len(dial.values)
        assert len({json.dumps(asdict(scene), sort_keys=True) for scene in at.values()}) > min(1, len(dial.values) - 1)
    json.dumps([asdict(scene) for scene in scenes], allow_nan=False)


def check_question(question: Question) -> None:
    """The options differ, one of them is right, and there is a reason."""
    assert 2 <= len(question.options) <= 4
    assert len(set(question.options)) == len(question.options)
    assert question.right is not None
    assert 0 <= question.right < len(question.options)
    assert question.text.endswith("?")
    assert question.because.endswith(".")


def typed_digits(maker: type[LessonMaker]) -> list[str]:
    """The texts in a lesson's source that have a digit typed in them; formats like "{:.2f}" are none."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(maker) or maker))
    specs = {id(part) for node in ast.walk(tree) for part in _specs(node)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in specs]
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in texts
        if isinstance(node.value, str)
        and id(node) not in said
        and any(c.isdigit() for c in _without_formats(node.value))
    ]


def _specs(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
        yield from ast.walk(node.format_spec)


def _without_formats(text: str) -> str:
    return "" if text.startswith("{:") and text.endswith("}") else text


def _others(place: tuple[int, ...], number: int) -> int:
    return sum(place[:number]) + sum(place[number + 1 :])
