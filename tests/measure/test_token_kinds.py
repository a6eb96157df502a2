"""The kinds of tokens, and the ranges of positions."""

from __future__ import annotations

import pytest

from lbllm.measure.token_kinds import KINDS, kind_of, position_buckets


@pytest.mark.parametrize(
    ("text", "before", "kind"),
    [
        (" The", "end.", "word start"),
        ("The", "", "word start"),
        ("river", " over", "inside a word"),
        ("s", "'", "word start"),
        ("n't", " do", "inside a word"),
        (" été", "l'", "word start"),
        ("école", "l'", "word start"),
        ("की", "भारत", "inside a word"),
        ("ी", "क", "inside a word"),
        (" 2026", "in", "number"),
        ("7", "1", "number"),
        ("½", " ", "number"),
        ("3rd", " ", "word start"),
        (".", "end", "punctuation"),
        (" (", "f", "punctuation"),
        (".\n", "end", "punctuation"),
        ("→", " ", "punctuation"),
        ("\n\n", ".", "space or line end"),
        (" ", "a", "space or line end"),
        ("", "a", "part of a character"),
        ("\ufffd", "a", "part of a character"),
    ],
)
def test_each_token_has_one_kind(text: str, before: str, kind: str) -> None:
    assert kind_of(text, before) == kind
    assert kind in KINDS


@pytest.mark.parametrize("length", [2, 3, 4, 5, 16, 17, 64, 100, 2048])
def test_every_position_is_in_one_range(length: int) -> None:
    ranges = position_buckets(length)
    assert [place for first, last in ranges for place in range(first, last + 1)] == list(range(1, length))
    assert position_buckets(2048)[:3] == [(1, 3), (4, 15), (16, 63)]
    with pytest.raises(ValueError, match="needs at least 2"):
        position_buckets(1)
