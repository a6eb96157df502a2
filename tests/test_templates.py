"""Filters of the templates: what they make is read back as the text that went in, whatever it holds."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lbllm.templates import code_span, environment, json_value, markdown, table_cell

TEXTS = st.text(max_size=30) | st.text("`|*_[]()<>&#!\\\"'ab \n-~$", max_size=20)


def inline(text: str) -> list[Token]:
    """What Markdown makes of one line inside a paragraph."""
    _, paragraph, _ = MarkdownIt("commonmark").parse(f"x {text} x")
    return paragraph.children or []


def words(text: str) -> list[str]:
    return ("".join(text.splitlines(keepends=True)).replace("\0", "\ufffd")).split()


@given(TEXTS)
def test_markdown_shows_the_text_and_nothing_else(text: str) -> None:
    tokens = inline(markdown(text))
    assert {token.type for token in tokens} <= {"text"}
    assert words("".join(token.content for token in tokens)) == ["x", *words(text), "x"]


@given(TEXTS)
def test_a_code_span_holds_the_text(text: str) -> None:
    tokens = [token for token in inline(code_span(f"a{text}")) if token.type != "text"]
    assert [token.type for token in tokens] == ["code_inline"]
    assert words(tokens[0].content) == words(f"a{text}")


@given(TEXTS)
def test_a_cell_stays_one_cell(text: str) -> None:
    cells = " | ".join(table_cell(filtered(f"a{text}")) for filtered in (markdown, code_span))
    tokens = MarkdownIt("commonmark").enable("table").parse(f"| h | i |\n| --- | --- |\n| {cells} |\n")
    assert sum(token.type == "td_open" for token in tokens) == 2


@given(TEXTS | st.lists(TEXTS, max_size=3))
def test_json_is_read_alike_by_json_yaml_and_python(value: str | list[str]) -> None:
    text = json_value(value)
    assert "\n" not in text
    assert json.loads(text) == yaml.safe_load(f"key: {text}\n")["key"] == ast.literal_eval(text) == value


def test_html_is_escaped_and_a_missing_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    for name in ("a.html.jinja", "b.md.jinja"):
        (tmp_path / "templates" / name).write_text("{{ text }}")
    made = environment(str(tmp_path / "module.py"))
    assert made.get_template("a.html.jinja").render(text="<b>") == "&lt;b&gt;"
    assert made.get_template("b.md.jinja").render(text="<b>") == "<b>"
    with pytest.raises(UndefinedError, match="text"):
        made.get_template("a.html.jinja").render()
