"""The course as static files: everything that the course computes is in them, and nothing else is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from lbllm.commands.main import main
from lbllm.course.course import Course, position_key
from lbllm.course.export import export_course, facts
from lbllm.course.lesson import LessonMaker, Positions, Scene
from lbllm.errors import ModelError, ResourceError
from tests.helpers.sample_course import FINGERPRINT, HOSTILE, LESSONS, TITLE, sample_course


def read(file: Path) -> Any:
    """The JSON in a data script."""
    text = file.read_text()
    found = re.fullmatch(r"(?:const COURSE = (.*)|lessonData\((.*)\));\n", text)
    assert found is not None
    return json.loads(found[1] or found[2])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "new" / "course"
    exported = export_course(sample_course(), out)
    assert exported.path == out
    assert exported.disk_bytes == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return out


def test_the_files_have_every_lesson_at_every_position(site: Path) -> None:
    course = sample_course()
    outline = read(site / "data" / "course.js")["outline"]
    assert [tuple(one) for one in outline] == list(course.outline)
    assert {file.stem for file in (site / "data").iterdir()} == {"course", *(key for key, _ in outline)}
    for key, _ in outline:
        written = read(site / "data" / f"{key}.js")
        lesson = course.lesson(key)
        expected = json.loads(json.dumps(asdict(lesson)))
        assert {name: written[name] for name in expected} == expected
        assert written["scenes"].keys() == {position_key(where) for where in lesson.positions()}
        for where in lesson.positions():
            scene = dict(written["scenes"][position_key(where)])
            scene["pictures"] = [written["pictures"][number] for number in scene["pictures"]]
            assert scene == json.loads(json.dumps(asdict(course.scene(key, where))))


def test_it_says_what_it_was_computed_from_and_when(site: Path) -> None:
    known = read(site / "data" / "course.js")
    assert known["checkpoint"] == {"name": TITLE, "teacher": "sample", "fingerprint": FINGERPRINT}
    assert date.fromisoformat(known["date"]) <= date.today()
    assert known == json.loads(json.dumps(facts(sample_course(), known["date"])))


def test_it_asks_no_other_site_and_runs_no_text(site: Path) -> None:
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML"}
    for file in filter(Path.is_file, site.rglob("*")):
        text = file.read_text()
        assert set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[\w./]*", text)) <= names, file.name
        assert HOSTILE not in text
    page = (site / "index.html").read_text()
    assert all((site / name).is_file() for name in re.findall(r'(?:src|href)="([\w./]+)"', page))


def test_a_course_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(LessonMaker):
        key, title = "broken", "Broken"
        lesson = LESSONS[0].lesson

        def scene(self, positions: Positions) -> Scene:
            raise ModelError("the teacher is gone")

    with pytest.raises(ModelError, match="the teacher is gone"):
        export_course(sample_course((*LESSONS[:1], Broken)), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ResourceError, match="full"):
        export_course(sample_course(LESSONS[2:3]), tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_the_command_writes_it_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[object, ...]] = []

    def open_course(*names: str | None) -> Course:
        opened.append(names)
        return sample_course(LESSONS[2:4])

    monkeypatch.setattr(Course, "open", open_course)
    assert main(["export-course", "--out", str(tmp_path / "one"), "--checkpoint", "mine", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert opened == [("mine", None)]
    assert (printed["path"], printed["lessons"], printed["scenes"]) == (str(tmp_path / "one"), 2, 7)
    assert printed["fingerprint"] == FINGERPRINT
    assert main(["export-course", "--out", str(tmp_path / "two"), "--teacher", "its"]) == 0
    said = capsys.readouterr()
    assert "2 lessons, 7 scenes" in said.out
    assert opened[1] == ("shipped", "its")

    # What is there already stays as it is.
    for words in (["--json"], []):
        assert main(["export-course", "--out", str(tmp_path / "one"), *words]) == 1
        refused = capsys.readouterr()
        assert f"--out {tmp_path / 'one'} exists and is not an empty folder" in refused.err
        assert refused.err.count("\n") == 1
    assert len(opened) == 2
