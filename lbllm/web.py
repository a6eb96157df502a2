"""What both web servers of the program ask of a request, as one ASGI middleware: ``Gate``.

A page of another site must not reach a server on this machine. So the host name must be one of the server's own (DNS
rebinding), a request that changes something must come from the server's own page, and no other page may frame it.
What is refused, and an unexpected error, is one line in the log.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Collection
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERY_ADDRESS = ("0.0.0.0", "::", "")
_log = logging.getLogger(__name__)
_LONGEST = 200
_READING = ("GET", "HEAD", "OPTIONS")
_NOT_FRAMED = [(b"content-security-policy", b"frame-ancestors 'none'"), (b"x-frame-options", b"DENY")]


class Gate:
    """Lets a request through, or refuses it with a message.

    ``names``: the host names and addresses of the server, as ``names_of`` gives them; None: any. ``framed``: whether
    pages of other sites may show this one in a frame.
    """

    def __init__(self, app: ASGIApp, *, names: Collection[str] | None = None, framed: bool = False) -> None:
        self.app = app
        self.names = names
        self.framed = framed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        begun = False

        async def framed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if not self.framed:
                    message["headers"] = [*message.get("headers", ()), *_NOT_FRAMED]
            await send(message)

        if self.names is not None and (complaint := _foreign(scope, self.names)):
            await refuse(scope, framed, 403, complaint)
            return
        try:
            await self.app(scope, receive, framed)
        except Exception as error:
            if scope["type"] == "websocket" or begun:
                note(scope, f"{type(error).__name__}: {error}")
            else:
                await refuse(scope, framed, 500, f"the request failed ({type(error).__name__}: {error})")


async def refuse(scope: Scope, send: Send, status: int, complaint: str) -> None:
    """Answer a request with a refusal in one sentence, and write one line to the log."""
    note(scope, f"{status}, {complaint}")
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = f"{complaint[:1].upper()}{complaint[1:]}.\n".encode("utf-8", "replace")
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    headers += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def note(scope: Scope, text: str) -> None:
    """Write one line about a request to the log."""
    client = (scope.get("client") or ("unknown",))[0]
    method = scope.get("method", "websocket")
    _log.warning("%s %s from %s: %s", *(harmless(str(part)) for part in (method, scope["path"], client, text)))


def harmless(text: str) -> str:
    """Return text as one short line that a terminal shows as it is: control characters are escaped."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def names_of(host: str) -> frozenset[str]:
    """Return the names and addresses under which a server that listens on ``host`` may be asked for, in lower case.

    For every address (0.0.0.0) these are the machine's names; ``Gate`` also accepts the address at which a request
    arrived.
    """
    if host in LOOPBACK:
        return frozenset(LOOPBACK)
    own = socket.gethostname().lower()
    machine = {own, socket.getfqdn().lower(), f"{own.partition('.')[0]}.local"}
    return frozenset({*LOOPBACK, *machine} if host in EVERY_ADDRESS else {host.lower(), *machine})


def host_name(header: str) -> str:
    """Return the name in a Host header: without port and brackets, in lower case; empty if the header is damaged."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/@?#]+)(:\d{1,5})?", header)
    return found[1].strip("[]").lower().rstrip(".") if found else ""


def _foreign(scope: Scope, names: Collection[str]) -> str:
    """Return why a request is not for this server or not from its own page; empty if it is."""
    headers = {key: value.decode("latin-1") for key, value in reversed(scope["headers"])}
    host = headers.get(b"host", "")
    name = host_name(host)
    if name not in names and not (_is_address(name) and name == (scope.get("server") or ("",))[0]):
        return f"this server does not answer under the name {harmless(host)!r}; start it with --host to change that"
    origin = headers.get(b"origin")
    if origin is None or (scope["type"] == "http" and scope["method"] in _READING):
        return ""
    try:
        source = urlsplit(origin).netloc
    except ValueError:
        source = ""
    return "" if source.lower() == host.lower() else f"the request comes from a page of {harmless(origin)!r}"


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
