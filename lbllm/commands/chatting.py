"""chat."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lbllm.chat.settings import REPETITION_PENALTY, TEMPERATURE, TOP_P, ChatSettings
from lbllm.commands.attend import interrupts
from lbllm.commands.options import DeviceOption, JsonOption
from lbllm.commands.output import print_json
from lbllm.fields import bounds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _sets(name: str, *, capped: bool = False) -> Any:
    """The option that sets a setting, with the setting's own help and lower bound; with ``capped`` also its upper
    bound."""
    field = ChatSettings.model_fields[name]
    least, greatest = bounds(field)
    return typer.Option(min=least, max=greatest if capped else None, help=field.description)


def chat(
    model: Annotated[list[str], typer.Option("--model", "-m", help="A teacher or a packed checkpoint; two compare.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this prompt and exit; without it: chat.")
    ] = None,
    system: Annotated[str | None, _sets("system")] = None,
    max_new_tokens: Annotated[int, _sets("max_new_tokens")] = 256,
    temperature: Annotated[float, _sets("temperature")] = TEMPERATURE,
    top_p: Annotated[float, _sets("top_p", capped=True)] = TOP_P,
    repetition_penalty: Annotated[float, _sets("repetition_penalty")] = REPETITION_PENALTY,
    seed: Annotated[int, typer.Option(help=ChatSettings.model_fields["seed"].description)] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Talk to one model, or to two at once. Ctrl-C ends an answer, Ctrl-D or an empty line the conversation."""
    if as_json and prompt is None:
        raise typer.BadParameter("--json needs --prompt: a conversation is not a single document")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("--prompt is empty; give it a question, or leave it out to chat")
    if len(model) > 2:
        raise typer.BadParameter(f"--model was given {len(model)} times; one or two models can answer")
    from lbllm.checkpoints.find import open_model
    from lbllm.machine import device_named

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    opened = [(name, *open_model(name, device=device_named(device))) for name in model]
    begin = [{"role": "system", "content": system}] if system else []
    talks = [list(begin) for _ in opened]
    out = Console(quiet=as_json)
    while True:
        try:
            question = prompt if prompt is not None else out.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not question:
            return
        answers = []
        for (name, network, tokenizer), talk in zip(opened, talks, strict=True):
            talk.append({"role": "user", "content": question})
            if len(opened) > 1:
                out.print(f"[bold]{escape(name)}[/bold]")
            answers.append({"model": name, **_answer(network, tokenizer, talk, options, out)})
            talk.append({"role": "assistant", "content": answers[-1]["answer"]})
        if prompt is not None:
            if as_json:
                print_json({"prompt": prompt, "answers": answers})
            return


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    options: dict[str, Any],
    out: Console,
) -> dict[str, Any]:
    """Write the answer as it comes, then its measurements. Ctrl-C ends the answer at once."""
    from lbllm.chat.stream import ChatPiece, stream

    stop = threading.Event()
    last = ChatPiece("", 0.0, 0.0, 0)
    text = ""
    with interrupts() as pressed:
        for last in stream(model, tokenizer, messages, stop=stop, **options):
            text += last.text
            out.print(last.text, end="", markup=False, highlight=False, soft_wrap=True)
            if pressed:
                stop.set()
    out.print()
    speed = f"first after {last.first_token_seconds:.2f} s, then {last.tokens_per_second:.1f} a second"
    out.print(f"{last.tokens} tokens, {speed}", style="dim", highlight=False)
    measured = {"tokens": last.tokens, "tokens_per_second": last.tokens_per_second}
    return {"answer": text, **measured, "first_token_seconds": last.first_token_seconds}
