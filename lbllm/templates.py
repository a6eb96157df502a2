"""Make pages and text files from jinja2 templates, in the folder templates/ beside the module that fills them.

lbllm/templates/ has what saved pages share: page.css, their style, and exchanges.html.jinja, answers side by side.

HTML templates escape every value. In Markdown, YAML and Python that escaping would be wrong: their templates pass
each value that comes from a person, a model or a file through one of these filters:

    md      text in a line of Markdown
    code    a code span in Markdown
    cell    the content of a cell in a Markdown table, after ``md`` or ``code``
    json    a JSON value, which is also a YAML value; a string is also a Python string
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

# Markdown ignores an underscore inside a word.
_MARKUP = re.compile(r"[\\`*\[\]<>#&~$]|(?<!\w)_|_(?!\w)")
# JSON allows these in a string; YAML refuses some of them or takes them for a line end, UTF-8 has no surrogates.
_UNREADABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def environment(module: str) -> Environment:
    """The templates beside a module, then the shared ones; ``module`` is its ``__file__``. A value that a template
    lacks is an error."""
    made = Environment(
        loader=FileSystemLoader([Path(module).with_name("templates"), Path(__file__).with_name("templates")]),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"md": markdown, "code": code_span, "cell": table_cell, "json": json_value}
    return made


def markdown(text: str) -> str:
    """The text as one line of Markdown, without markup."""
    return _MARKUP.sub(r"\\\g<0>", _one_line(text))


def code_span(text: str) -> str:
    """The text as a code span, with a longer row of backticks on each side than any inside it."""
    line = _one_line(text)
    marks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{marks}{space}{line}{space}{marks}"


def table_cell(text: str) -> str:
    """One line of Markdown as the content of a table cell."""
    return text.replace("|", r"\|")


def json_value(value: object) -> str:
    """The value as JSON in one line, which YAML reads, too; a string or a list of strings is also valid Python."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNREADABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
