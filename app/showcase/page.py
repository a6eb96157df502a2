"""The showcase: a binarized model and its teacher side by side, for an audience; ``python -m lbllm showcase``.

The page and the named endpoints (``app/showcase/api.py``) use the same ``lbllm.chat.showcase.Showcase``. A visitor is a
loaded page: its script makes a random secret, which the page sends with each question and vote.
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
from gradio.utils import get_space
from starlette.middleware import Middleware

from app.showcase import api as showcase_api
from app.showcase import view as showcase_view
from app.showcase.questions import OnlyQuestions
from lbllm.chat.showcase import Showcase
from lbllm.errors import LbllmError, ResourceError
from lbllm.texts.prompts import example_prompts
from lbllm.web import LOOPBACK, Gate, names_of

# Each takes the place of the handler's inputs: the secret stays in the page, and is in no component.
_ASK = "(prompt, blind) => [prompt, blind, window.lbllmSecret]"
_ALONE = "() => [window.lbllmSecret]"


def build(showcase: Showcase) -> gr.Blocks:
    """Return the page with its endpoints."""
    view = showcase_view
    kinds = example_prompts()
    with gr.Blocks(title="LBLLM Showcase", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(view.title(), elem_id="logo")
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
            # Where a handler's input comes from; the value is always the script's.
            secret = gr.Textbox(visible=False)
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
            sides = [_side() for _ in (0, 1)]
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
                    view.answer(seen, side),
                    view.figures(showcase, seen, side),
                ]
            over = seen.state == "over"
            parts += [gr.update(visible=over), gr.update(visible=not over), gr.update(visible=seen.votable)]
            return [*parts, gr.update(visible=True), gr.update(visible=False), gr.skip()]

        def refused(error: LbllmError) -> list[Any]:
            """Return values of ``outputs`` that only change the status line, to the reason of a refusal."""
            return [view.notice(str(error), kind="bad"), *(gr.skip() for _ in outputs[1:])]

        async def answer(text: str, hidden: bool, own: str, request: gr.Request) -> AsyncIterator[list[Any]]:
            try:
                async with aclosing(showcase_api.follow(showcase, request, text, own, blind=hidden)) as turn:
                    async for seen in turn:
                        yield drawn(seen)
            except LbllmError as error:
                yield refused(error)
            except Exception as error:
                raise showcase_api.unexpected(error) from None

        def end(own: str, request: gr.Request) -> None:
            with suppress(LbllmError):
                turn = showcase.current(showcase_api.visitor(request, own))
                if turn is not None:
                    showcase.stop(turn)

        def leave(request: gr.Request) -> None:
            showcase.leave(str(request.session_hash))

        def vote(choice: str) -> Callable[[str, gr.Request], list[Any]]:
            def cast(own: str, request: gr.Request) -> list[Any]:
                try:
                    turn = showcase.vote(showcase_api.visitor(request, own), choice)
                    return [*drawn(showcase.seen(turn))[:-1], view.tally_line(showcase)]
                except LbllmError as error:
                    return refused(error)
                except Exception as error:
                    raise showcase_api.unexpected(error) from None

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
        asking = [prompt, blind, secret]
        gr.on([ask.click, prompt.submit], answer, asking, outputs, js=_ASK, **queued)
        stop.click(end, secret, js=_ALONE, **quick)
        for choice, button in choices:
            button.click(vote(choice), secret, outputs, js=_ALONE, **quick)
        others.click(turn_over, shown, [shown, *buttons], **quick)
        for button in buttons:
            chosen = button.click(None, button, prompt, js="text => text", api_visibility="private")
            chosen.then(answer, asking, outputs, js=_ASK, **queued)
        page.load(load, None, [loading, tally, introduction, prompt, shown, *buttons], **queued)
        page.unload(leave)
        showcase_api.add(showcase)
    return page


def _side() -> list[gr.components.Component]:
    """Add heading, answer and figures of one side to the page; return these components."""
    with gr.Column(elem_classes="side", min_width=320):
        return [
            gr.HTML(elem_classes="heading"),
            gr.HTML(elem_classes="answer", autoscroll=True),
            gr.HTML(elem_classes="figures-place"),
        ]


@contextmanager
def serve(showcase: Showcase, *, host: str, port: int, share: bool = False) -> Iterator[str]:
    """Run the server, also before the models are loaded; yields its address and stops it afterwards.

    Raises ResourceError if the port is not available.
    """
    page = build(showcase).queue(default_concurrency_limit=None, api_open=False)
    own = names_of(host) if host in LOOPBACK and not share else None
    # The hub shows a Space in a frame.
    gate = Middleware(Gate, names=own, framed=get_space() is not None)
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
            # Gradio narrows the rules of a media query to a part of the page that the page's own columns are not in.
            head=f"<style>{showcase_view.css()}</style>",
            js=showcase_view.script(),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            app_kwargs={"middleware": [gate, Middleware(OnlyQuestions, page=page)]},
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
