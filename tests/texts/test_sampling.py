"""The corpus sampler: its draw against the distribution written out, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.errors import CorpusError
from lbllm.texts.sampling import draw, sample_corpus, sample_rows
from tests.helpers.cases import cases
from tests.helpers.tiny_models import tiny


@cases(20)
@given(st.integers(1, 12), st.floats(0.3, 2), st.sampled_from([1e-4, 0.05, 0.5, 1.0]), st.integers(0, 2**32))
def test_tokens_come_as_often_as_their_probability_says(
    vocabulary: int, temperature: float, min_p: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 4000
    logits = 3 * torch.randn(2, vocabulary, generator=generator)
    drawn = draw(logits.repeat(rows, 1), temperature, min_p, generator).view(rows, 2)
    for row in range(2):
        chances = np.exp(logits[row].double().numpy() / temperature)
        chances[chances < min_p * chances.max() * (1 - 1e-5)] = 0
        chances /= chances.sum()
        counts = np.bincount(drawn[:, row].numpy(), minlength=vocabulary)
        assert counts[chances == 0].sum() == 0
        spread = np.sqrt(rows * chances * (1 - chances))
        assert (np.abs(counts - rows * chances) <= 6 * spread + 1).all()


def test_after_an_answer_comes_the_next_question_in_a_conversation_of_its_own() -> None:
    model, tokenizer = tiny("llama")
    questions = ["Why is bread salty?", "Who counts <stars>?"]
    rows = list(sample_rows(model, tokenizer, rows=64, length=200, seed=3, questions=questions))
    assert {row["kind"] for row in rows} == {"chat"}
    begun = [piece for row in rows for piece in row["text"].split("<|end|>")[2::2]]
    openings = tuple(f"\n<|start|>user\n{question}" for question in questions)
    assert all(piece.startswith(openings) or any(one.startswith(piece) for one in openings) for piece in begun)
    assert {opening for opening in openings if any(piece.startswith(opening) for piece in begun)} == set(openings)


def test_a_lower_temperature_gives_likelier_answers() -> None:
    model, tokenizer = tiny("llama")

    def surprise(temperature: float) -> float:
        rows = sample_rows(
            model, tokenizer, rows=32, length=60, seed=5, questions=["Why?"], temperature=temperature, min_p=1e-6
        )
        ids = torch.stack([torch.tensor(tokenizer(row["text"])["input_ids"][:40]) for row in rows])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    assert surprise(0.3) < surprise(1.0) < surprise(2.0)


def test_questions_need_a_chat_template() -> None:
    model, tokenizer = tiny("llama")
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match="chat template, which this one lacks"):
        next(sample_rows(model, tokenizer, rows=1, length=8, seed=0, questions=["Why?"]))


def some_parts(out: Path, **changes: Any) -> list[Path]:
    """Sample the first of three batches."""
    model, tokenizer = tiny("llama", seed=changes.pop("model", 0))
    settings: dict[str, Any] = {"tokens": 3 * 4 * 16, "length": 16, "batch": 4} | changes
    next(sample_corpus(model, tokenizer, out, **settings))
    return sorted(out.parent.glob("*.part?"))


def whole(out: Path, **changes: Any) -> bytes:
    model, tokenizer = tiny("llama")
    list(sample_corpus(model, tokenizer, out, **{"tokens": 3 * 4 * 16, "length": 16, "batch": 4} | changes))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return gzip.decompress(out.read_bytes())


def test_parts_are_continued_with_the_same_settings_alone(tmp_path: Path) -> None:
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
    once, twice = (tmp_path / folder / "out.jsonl.gz" for folder in ("once", "twice"))
    (part,) = some_parts(twice)
    before = part.read_bytes()
    for change in ({"seed": 1}, {"temperature": 0.5}, {"questions": ["Why?"]}, {"model": 1}, {"batch": 3}):
        with pytest.raises(CorpusError, match=r"out\.jsonl\.gz\.part0 was sampled from another model"):
            some_parts(twice, **change)
    assert part.read_bytes() == before
    rows = whole(twice)
    assert rows == whole(once)
    assert [json.loads(line).keys() for line in rows.splitlines()] == [{"kind", "text"}] * 12


def test_a_damaged_part_is_sampled_again_and_one_of_an_earlier_version_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl.gz"
    (part,) = some_parts(out)
    data = part.read_bytes()
    for damaged in (b"", data[:50], data[:-5], data[:-5] + b"xxxxx", b"\xff" * 100):
        part.write_bytes(damaged)
        some_parts(out)
        assert part.read_bytes() == data
    part.write_bytes(data.partition(b"\n")[2])
    with pytest.raises(CorpusError, match="by an earlier version"):
        some_parts(out)
