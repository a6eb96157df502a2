"""What the workbench keeps for a browser: its cookie, its conversations, the models it asked for."""

from __future__ import annotations

import asyncio
import re

import pytest
from starlette.types import Message, Receive, Scope, Send
from streamlit.testing.v1 import AppTest

from app.visits import COOKIE, Visitors


def cookie_for(accept: str, sent: str = "") -> str:
    """The cookie that a request gets; empty if it gets none."""
    messages: list[Message] = []

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    headers = [(b"accept", accept.encode()), (b"cookie", sent.encode())]
    asyncio.run(Visitors(page)({"type": "http", "path": "/", "headers": headers}, receive, send))
    return dict(messages[0]["headers"]).get(b"set-cookie", b"").decode()


def test_a_browser_gets_one_secret_that_no_script_and_no_other_site_reads() -> None:
    first, second = cookie_for("text/html"), cookie_for("text/html", "other=1; " + COOKIE + "=guessed")
    for cookie in (first, second):
        assert re.match(COOKIE + "=[A-Za-z0-9_-]{32};", cookie)
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
    assert first != second
    assert cookie_for("text/html", first.partition(";")[0]) == ""
    assert cookie_for("*/*") == ""


def _page() -> None:
    import streamlit as st

    from app import visits

    visits.arrive()
    talk = visits.kept()
    st.text(str(id(talk.conversation)))
    st.text(str(visits.came_by_link("right", "some/model")))


@pytest.mark.parametrize("linked", [True, False])
def test_a_link_is_told_from_a_click(linked: bool) -> None:
    page = AppTest.from_function(_page, default_timeout=30)
    if linked:
        page.query_params["right"] = "some/model"
    page.run()
    shown = page.text[0].value
    # A later change of the address comes from the page itself.
    page.query_params["right"] = "some/model"
    page.run()
    assert page.text[1].value == str(linked)
    assert page.text[0].value == shown
    assert len(page.query_params["talk"]) == 8
