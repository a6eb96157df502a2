"""Pages and text files as jinja2 templates, which lie in the folder templates/ beside the module that fills them.

HTML is escaped by itself. In Markdown, YAML and Python files HTML's escaping would be wrong: there each value that a
person, a model or a file name may have chosen goes through one of these filters:

    md      words in a line of Markdown
    code    a code span in Markdown
    cell    the content of a cell in a Markdown table, after ``md`` or ``code``
    json    a JSON value, which YAML reads as the same value; a string is also a string of Python
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

# Inside a word an underscore has no meaning for Markdown.
_MARKUP = re.compile(r"[\\`*\[\]<>#&~$]|(?<!\w)_|_(?!\w)")
# YAML and Python end a line, or refuse to read, at some of these; JSON allows them all.
_UNREADABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def environment(module: str) -> Environment:
    """The templates beside a module, which gives its ``__file__``. A name that a template lacks is an error."""
    made = Environment(
        loader=FileSystemLoader(Path(module).with_name("templates")),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"md": markdown, "code": code_span, "cell": table_cell, "json": json_value}
    return made


def markdown(text: str) -> str:
    """The text in one line of Markdown that shows it as it is."""
    return _MARKUP.sub(r"\\\g<0>", _one_line(text))


def code_span(text: str) -> str:
    """The text as a code span: between more backticks than stand together in it."""
    line = _one_line(text)
    marks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{marks}{space}{line}{space}{marks}"


def table_cell(text: str) -> str:
    """Markdown of one line as the content of a table's cell."""
    return text.replace("|", r"\|")


def json_value(value: object) -> str:
    """The value in JSON, in one line; a string of it is also one of YAML and Python."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNREADABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
