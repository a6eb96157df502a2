"""docs/teaching.md names lessons by number and title, and the plan of the class fills its minutes."""

from __future__ import annotations

import re

from lbllm.course.lessons import LESSONS
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "teaching.md").read_text()


def test_lessons_have_their_numbers() -> None:
    named = re.findall(r"lesson (\d+), \*(.+?)\*", PAGE)
    assert len(named) >= 8
    assert [(number, LESSONS[int(number) - 1].title) for number, _ in named] == named
    assert max(int(number) for number in re.findall(r"[Ll]essons? (\d+)", PAGE)) <= len(LESSONS)


def test_the_plan_has_no_gap() -> None:
    spans = [(int(start), int(end)) for start, end in re.findall(r"^\| (\d+) to (\d+) \|", PAGE, re.MULTILINE)]
    assert spans[0][0] == 0
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert f"# A class of {spans[-1][1]} minutes" in PAGE
