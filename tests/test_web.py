"""What passes the gate before both web servers: host names, origins, frames, errors."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from lbllm.web import Gate, harmless, host_name, names_of

ARRIVED = "192.168.7.5"


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/broken":
        raise RuntimeError("\x1b[31mred\nline")
    start = {"http": "http.response.start", "websocket": "websocket.accept"}[scope["type"]]
    await send({"type": start, "status": 200, "headers": []})


def ask(
    names: frozenset[str] | None = None,
    *,
    host: str = "localhost:8501",
    origin: str | None = None,
    kind: str = "http",
    method: str = "GET",
    path: str = "/",
    framed: bool = False,
) -> Message:
    """The first message of the server's answer to a request that arrived at ``ARRIVED``."""
    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin is not None else [])
    scope: dict[str, Any] = {"type": kind, "path": path, "headers": headers, "server": (ARRIVED, 8501)}
    scope |= {"method": method, "client": ("10.0.0.9", 1)} if kind == "http" else {"client": ("10.0.0.9", 1)}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    asyncio.run(Gate(page, names=names, framed=framed)(scope, receive, send))
    return sent[0]


def passes(*arguments: Any, **options: Any) -> bool:
    http = ask(*arguments, **options)["status"] == 200
    assert (ask(*arguments, kind="websocket", **options)["type"] == "websocket.accept") == http
    return http


@pytest.mark.parametrize(
    ("listens", "asked", "right"),
    [
        ("127.0.0.1", "localhost:8501", True),
        ("127.0.0.1", "LocalHost", True),
        ("127.0.0.1", "localhost.:8501", True),
        ("127.0.0.1", "127.0.0.1:9000", True),
        ("127.0.0.1", "[::1]:8501", True),
        ("127.0.0.1", socket.gethostname() + ".example.com", False),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "localhost@evil.example", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", socket.gethostname().upper() + ":8501", True),
        ("0.0.0.0", socket.gethostname().partition(".")[0] + ".local", True),
        ("0.0.0.0", ARRIVED + ":8501", True),
        ("0.0.0.0", "192.168.7.6:8501", False),
        ("0.0.0.0", "evil.example", False),
        (ARRIVED, ARRIVED, True),
        (ARRIVED, socket.gethostname(), True),
        (ARRIVED, "evil.example:8501", False),
    ],
)
def test_a_server_answers_under_its_own_names_only(listens: str, asked: str, right: bool) -> None:
    assert passes(names_of(listens), host=asked) == right


def test_what_changes_something_comes_from_the_own_page() -> None:
    names = names_of("127.0.0.1")
    for origin, right in {
        None: True,
        "http://localhost:8501": True,
        "http://LOCALHOST:8501": True,
        "http://localhost:3000": False,
        "http://evil.example": False,
        "null": False,
        "http://[": False,
    }.items():
        assert (ask(names, origin=origin, method="POST")["status"] == 200) == right
        assert (ask(names, origin=origin, kind="websocket")["type"] == "websocket.accept") == right
        # Reading is left to the browser's own rules.
        assert ask(names, origin=origin)["status"] == 200
    assert ask(None, origin="http://evil.example", method="POST")["status"] == 200


def test_no_other_page_frames_it_unless_that_is_wanted() -> None:
    names = names_of("127.0.0.1")
    for answer in (ask(names), ask(names, host="evil.example"), ask(names, path="/broken")):
        headers = dict(answer["headers"])
        assert headers[b"content-security-policy"] == b"frame-ancestors 'none'"
        assert headers[b"x-frame-options"] == b"DENY"
    assert ask(framed=True)["headers"] == []


def test_an_error_is_a_message_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert ask(path="/broken")["status"] == 500
    (line,) = caplog.messages
    assert line.isprintable()
    assert "RuntimeError" in line


def test_a_line_of_the_log_is_short_and_moves_no_cursor() -> None:
    assert harmless("a\x1b[2J\nb\u202ec é 漢") == "a\\x1b[2J\\nb\\u202ec é 漢"
    assert len(harmless("\x1b" * 10**7)) < 1000
    assert host_name("a b") == host_name("[x]") == host_name("a:b") == ""
