"""The showcase: a binarized model and its teacher side by side, for an audience; ``python -m lbllm showcase``.

The page and the named endpoints (``app/showcase/api.py``) use the same ``lbllm.chat.showcase.Showcase``. A visitor is a
Gradio session; every load of the page starts a new session.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

# Set before gradio is imported: otherwise gradio sends usage statistics.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.showcase import api as showcase_api
from app.showcase import view as showcase_view
from lbllm.chat.showcase import Showcase
from lbllm.errors import LbllmError, ResourceError
from lbllm.texts.prompts import example_prompts

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REFUSED = ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy", "/gradio_api/stream")


def build(showcase: Showcase) -> gr.Blocks:
    """Return the page with its endpoints."""
    view = showcase_view
    kinds = example_prompts()
    with gr.Blocks(title="LBLLM Showcase", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(view.logo(), elem_id="logo")
            tally = gr.HTML(elem_id="tally")
        with gr.Row(elem_id="question"):
            prompt = gr.Textbox(
                show_label=False,
                label="Question",
                placeholder="Ask both models the same thing",
                lines=1,
                max_lines=3,
                scale=8,
                autofocus=True,
                elem_id="prompt",
            )
            ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
            stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=120, visible=False)
        with gr.Row(elem_id="below"):
            blind = gr.Checkbox(
                label="Blind: the names after your vote", elem_id="blind", min_width=200, container=False
            )
            with gr.Column(scale=3, min_width=200):
                loading = gr.HTML(elem_id="loading")
                status = gr.HTML(elem_id="status")
        with gr.Column(elem_id="examples") as beginning:
            introduction = gr.HTML(elem_id="introduction")
            gr.HTML(view.notice("Write your own question above, or start with one of these:"))
            suggested = view.examples(kinds, 0, completes=showcase.completes)
            with gr.Row(elem_id="suggested"):
                buttons = [gr.Button(text, elem_classes="example", min_width=280) for text in suggested]
            others = gr.Button("Other examples", variant="secondary", size="sm", elem_id="others")
            shown = gr.State(0)
        with gr.Row(elem_id="answers", visible=False, equal_height=True) as answers:
            sides = [_side(number) for number in (0, 1)]
        with gr.Row(elem_id="votes", visible=False) as votes:
            choices = [(choice, gr.Button(label, elem_classes="vote")) for choice, label in view.VOTES.items()]

        outputs = [status, *(part for side in sides for part in side)]
        outputs += [ask, stop, votes, answers, beginning, tally]

        def drawn(seen: Any) -> list[Any]:
            """Return the values of ``outputs`` for a turn."""
            parts: list[Any] = [view.status(showcase, seen)]
            for side in (0, 1):
                parts += [
                    view.heading(showcase, seen, side),
                    seen.answers[side].text,
                    view.figures(showcase, seen, side),
                ]
            over = seen.state == "over"
            parts += [gr.update(visible=over), gr.update(visible=not over), gr.update(visible=seen.votable)]
            return [*parts, gr.update(visible=True), gr.update(visible=False), gr.skip()]

        def refused(error: LbllmError) -> list[Any]:
            """Return values of ``outputs`` that only change the status line, to the reason of a refusal."""
            return [view.notice(str(error), kind="bad"), *(gr.skip() for _ in outputs[1:])]

        async def answer(text: str, hidden: bool, request: gr.Request) -> AsyncIterator[list[Any]]:
            try:
                async with aclosing(showcase_api.follow(showcase, request, text, blind=hidden)) as turn:
                    async for seen in turn:
                        yield drawn(seen)
            except LbllmError as error:
                yield refused(error)

        def end(request: gr.Request) -> None:
            turn = showcase.current(showcase_api.visitor(request))
            if turn is not None:
                showcase.stop(turn)

        def leave(request: gr.Request) -> None:
            showcase.leave(showcase_api.visitor(request))

        def vote(choice: str) -> Callable[[gr.Request], list[Any]]:
            def cast(request: gr.Request) -> list[Any]:
                try:
                    turn = showcase.vote(showcase_api.visitor(request), choice)
                except LbllmError as error:
                    return refused(error)
                return [*drawn(showcase.seen(turn))[:-1], view.tally_line(showcase)]

            return cast

        def turn_over(number: int) -> list[Any]:
            texts = view.examples(kinds, number, completes=showcase.completes)
            missing = [gr.update(visible=False)] * (len(buttons) - len(texts))
            return [number + 1, *(gr.update(value=text, visible=True) for text in texts), *missing]

        async def load() -> AsyncIterator[list[Any]]:
            counted = view.tally_line(showcase)
            while line := view.loading_line(showcase):
                yield [view.notice(line), counted, *(gr.skip() for _ in (introduction, prompt, shown, *buttons))]
                await asyncio.sleep(0.5)
            begin = "Begin a text, and both models continue it"
            hint = gr.update(placeholder=begin) if showcase.completes else gr.skip()
            yield ["", counted, view.introduction(showcase), hint, *turn_over(0)]

        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        queued: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([ask.click, prompt.submit], answer, [prompt, blind], outputs, **queued)
        stop.click(end, **quick)
        for choice, button in choices:
            button.click(vote(choice), None, outputs, **quick)
        others.click(turn_over, shown, [shown, *buttons], **quick)
        for button in buttons:
            chosen = button.click(None, button, prompt, js="text => text", api_visibility="private")
            chosen.then(answer, [prompt, blind], outputs, **queued)
        page.load(load, None, [loading, tally, introduction, prompt, shown, *buttons], **queued)
        page.unload(leave)
        showcase_api.add(showcase)
    return page


def _side(number: int) -> list[gr.components.Component]:
    """Add heading, answer and figures of one side to the page; return these components."""
    with gr.Column(elem_classes="side", min_width=320):
        return [
            gr.HTML(elem_classes="heading"),
            # A text box shows any text unchanged, also HTML and Markdown.
            gr.Textbox(
                show_label=False,
                label=f"Answer {showcase_view.LETTERS[number]}",
                lines=6,
                max_lines=6,
                interactive=False,
                elem_classes="answer",
            ),
            gr.HTML(elem_classes="figures-place"),
        ]


class OnlyQuestions:
    """Refuses requests that the showcase does not need.

    These are uploads and downloads of files, and, if ``hosts`` is not empty, requests for other host names: a foreign
    web page must not reach a local showcase through its own host name.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = ()) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"host"), "")
            name = named.rpartition(":")[0] if named.rpartition(":")[2].isdigit() else named
            foreign = bool(self.hosts) and name.strip("[]") not in self.hosts
            if foreign or any(path in scope["path"] for path in _REFUSED):
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"The showcase does not serve this."})
                return
        await self.app(scope, receive, send)


