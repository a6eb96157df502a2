"""The corpus sampler: two of them share the work on one file, and it is the file that one alone writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from lbllm.sample import sample_corpus
from tests.tiny_models import tiny


def rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_several_work_on_one_file_and_it_is_what_one_alone_writes(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama")
    alone, shared = tmp_path / "alone.jsonl.gz", tmp_path / "shared.jsonl.gz"
    settings = {"tokens": 320, "length": 16, "batch": 4}
    assert [*sample_corpus(model, tokenizer, alone, **settings)] == [64, 128, 192, 256, 320]
    one, other = (sample_corpus(model, tokenizer, shared, **settings) for _ in range(2))
    assert next(one) == 64
    assert [*other] == [64, 128, 192, 256, 320]
    assert [*one] == []
    assert shared.read_bytes() == alone.read_bytes()
    assert len(rows(shared)) == 20
    assert {row["kind"] for row in rows(shared)} == {"chat", "text"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.jsonl.gz", "shared.jsonl.gz"]


def test_an_ended_one_goes_on_where_it_was(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama")
    out = tmp_path / "text.jsonl.gz"
    settings = {"tokens": 128, "length": 16, "batch": 4}
    begun = sample_corpus(model, tokenizer, out, **settings)
    next(begun)
    begun.close()
    first = (tmp_path / "text.jsonl.gz.part0").read_text()
    assert [*sample_corpus(model, tokenizer, out, **settings)] == [64, 128]
    with gzip.open(out, "rt") as file:
        assert file.read().startswith(first)
