"""The process that renders chat templates. ``lbllm.models.chat_template`` starts it; it imports jinja2 alone.

A template is a program of whoever made the model. Here it has a sandbox, one second of computing time and a bounded
memory, and the process has nothing else to lose. It reads requests and writes answers, one JSON object a line.

The environment is the one that transformers documents for chat templates: blocks trim their lines, ``raise_exception``,
``strftime_now``, ``tojson`` without escapes for HTML, the tags break, continue and generation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 1.0
MEMORY = 256 << 20
CHARACTERS = 8 << 20


class _Generation(Extension):
    """The tag that marks what the assistant said; rendering shows its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it

    def parse(self, parser: Any) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


class _Values(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        given = dict(*rest, **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class _Dict:
    """What a template may do with the name dict."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the name {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Values,
    }
    return environment.from_string(template)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compiled(request["template"]).render(**request["values"])
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except TemplateError as error:
        return {"error": str(error) or type(error).__name__}
    except Exception as error:  # a template can raise whatever Python can
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    if len(text) > CHARACTERS:
        return {"error": f"its text has {len(text)} characters, the most is {CHARACTERS}"}
    return {"text": text}


def main() -> None:
    """Answer requests until the input ends. A request that computes for too long ends the process."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    with contextlib.suppress(ValueError, OSError):  # a system without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
