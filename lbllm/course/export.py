"""Write the course as a site of static files, for any web space or a folder that is opened by a double click.

    DIR/index.html, course.css, course.js     the page; the workbench shows the same with the same files
    DIR/data/course.js                        titles, the checkpoint's name and hash, the date
    DIR/data/<lesson>.js                      a lesson with all its scenes, read when it is opened

Data are scripts: a browser that opens a page from a disk reads no other files. Nothing is asked of another site.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lbllm.course.course import Course
from lbllm.files import new_folder, write_errors
from lbllm.templates import environment

TITLE = "Learn binarization"
_STATIC = Path(__file__).with_name("static")
# They share their top-level names, so the order counts.
_SCRIPTS = ("dom.js", "charts.js", "cells.js", "views.js", "course.js")


@dataclass(frozen=True)
class ExportedCourse:
    """A written site. ``fingerprint``: the hash of the checkpoint that its figures are from."""

    path: Path
    lessons: int
    scenes: int
    disk_bytes: int
    checkpoint: str
    fingerprint: str
    date: str


def renderer() -> str:
    """The JavaScript that shows a course: a class ``Course`` in a script without modules."""
    return "\n".join((_STATIC / name).read_text("utf-8") for name in _SCRIPTS)


def style() -> str:
    """The style sheet that belongs to ``renderer``."""
    return (_STATIC / "course.css").read_text("utf-8")


def facts(course: Course, date: str = "") -> dict[str, Any]:
    """What the renderer must know before any lesson is computed."""
    data = course.data
    return {
        "title": TITLE,
        "checkpoint": {"name": data.title, "teacher": data.teacher_title, "fingerprint": data.fingerprint},
        "date": date,
        "outline": course.outline,
    }


def export_course(course: Course, out: Path, *, done: Callable[[str], None] = lambda key: None) -> ExportedCourse:
    """Compute all lessons and write the site atomically; ``out`` must be missing or an empty folder.

    ``done`` is called with a lesson's key when it is computed. Raises ResourceError if the site can't be written, and
    what the lessons raise.
    """
    document = course.document(done)
    date = datetime.now(UTC).date().isoformat()
    own = facts(course, date)
    page = environment(__file__).get_template("index.html.jinja")
    description = f"A course on binarized language models, computed from {own['checkpoint']['name']}"
    files = {
        "index.html": page.render(title=TITLE, description=description),
        "course.css": style(),
        "course.js": f"{renderer()}\n{(_STATIC / 'site.js').read_text('utf-8')}",
        "data/course.js": f"const COURSE = {_script(own)};\n",
    }
    for lesson in document["lessons"]:
        files[f"data/{lesson['key']}.js"] = f"lessonData({_script(_shared(lesson))});\n"
    with write_errors(out), new_folder(out) as folder:
        (folder / "data").mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    size = sum(len(text.encode()) for text in files.values())
    scenes = sum(len(lesson["scenes"]) for lesson in document["lessons"])
    fingerprint = course.data.fingerprint
    return ExportedCourse(out, len(document["lessons"]), scenes, size, course.data.title, fingerprint, date)


def _shared(lesson: dict[str, Any]) -> dict[str, Any]:
    """A lesson in which each picture stands once; scenes have their numbers."""
    numbers: dict[str, int] = {}
    scenes = {
        where: scene | {"pictures": [numbers.setdefault(_script(one), len(numbers)) for one in scene["pictures"]]}
        for where, scene in lesson["scenes"].items()
    }
    return lesson | {"scenes": scenes, "pictures": [json.loads(text) for text in numbers]}


def _script(value: Any) -> str:
    """A value as JSON that is also safe inside a script."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
