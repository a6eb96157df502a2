"""The pages of results: each table is what its data give, a changed figure is noticed, every link leads somewhere."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report import ROOT, Report, read_report
from benchmarks.tables import DOCS, MARKED, Table, cell, grid, main, pages, read_tables, rewritten

RESULTS = DOCS / "results"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
SUMMARY_LINES = 150
Check = Callable[[Path], list[str]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the pages and their data, which a test may change."""
    return shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("screens"))


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs ``--check`` over a folder that it must refuse: the pages that it names."""

    def refused(docs: Path) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["tables.py", "--check", "--docs", str(docs)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    return refused


def change(docs: Path, stem: str, key: str, value: float) -> None:
    """Give the first row of a data file another figure."""
    path = docs / "results" / f"{stem}.json"
    document = json.loads(path.read_text())
    assert document["rows"][0][key] != value
    document["rows"][0][key] = value
    path.write_text(json.dumps(document))


def test_every_page_shows_what_its_data_say() -> None:
    for page, text in rewritten(DOCS).items():
        assert page.read_text(encoding="utf-8") == text, f"{page}: run python -m benchmarks.tables"


def test_a_changed_figure_is_noticed_and_its_pages_are_named(copy: Path, check: Check) -> None:
    change(copy, "layers", "fp32_ms", 0.001)
    assert check(copy) == ["results/layers.md"]
    change(copy, "checkpoints-small3", "perplexity", 29.0)
    assert check(copy) == ["results.md", "results/checkpoints.md", "results/layers.md"]


def test_a_changed_page_is_noticed_and_rendered_again(copy: Path, check: Check) -> None:
    page = copy / "results" / "live.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("| 6.1 % |", "| 3.0 % |"), encoding="utf-8")
    assert check(copy) == ["results/live.md"]
    assert rewritten(copy)[page] == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- table: live -->", "<!-- table: lives -->", "results/live.md: tables.toml has no table lives"),
        ('data = ["live"]', 'data = ["alive"]', "table live: there is no alive.json"),
        ('"Another million"', '"A fourth"', "checkpoints-small4.json has 0 rows labelled 'A fourth', not one"),
    ],
)
def test_what_is_missing_is_named(copy: Path, old: str, new: str, message: str) -> None:
    for path in (copy / "results" / "live.md", copy / "results" / "tables.toml"):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        rewritten(copy)


def test_an_optional_table_is_shown_as_soon_as_its_file_is_there(copy: Path) -> None:
    page, data = copy / "results" / "frontier.md", copy / "results" / "frontier.json"
    row = {"label": "a method", "tokens": 8_192, "bits": 2.5, "wikitext2": 60.0, "minutes": 3.0}
    rows = [row | {"inputs": inputs} for inputs in ("A16", "A4KV4")]
    data.unlink(missing_ok=True)
    before = rewritten(copy)[page]
    assert "| a method |" not in before
    report = json.loads((copy / "results" / "live.json").read_text()) | {"benchmark": "frontier", "rows": rows}
    data.write_text(json.dumps(report))
    after = rewritten(copy)[page]
    assert "| a method | 8,192 | 2.500 | 60.00 | 3.0 |" in after
    assert "tasks" not in after.split("| a method |")[0].splitlines()[-2]
    page.write_text(after, encoding="utf-8")
    data.write_text(json.dumps(report | {"rows": rows[:1]}))
    assert rewritten(copy)[page].count("| a method |") == 1  # no row for the second table yet
    data.unlink()
    assert rewritten(copy)[page] == before


def test_every_table_and_every_file_is_shown() -> None:
    tables = read_tables(RESULTS / "tables.toml")
    shown = [match["name"] for page in pages(DOCS) for match in MARKED.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(tables)
    files = {one.stem for one in RESULTS.glob("*.json")}
    needed = {stem for table in tables.values() if not table.optional for stem in table.stems}
    assert needed <= files <= {stem for table in tables.values() for stem in table.stems}


def test_every_key_that_a_template_names_is_in_the_data() -> None:
    known = {"name", "made", "date", "commit", "machine", "processor", "threads"}
    for path in RESULTS.glob("*.json"):
        known.update(*read_report(path).rows)
    for name, table in read_tables(RESULTS / "tables.toml").items():
        used = set(re.findall(r"{(\w+)", " ".join(template for _, template in table.columns)))
        assert used <= known or table.optional, name


def test_the_summary_is_one_page_whose_rows_say_when_where_and_by_what() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= SUMMARY_LINES
    found = list(MARKED.finditer(text))
    assert [match["name"] for match in found] == ["quality", "speed", "others"]
    for match in found:
        head, _, *rows = match["body"].splitlines()
        assert head.endswith("| date | commit | machine |")
        for row in rows:
            date, commit, machine = row.rstrip("| ").split(" | ")[-3:]
            assert re.fullmatch(r"\d{4}-\d\d-\d\d(, transcribed)?", date)
            assert re.fullmatch(r"`[0-9a-f]{7,}(-dirty)?`|unknown", commit)
            assert machine


def test_averages_of_few_questions_stand_apart_from_those_of_many() -> None:
    table = read_tables(RESULTS / "tables.toml")["others"]
    reports: dict[str, Report] = {stem: read_report(RESULTS / f"{stem}.json") for stem in table.stems}
    rows = [next(row for row in reports[stem].rows if row["label"] == label) for stem, label, _ in table.rows]
    for act_bits, questions in ((16, 500), (4, 200)):
        assert {row.get("questions") for row in rows if row["act_bits"] == act_bits} <= {questions, None}
    assert [row["act_bits"] for row in rows] == sorted((row["act_bits"] for row in rows), key=str)
    for (stem, _, name), row in zip(table.rows, rows, strict=True):
        trained = stem in ("quality-shipped", "quality-small4", "quality-four") or "checkpoint" in str(row["label"])
        assert name.endswith(" †") == trained, name


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "assets" / "README.md"], ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for place, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page}: {place}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {place}#{anchor}"


def test_a_cell_without_its_key_is_empty_and_an_infinite_number_is_said() -> None:
    row = {"a": 0.125, "b": None, "c": "inf", "d": True}
    assert cell("{a:.1%}", row) == "12.5%"
    assert cell("{a:.1%} ± {b:.1%}", row) == cell("{missing}", row) == ""
    assert cell("{c:,.2f}", row) == "inf"
    assert cell("{d}", row) == "yes"


def test_a_column_that_no_row_fills_is_left_out() -> None:
    table = Table(columns=[("", "{label}"), ("one", "{one}"), ("two", "{two:.1f}")])
    text = grid(table, [{"label": "x", "two": 2}, {"label": "y"}])
    assert text == "|  | two |\n| --- | --- |\n| x | 2.0 |\n| y |  |"
