"""Prompts from lines and files, and what is refused with which sentence."""

from __future__ import annotations

import json

import pytest

from lbllm.errors import ConfigError, CorpusError
from lbllm.evaluation.job import make_job, read_job
from lbllm.evaluation.prompt_files import LARGEST_FILE, read_prompts, typed_prompts


def test_lines_and_rows_are_prompts() -> None:
    assert typed_prompts(" One?\n\n\t\nTwo?  ") == ("One?", "Two?")
    assert read_prompts("a.TXT", "\ufeffWarum?\r\n\r\nWhy?\n".encode()) == ("Warum?", "Why?")
    rows = [
        "One?",
        {"prompt": "Two\nlines?", "id": 3},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Three?"}]},
    ]
    data = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert read_prompts("b.jsonl", data.encode()) == ("One?", "Two\nlines?", "Three?")
    assert read_prompts("c.jsonl", b'"\\ud800 a"') == ("? a",)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("big.txt", b"a b c\n" * (LARGEST_FILE // 6 + 1), r"big.txt has 2.0 MB, and a file of prompts may have 2.0 MB"),
        ("big.txt", b"x" * 10_000_000, "big.txt has 10.0 MB, .*split it"),
        ("empty.txt", b"", "empty.txt is empty; give a .txt file"),
        ("blank.jsonl", b"\n \n", "blank.jsonl is empty"),
        ("a.pdf", b"%PDF", "a.pdf is not a file of prompts by its name"),
        ("a.txt", b"fine\nbad \xff\n", "a.txt, line 2: not UTF-8 text"),
        ("a.txt", b"a\0b", "has NUL bytes"),
        ("a.jsonl", b'"one"\n{"q": "two"}\n', 'a.jsonl, line 2: no prompt; a row is a string, or has "prompt"'),
        ("a.jsonl", b"one\n", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[" * 5_000, "line 1: not JSON"),
        ("many.txt", b"a\n" * 1_001, "many.txt has 1,001 prompts, and at most 1,000"),
        ("long.txt", b"a\n" + b"b" * 8_001, "long.txt: prompt 2 has 8,001 characters"),
    ],
)
def test_what_is_no_file_of_prompts_is_one_sentence(name: str, data: bytes, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        read_prompts(name, data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": ()}, "models: "),
        ({"models": ("a", "a")}, "a model is chosen twice"),
        ({"models": tuple("abcdefghijklm")}, "at most 12 models .* these are 13"),
        ({"measure": "prompts", "models": tuple("abcde"), "prompts": ("?",)}, "at most 4 models"),
        ({"teacher": "b"}, "the teacher 'b' is not among the models"),
        ({"measure": "tasks"}, "no task is chosen"),
        ({"measure": "tasks", "tasks": ("pica",)}, "task 'pica' is not known; choose from piqa"),
        ({"measure": "prompts"}, "there is no prompt"),
        ({"measure": "prompts", "prompts": ("a", " ")}, "prompt 2 is empty"),
        ({"text": " "}, "no text is chosen"),
        ({"windows": 0}, "windows: "),
    ],
)
def test_what_can_not_be_measured_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_job(**{"measure": "text", "models": ("a",)} | changes)


def test_a_job_is_read_as_it_was_written() -> None:
    job = make_job(measure="prompts", models=("a", "b"), titles=("A", "B"), teacher="b", prompts=("Why?",))
    assert read_job(job.model_dump_json().encode()) == job
    assert (job.reference, job.order, job.title) == (1, (1, 0), "1 prompt, 2 models")
    with pytest.raises(ConfigError, match="can't be read"):
        read_job(b"{")
