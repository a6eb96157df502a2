"""Prompts that answers are judged by stay out of the questions to train on, and marks find their answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.answers import PROMPTS, further_prompts
from benchmarks.blind import main, sheet
from benchmarks.questions import questions, words

ROWS = [
    {"prompt": prompt, "model": model, "answer": f"{model} on {prompt}"} for model in "abc" for prompt in PROMPTS[:4]
]


def test_no_question_holds_a_judged_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBLLM_DATA_DIR", raising=False)
    found = questions(0)
    assert len(set(found)) == len(found) > 2_000
    assert not [(q, p) for q in found for p in (*PROMPTS, *further_prompts()) if words(p) in words(q)]
    assert questions(0) == found != questions(1)


def test_thirty_further_prompts() -> None:
    assert len(set(further_prompts())) == 30
    assert not set(further_prompts()) & set(PROMPTS)


def test_a_sheet_tells_nothing_about_the_models_and_its_marks_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = sheet([row | {"answer": "the same"} for row in ROWS], 3)
    assert all(set(entry) == {"key", "prompt", "answer", "mark"} for entry in blank["answers"])
    assert len({entry["key"] for entry in blank["answers"]}) == len(ROWS)

    answers, filled = tmp_path / "answers.json", tmp_path / "sheet.json"
    answers.write_text(json.dumps({"rows": ROWS}))
    document = sheet(ROWS, 3)
    for entry in document["answers"]:
        entry["mark"] = {"a": 2, "b": 1, "c": 0}[entry["answer"][0]]
    filled.write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["blind", "marks", str(answers), str(filled)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("4 of 4") for line in lines[2:]] == [1, 1, 1]
    assert [line.index("4 of 4") for line in lines[2:]] == sorted(line.index("4 of 4") for line in lines[2:])

    document["answers"][0]["mark"] = None
    filled.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="its mark is None"):
        main()
