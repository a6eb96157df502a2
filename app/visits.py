"""What the workbench keeps for one browser, beyond a reload of its page: conversations, and the models it asked for.

The browser is known by a random cookie that no script and no other site reads. The server keeps the rest in memory, so
it ends with the server. A page's address names one of the browser's own conversations; in another browser, the same
address means nothing.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any

import streamlit as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from lbllm.chat.conversation import Conversation

COOKIE = "lbllm_visitor"
TALK = "talk"
_VALID = re.compile(r"[A-Za-z0-9_-]{32}")
_YEAR = 365 * 86400
_CONVERSATIONS = 100
_VISITS = 200


class Visitors:
    """ASGI middleware that gives every browser its cookie with the first page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wants_page = scope["type"] == "http" and any(
            key == b"accept" and b"text/html" in value for key, value in scope["headers"]
        )
        if not wants_page or _sent(scope) is not None:
            await self.app(scope, receive, send)
            return
        # Lax, not strict: a link to the workbench from elsewhere must not make the browser a new visitor.
        cookie = f"{COOKIE}={secrets.token_urlsafe(24)}; Path=/; Max-Age={_YEAR}; HttpOnly; SameSite=Lax"

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"set-cookie", cookie.encode())]
            await send(message)

        await self.app(scope, receive, with_cookie)


def _sent(scope: Scope) -> str | None:
    for key, value in scope["headers"]:
        if key == b"cookie":
            try:
                found = SimpleCookie(value.decode("latin-1")).get(COOKIE)
            except CookieError:
                continue
            if found is not None and _VALID.fullmatch(found.value):
                return found.value
    return None


@dataclass
class Kept:
    """A conversation, the settings chosen for it, and the session that shows it."""

    conversation: Conversation = field(default_factory=Conversation)
    settings: dict[str, Any] = field(default_factory=dict)
    session: str = ""


@dataclass
class Visit:
    """One browser. ``models``: the names that its user asked for by a click."""

    models: set[str] = field(default_factory=set)
    talks: OrderedDict[str, Kept] = field(default_factory=OrderedDict)


class _Visits:
    """The visits of this process by cookie, the least recently used one first."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._visits: OrderedDict[str, Visit] = OrderedDict()

    def get(self, cookie: str) -> Visit:
        with self._mutex:
            found = self._visits.setdefault(cookie, Visit())
            self._visits.move_to_end(cookie)
            while len(self._visits) > _VISITS:
                self._visits.popitem(last=False)
            return found


@st.cache_resource
def _visits() -> _Visits:
    return _Visits()


def sent_cookie(name: str) -> str:
    """Return a cookie that the browser sent when the session began; empty if it sent none."""
    value: object = st.context.cookies.get(name)
    return value if isinstance(value, str) else ""


def visit() -> Visit:
    """Return what is kept for this browser. Without a cookie it lasts as long as the session."""
    cookie = sent_cookie(COOKIE)
    if _VALID.fullmatch(cookie):
        return _visits().get(cookie)
    found: Visit = st.session_state.setdefault("visit", Visit())
    return found


def arrive() -> None:
    """Note what the address said when the session began: a link may come from anybody."""
    st.session_state.setdefault("arrived", dict(st.query_params))


def came_by_link(name: str, value: str) -> bool:
    """Whether a value stood in the address with which the session began."""
    arrived: MutableMapping[str, str] = st.session_state.get("arrived", {})
    return arrived.get(name) == value


def kept() -> Kept:
    """Return the conversation of this session. It is the one that the page's address names, or else this browser's last
    one that no open page shows, or a new one."""
    found: Kept | None = st.session_state.get("kept")
    talks = visit().talks
    if found is None:
        own = st.query_params.get(TALK, "")
        free = [name for name, talk in talks.items() if not _is_open(talk.session)]
        name = own if own in talks else free[-1] if free else secrets.token_hex(4)
        found = talks.setdefault(name, Kept())
        talks.move_to_end(name)
        while len(talks) > _CONVERSATIONS:
            talks.popitem(last=False)
        st.session_state["kept"], st.session_state["kept as"] = found, name
        st.session_state.update(found.settings)
    context = get_script_run_ctx()
    found.session = context.session_id if context is not None else ""
    name = st.session_state["kept as"]
    if st.query_params.get(TALK) != name:
        st.query_params[TALK] = name
    return found


def _is_open(session: str) -> bool:
    return bool(session) and runtime.exists() and runtime.get_instance().is_active_session(session)
