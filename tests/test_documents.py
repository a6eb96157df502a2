"""Documents that state something of the project agree with it: licence, versions, links, names of modules, commands."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import typer
import yaml

from lbllm.checkpoints import hf
from lbllm.checkpoints.record import RunRecord
from lbllm.commands.main import build
from lbllm.config import SCHEMA_VERSION, make_config
from lbllm.errors import LbllmError
from lbllm.runs import database
from lbllm.texts.catalogue import TEXTS, CorpusEntry
from tests.helpers import ROOT

FIRST = sorted(path.name for path in ROOT.glob("*.md"))
PAGES = (*FIRST, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")), "assets/README.md")
EXTEND = ROOT / "docs" / "extend.md"
DOTTED = re.compile(r"(?<![\w./-])(?:lbllm|app|benchmarks|tests)(?:\.(?!py\b)\w+)+")
SOURCE = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|h|cpp|js|mjs|sh|toml|yaml)\b")
LINK = re.compile(r"\]\(([^)]+)\)")
ELSEWHERE = ("app.py", "llama.cpp")  # an exported Space has the first, the second is a program
COMMANDS = (
    "quantize",
    "estimate",
    "plan",
    "demo",
    "evaluate",
    "table",
    "export",
    "export-course",
    "repack",
    "report",
    "chat",
    "doctor",
    "models",
    "ui",
    "showcase",
    "serve",
    "with",
)
CALL = re.compile(
    rf"(?:python -m lbllm|(?<!\S)lbllm(?= (?:{'|'.join((*COMMANDS, 'corpora', 'runs', 'evaluations'))})\b)) ([^\n|]+)"
)


def test_the_licence_is_the_whole_of_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("entry", TEXTS, ids=lambda entry: str(entry.id))
def test_the_notice_names_every_text_of_the_catalogue(entry: CorpusEntry) -> None:
    notice = (ROOT / "NOTICE").read_text()
    assert (f"assets/{entry.asset}" if entry.asset else f"\n  {entry.id} ") in notice
    if entry.licence.startswith(("CC ", "ODC-")):
        assert entry.licence in notice


def test_the_citation_has_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1]
    (paper,) = citation["references"]
    assert paper["year"] == 2026
    assert "2604.19167" in paper["url"]
    assert "2604.19167" in citation["message"]


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("settings", SCHEMA_VERSION),
        ("run store", database.VERSION),
        ("packed checkpoint", hf.VERSION),
        ("record of a run", RunRecord().version),
    ],
)
def test_the_table_of_formats_has_the_versions_of_the_code(name: str, version: int) -> None:
    lines = (ROOT / "docs" / "formats.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {name}:"))
    assert row.split("|")[2].strip() == str(version)


@pytest.mark.parametrize("page", FIRST)
def test_links_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    for target in LINK.findall(path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_picture_of_the_packages_has_the_floors_that_are_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    picture = re.search(r"^    benchmarks .*?(?=^    single files)", EXTEND.read_text(), re.MULTILINE | re.DOTALL)
    assert picture is not None
    shown = [re.split(r" {3,}", line.strip())[0] for line in picture[0].splitlines()]
    assert shown == floors[: len(shown)]


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_what_is_in_them_exist(page: str) -> None:
    text = re.sub(r"\[[^]]*" + LINK.pattern, "", (ROOT / page).read_text())
    missing = [name for name in DOTTED.findall(text) if not is_defined(name)]
    folders = (ROOT, ROOT / "lbllm", ROOT / "app", (ROOT / page).parent)
    missing += [
        path
        for path in SOURCE.findall(text)
        if path not in ELSEWHERE and not any((folder / path).is_file() for folder in folders)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_and_settings_that_they_are_shown_with(page: str) -> None:
    for words in command_lines((ROOT / page).read_text()):
        try:
            parse(words)
        except (typer.TyperException, LbllmError) as error:
            pytest.fail(f"{page}: lbllm {shlex.join(words)}: {error}")


def test_a_command_with_a_wrong_option_is_noticed() -> None:
    _, words = command_lines(
        "`lbllm evaluate -m x` or\n\n    python -m lbllm table RUN \\\n        --limits 3   # all\n"
    )
    assert words == ["table", "RUN", "--limits", "3"]
    with pytest.raises(typer.TyperException):
        parse(words)
    assert not is_defined("lbllm.runs.store.RunStore.begin")


def test_the_readme_s_python_works_after_importing_the_package_alone() -> None:
    _, _, section = (ROOT / "README.md").read_text().partition("\n## From Python\n")
    names = re.findall(r"lbllm(?:\.\w+)+(?=\()", section.partition("\n## ")[0])
    assert names == ["lbllm.quantize", "lbllm.config.make_config", "lbllm.load"]
    code = f"import lbllm; {'; '.join(names)}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_every_command_is_looked_for() -> None:
    assert set(program().commands) == {*COMMANDS, "corpora", "runs", "evaluations"}


@functools.cache
def program() -> typer.core.TyperGroup:
    command = typer.main.get_command(build())
    assert isinstance(command, typer.core.TyperGroup)
    return command


@functools.cache
def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or a class, function, value or import in one. Read, not imported."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return _has(ast.parse(file.read_text()), parts[count:])
    return ROOT.joinpath(*parts).is_dir()


def _has(tree: ast.AST, names: Sequence[str]) -> bool:
    if not names:
        return True
    return any(named == names[0] and _has(node, names[1:]) for named, node in _definitions(tree))


def _definitions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.alias):
            yield node.asname or node.name, node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node


def command_lines(text: str) -> list[list[str]]:
    """The arguments of each command of the program in the code of a page: blocks, and code within a line."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
    code = "\n".join((*inline, *re.findall(r"^ {4,}\S.*$", text, re.MULTILINE), *fenced))
    return [shlex.split(arguments, comments=True) for arguments in CALL.findall(code)]


def parse(words: list[str]) -> None:
    """Read arguments as the command line does, without running anything. Raises TyperException, ConfigError."""
    command: Any = program()
    context = command.make_context("lbllm", list(words))
    while isinstance(command, typer.core.TyperGroup) and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    for assignment in context.params.get("assignments") or ():
        make_config("quick", {}, (assignment,))
