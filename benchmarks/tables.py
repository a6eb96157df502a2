"""Renders the tables of results, method.md and scale.md from the data: ``python -m benchmarks.tables [--check]``.

The data are the files that benchmarks write by ``--out``, in docs/results. ``docs/results/tables.toml`` says of each
table which data it shows and how. A page has a table between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``.
With ``--check`` nothing is written; the exit code is 1 where a page differs from the data, and the page is named.
"""

from __future__ import annotations

import argparse
import re
import string
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks import markdown
from benchmarks.report import ROOT, Report, read_report
from lbllm.files import write_file

DOCS = ROOT / "docs"
MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(?=<!-- end -->)", re.DOTALL)


class Table(BaseModel):
    """How a table is shown.

    ``data``: files by their stems. ``columns``: a heading and a template over the keys of a row and of its file; a cell
    is empty where the row lacks a key, and a column with only empty cells is left out. ``rows``: instead of all rows
    of the data, some of them, each by its file, its label and the name that is shown. ``where``: only rows with these
    values. ``form``: "answers" shows texts one below the other. ``source``: the commands stand below the table, with
    when and where they ran. ``optional``: the page is without the table until its data are there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: list[str] = []
    columns: list[tuple[str, str]] = []
    rows: list[tuple[str, str, str]] = []
    where: dict[str, str] = {}
    form: Literal["table", "answers"] = "table"
    source: bool = True
    optional: bool = False

    @property
    def stems(self) -> list[str]:
        """The files that the table shows, by their stems."""
        return list(dict.fromkeys([*self.data, *(stem for stem, _, _ in self.rows)]))


class _Cell(string.Formatter):
    """Formats numbers as a template says. Strings stay as they are: an infinite number is the string "inf"."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return value if isinstance(value, str) else super().format_field(value, format_spec)


def cell(template: str, row: dict[str, Any]) -> str:
    """The template filled from a row; empty where one of its keys is missing or None."""
    formatter = _Cell()
    keys = [key for _, key, _, _ in formatter.parse(template) if key]
    return "" if any(row.get(key) is None for key in keys) else formatter.vformat(template, (), row).strip()


def about(report: Report) -> dict[str, Any]:
    """What a file says of all its rows, by the keys of a template."""
    processor = report.machine.split(",")[0]
    made = {"measured": f"{report.date}", "transcribed": f"{report.date}, transcribed"}[report.origin]
    named = {"date": str(report.date), "commit": f"`{report.commit}`" if report.commit else "unknown", "made": made}
    return named | {"machine": report.machine, "processor": processor, "threads": report.threads}


def chosen(table: Table, reports: dict[str, Report]) -> list[dict[str, Any]]:
    """The table's rows, each with what its file says of it. Raises ValueError for a row that is not there."""
    if not table.rows:
        listed = [about(reports[stem]) | row for stem in table.data for row in reports[stem].rows]
        return [row for row in listed if table.where.items() <= row.items()]
    found = []
    for stem, label, name in table.rows:
        rows = [row for row in reports[stem].rows if row.get("label") == label]
        if len(rows) != 1:
            raise ValueError(f"{stem}.json has {len(rows)} rows labelled {label!r}, not one")
        found.append(about(reports[stem]) | rows[0] | {"name": name})
    return found


def grid(table: Table, rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = [[head, *(cell(template, row) for row in rows)] for head, template in table.columns]
    heads, *lines = zip(*(column for column in columns if any(column[1:])), strict=True)
    return markdown.table(heads, lines)


def answers(rows: list[dict[str, Any]]) -> str:
    """Rows of prompt, model and answer as Markdown, the answers as quotations."""
    lines: list[str] = []
    for number, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows), 1):
        lines.append(f"**{number}. {prompt}**")
        for row in rows:
            if row["prompt"] == prompt:
                quoted = "\n".join(f"> {line}".rstrip() for line in row["answer"].splitlines())
                lines += [f"*{row['model']}*", quoted]
    return "\n\n".join(lines)


def source(reports: list[Report]) -> str:
    """The commands behind a table, and when and where they ran."""
    lines = []
    for report in reports:
        known = about(report)
        commit = f"commit {known['commit']}" if report.commit else "commit unknown"
        facts = [known["made"], commit, report.machine]
        if report.threads:
            facts.append(f"{report.threads} thread" + "s" * (report.threads > 1))
        lines += ["```sh", report.command, "```", "", "; ".join(facts) + ".", ""]
    return "\n".join(lines[:-1])


def rendered(table: Table, reports: dict[str, Report]) -> str:
    """What stands between a table's two markers."""
    rows = chosen(table, reports)
    body = grid(table, rows) if table.form == "table" else answers(rows)
    return f"{body}\n\n{source([reports[stem] for stem in table.stems])}\n" if table.source else f"{body}\n"


def read_tables(path: Path) -> dict[str, Table]:
    """The tables that the file describes, by their names; a list of columns that several of them have stands under
    ``columns``. Raises OSError, ValueError."""
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    shared = found.pop("columns")
    for values in found.values():
        if isinstance(values.get("columns"), str):
            values["columns"] = shared[values["columns"]]
    return {name: Table.model_validate(values) for name, values in found.items()}


def pages(docs: Path) -> list[Path]:
    """The pages that may have tables."""
    return [docs / "results.md", docs / "method.md", docs / "scale.md", *sorted((docs / "results").glob("*.md"))]


def rewritten(docs: Path) -> dict[Path, str]:
    """Every page's text with its tables rendered anew. Raises OSError, and ValueError with what is wrong."""
    tables = read_tables(docs / "results" / "tables.toml")
    reports = {path.stem: read_report(path) for path in sorted((docs / "results").glob("*.json"))}
    texts: dict[Path, str] = {}
    for page in pages(docs):

        def filled(match: re.Match[str], page: Path = page) -> str:
            name = match["name"]
            if name not in tables:
                raise ValueError(f"{page.relative_to(docs)}: tables.toml has no table {name}")
            missing = [stem for stem in tables[name].stems if stem not in reports]
            if tables[name].optional and (missing or not chosen(tables[name], reports)):
                return match[1]
            if missing:
                raise ValueError(f"table {name}: there is no {missing[0]}.json")
            return match[1] + rendered(tables[name], reports)

        texts[page] = MARKED.sub(filled, page.read_text(encoding="utf-8"))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder with results.md")
    options = parser.parse_args()
    try:
        texts = rewritten(options.docs)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    stale = [page for page, text in texts.items() if page.read_text(encoding="utf-8") != text]
    for page in stale:
        if options.check:
            print(f"{page.relative_to(options.docs)} differs from its data; run python -m benchmarks.tables")
        else:
            write_file(page, texts[page].encode())
            print(f"{page.relative_to(options.docs)} rendered")
    if options.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
