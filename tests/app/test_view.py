"""Numbers, times and texts as the pages show them."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from app.view import count_text, number_text, path_text, plain, size_text, time_text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (size_text(999), "999 bytes"),
        (size_text(96_583_168), "96.6 MB"),
        (time_text(59.4), "59 s"),
        (time_text(370), "6:10"),
        (time_text(7500), "2 h 05 min"),
        (time_text(3 * 86400 + 4 * 3600), "3 d 4 h"),
        (count_text(106_168_320), "106M"),
        (count_text(999_600), "1M"),
        (number_text(1234.4), "1,234"),
        (number_text(math.nan), "not a number"),
        (number_text(math.inf), "infinite"),
        (number_text(-0.01234), "-0.0123"),
        (number_text(0.5), "0.500"),
        (number_text(0.0), "0"),
        (number_text(280.25), "280.2"),
    ],
)
def test_as_people_read_it(shown: str, text: str) -> None:
    assert shown == text


def test_paths_in_the_users_folder_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert path_text(tmp_path / "me" / "runs") == plain("~/runs")
    assert path_text(tmp_path / "you" / "runs") == plain(str(tmp_path / "you" / "runs"))


@given(st.text(alphabet=string.punctuation + "ab 1", min_size=1, max_size=30).map(str.strip).filter(bool))
def test_what_somebody_else_wrote_is_shown_as_it_is(text: str) -> None:
    (paragraph, inline, *_) = MarkdownIt("commonmark").parse(plain(text))
    assert paragraph.type == "paragraph_open"
    assert "".join(child.content for child in inline.children or []) == text
    assert all(child.type in ("text", "text_special") for child in inline.children or [])
