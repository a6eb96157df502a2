"""The file that ``--out`` writes: valid JSON, whole or not at all, with machine, versions and command."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.report import add_out, command, read_report, write_report

ROWS: list[dict[str, Any]] = [
    {"label": "a", "perplexity": 1.5, "bits": 2},
    {"label": "b", "perplexity": None, "equal": True},
]


def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--limit", "4", "--only", "a b", "--out", "found.json"])
    path = tmp_path / "found.json"
    write_report(path, "quality", {"limit": 4, "texts": ("wikitext2", "c4")}, ROWS)
    found = read_report(path)
    assert found.rows == ROWS
    assert found.settings == {"limit": 4, "texts": ["wikitext2", "c4"]}
    assert found.command == "python -m benchmarks.quality --limit 4 --only 'a b'"
    assert (found.benchmark, found.origin, found.date) == ("quality", "measured", date.today())
    assert found.threads == torch.get_num_threads()
    assert found.versions["torch"] == version("torch")
    assert set(found.versions) == {"python", "torch", "transformers", "lbllm"}
    assert " cores" in found.machine
    assert list(json.loads(path.read_text())) == [
        *("schema", "benchmark", "command", "commit", "date", "machine", "threads", "versions", "settings"),
        *("origin", "rows"),
    ]


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    rows: list[dict[str, Any]] = [
        {"nan": float("nan"), "most": float("inf"), "least": -float("inf"), "path": Path("a")}
    ]
    write_report(path, "live", {}, rows)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    assert read_report(path).rows == [{"nan": None, "most": "inf", "least": "-inf", "path": "a"}]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    write_report(path, "live", {}, ROWS)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "live", {}, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_does_not_name_the_file() -> None:
    assert command("live", ["--out=a.json", "--turns", "2"]) == "python -m benchmarks.live --turns 2"
    assert command("live", ["--out", "a.json"]) == "python -m benchmarks.live"


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() is None


@pytest.mark.parametrize("name", ["found.txt", "missing/found.json", "."])
def test_a_place_that_cannot_take_the_file_is_told_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_out(parser)
    assert parser.parse_args(["--out", "found.json"]).out == Path("found.json")
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", name])
    assert "give a file that ends in .json, in a folder that exists" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match=r"other\.json"):
        read_report(path)