@contextmanager
def serve(showcase: Showcase, *, host: str, port: int, share: bool = False) -> Iterator[str]:
    """Run the server, also before the models are loaded; yields its address and stops it afterwards.

    Raises ResourceError if the port is not available.
    """
    page = build(showcase).queue(default_concurrency_limit=None, api_open=False)
    own = LOOPBACK if host in LOOPBACK and not share else ()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            # Each waiting visitor uses one of these threads; visitors who only look at the page need some, too.
            max_threads=showcase.limits.line + 40,
            theme=showcase_view.theme(),
            css=showcase_view.css(),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            app_kwargs={"middleware": [Middleware(OnlyQuestions, hosts=own)]},
        )
    except OSError:
        page.close(verbose=False)
        raise ResourceError(f"port {port} of {host} is taken or not allowed; give another with --port") from None
    try:
        yield address
    finally:
        page.close(verbose=False)


def run(showcase: Showcase, *, host: str, port: int, share: bool, say: Callable[[str], None]) -> None:
    """Serve until the process ends; ``say`` gets messages for the host. Raises LbllmError if a model can't load."""
    with suppress(KeyboardInterrupt), serve(showcase, host=host, port=port, share=share) as address:
        say(f"LBLLM Showcase: {address} (Ctrl-C stops it). The models are loading.")
        showcase.wait()
        say(f"{showcase.names[0]} and {showcase.names[1]} are ready.")
        threading.Event().wait()
