"""Passages of a judged text are found in a text to train on, however they are set."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overlap import main, shared
from tests.helpers.tiny_models import save_tiny

JUDGED = "A well @-@ known mill stood by the river ; it ground 1 @,@ 200 sacks of corn a year ."


def test_a_passage_is_found_whatever_its_punctuation() -> None:
    copied = "He says: a WELL-KNOWN mill stood by the river, it ground 1,200 sacks of corn a year, and burnt down."
    places = 17 - 4
    assert shared(copied, JUDGED, 5) == (places, places)
    assert shared("It ground 1,200 sacks of corn.", JUDGED, 5) == (3, places)
    assert shared("A mill stood by the old river; it ground corn.", JUDGED, 5) == (0, places)


def test_both_are_read_as_runs_read_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "teacher", "llama")
    text, other = tmp_path / "judged.txt", tmp_path / "other.txt"
    text.write_text(" ".join(f"word{number} of the text." for number in range(400)))
    other.write_text(" ".join(f"word{number} of another." for number in range(400)))
    found = {}
    for corpus in (text, other):
        monkeypatch.setattr(
            "sys.argv",
            ["overlap", str(corpus), "--text", str(text), "--words", "3", "--model", str(tmp_path / "teacher")],
        )
        main()
        found[corpus] = capsys.readouterr().out
    count, places = found[text].splitlines()[1].replace(",", "").split(" of the ")
    assert int(count) == int(places.split()[0]) > 0
    assert found[other].splitlines()[1].startswith("0 of the ")
