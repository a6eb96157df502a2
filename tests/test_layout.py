"""The layout of the project: no file is too long to read, and every folder of code says what it is for."""

from __future__ import annotations

import ast
import subprocess

import pytest

from tests.helpers import ROOT

LONGEST = {"lbllm": 400, "app": 400, "benchmarks": 400, "tests": 500}
SUFFIXES = (".py", ".cpp", ".h", ".js", ".mjs", ".css", ".jinja", ".sh")


def files() -> list[str]:
    """The project's files, as git knows them; new ones that it does not ignore count as well."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists the files")
def test_no_file_is_too_long() -> None:
    code = [name for name in files() if name.split("/")[0] in LONGEST and name.endswith(SUFFIXES)]
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in code if (ROOT / name).exists()}
    assert len(lengths) > 150
    assert {name: length for name, length in lengths.items() if length > LONGEST[name.split("/")[0]]} == {}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists the files")
def test_every_module_says_what_it_is_for() -> None:
    texts = {name: (ROOT / name).read_text() for name in files() if name.endswith(".py") and (ROOT / name).exists()}
    modules = {name: text for name, text in texts.items() if text and not name.startswith("tests/")}
    assert [name for name, text in modules.items() if not ast.get_docstring(ast.parse(text))] == []
