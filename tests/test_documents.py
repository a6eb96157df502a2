"""Documents that state something of the project agree with it: licence, versions of formats, version, links."""

from __future__ import annotations

import re

import pytest
import yaml

from lbllm.checkpoints import hf
from lbllm.checkpoints.record import RunRecord
from lbllm.config import SCHEMA_VERSION
from lbllm.runs import database
from lbllm.texts.catalogue import TEXTS, CorpusEntry
from tests.helpers import ROOT

PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/formats.md", "docs/platforms.md", "docs/glossary.md")


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


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target
