"""What the showcase's server accepts: the requests of its page and of its API, and nothing else of what Gradio offers.

A refused request gets a message, and the log gets one line. Gradio itself would write a traceback that quotes the
request.
"""

from __future__ import annotations

import json
import re
from typing import Any

import gradio as gr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lbllm.web import refuse

LARGEST_BODY = 1 << 16
_LONGEST_NAME = 100
_READ = re.compile(
    r"/((config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|(assets|static|svelte|_app)/.*"
    r"|gradio_api/((info|openapi\.json|app_id|startup-events|theme\.css|queue/data)/?|heartbeat/.+|call/.+/.+))?"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|cancel|reset|(?:call/v2|call|run|api)/([^/]+))/?")


class OnlyQuestions:
    """Refuses what the showcase does not need, for example uploads of files, and large and malformed bodies."""

    def __init__(self, app: ASGIApp, page: gr.Blocks) -> None:
        self.app = app
        self.page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse(scope, send, 403, "the showcase does not serve this")
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        reading = scope["method"] in ("GET", "HEAD") and _READ.fullmatch(path)
        if scope["method"] == "OPTIONS" or reading:
            await self.app(scope, receive, send)
            return
        called = _WRITE.fullmatch(path) if scope["method"] == "POST" else None
        if called is None:
            await refuse(scope, send, 403, "the showcase does not serve this")
            return
        body = await _body(receive)
        if body is None:
            await refuse(scope, send, 413, f"the request is larger than {LARGEST_BODY:,} bytes")
            return
        if complaint := self._malformed(called, body):
            await refuse(scope, send, 422, complaint)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _malformed(self, called: re.Match[str], body: bytes) -> str:
        """Return what is wrong with a call; empty if nothing is."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return "the body is not JSON"
        if not isinstance(document, dict):
            return "the body is not a JSON object"
        if _has_object([value for name, value in document.items() if name != "event_data"]):
            return "a value of the body is a JSON object; texts, numbers, true, false and null are allowed"
        for name in ("session_hash", "event_id"):
            if not isinstance(document.get(name, ""), str | None) or len(document.get(name) or "") > _LONGEST_NAME:
                return f"{name} must be a text of at most {_LONGEST_NAME} characters"
        endpoint = called[2]
        if endpoint is None and called[1] != "queue/join":
            return ""
        functions: dict[int, Any] = self.page.fns
        number = document.get("fn_index")
        if number is not None and (type(number) is not int or number not in functions):
            return "fn_index names no function"
        by_name = next((one for one in functions.values() if endpoint and one.api_name == endpoint), None)
        function = functions[number] if number is not None else by_name
        if function is None:
            return "the request names no endpoint of the showcase"
        if called[1].startswith("call/v2/"):
            return ""
        data = document.get("data")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            return f"data must be a list of {len(function.inputs)} values"
        return ""


async def _body(receive: Receive) -> bytes | None:
    """Read a request's body; None if it is too large. What is too large is read all the same, and dropped: most clients
    look for an answer only when they have sent everything."""
    body = b""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if size <= LARGEST_BODY:
            body += message.get("body", b"")
        if not message.get("more_body"):
            return body if size <= LARGEST_BODY else None


def _has_object(values: list[Any]) -> bool:
    while values:
        value = values.pop()
        if isinstance(value, dict):
            return True
        if isinstance(value, list):
            values.extend(value)
    return False
