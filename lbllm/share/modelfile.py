"""The Modelfile by which Ollama runs a GGUF file: ``ollama create NAME -f Modelfile``.

Ollama does not run the chat template of a GGUF file, which is written in Jinja: it looks for the nearest of those that
it knows, and otherwise gives the model the bare prompt. So a Modelfile says the template in Ollama's own language. That
is made from what the chat template makes of a few conversations, and written only if it makes the same of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.chat.generation import end_ids, stop_strings
from lbllm.chat.settings import ChatSettings
from lbllm.errors import ModelError
from lbllm.models.chat_template import default_template, render

Conversation = list[dict[str, str]]
# Ollama reserves memory for the whole context; more can be asked for when it runs.
_CONTEXT = 8_192
_MARKS = ("MARKONE", "MARKTWO", "MARKTHREE", "MARKFOUR")


@dataclass(frozen=True)
class _Turns:
    """What a chat template puts around the contents of messages. ``first``: before the first one from the user;
    ``system``: before and after the system prompt, None if the template takes none; ``user``, ``assistant``: before and
    after others; ``answer``: before the answer that is asked for."""

    first: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Conversation) -> str:
        """What Ollama makes of messages by ``template``, with the prompt of an answer at the end."""
        text = ""
        for place, message in enumerate(messages):
            before, after = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}[
                message["role"]
            ]
            if message["role"] == "user" and place == 0:
                before = self.first
            elif message["role"] == "user" and place == 1 and messages[0]["role"] == "system":
                before = ""
            text += before + message["content"] + after
        return text + self.answer

    def template(self) -> str:
        """The same in Ollama's language, that of Go's text/template."""
        told = "{{ .Content }}"
        system = ""
        if self.system is not None:
            before, after = map(_literal, self.system)
            system = f'{{{{ if eq .Role "system" }}}}{before}{told}{after}{{{{ else }}}}'
        return (
            "{{ range $place, $message := .Messages }}"
            f"{system}"
            '{{ if eq .Role "user" }}'
            f"{{{{ if eq $place 0 }}}}{_literal(self.first)}"
            f"{{{{ else if not (and $.System (eq $place 1)) }}}}{_literal(self.user[0])}{{{{ end }}}}"
            f"{told}{_literal(self.user[1])}"
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.assistant[0])}{told}{_literal(self.assistant[1])}'
            f"{{{{ end }}}}{'{{ end }}' if system else ''}{{{{ end }}}}{_literal(self.answer)}"
        )


def modelfile(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str, *, context: int, start: bool
) -> str:
    """The Modelfile for the GGUF file of this name beside it. ``context``: the longest text of the model in tokens;
    ``start``: llama.cpp puts the token that starts a text before the prompt."""
    settings = ChatSettings()
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        turns = _turns(tokenizer, tokenizer.bos_token or "" if start else "")
        if turns is None:
            lines += [
                "# The model's chat template could not be translated. Ollama looks for the nearest one that it knows:",
                "# compare its prompts with the template in the GGUF file, or write a TEMPLATE here.",
            ]
        else:
            lines.append(f'TEMPLATE """{turns.template()}"""')
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in end_ids(model, tokenizer)]
    stops += stop_strings(model)
    lines += [f'PARAMETER stop """{stop}"""' for stop in stops if _is_sayable(stop)]
    values: dict[str, Any] = {
        "temperature": settings.temperature,
        "top_k": 0,  # off, as in our answers
        "top_p": settings.top_p,
        "repeat_penalty": settings.repetition_penalty,
        "num_ctx": min(context, _CONTEXT),
    }
    lines += [f"PARAMETER {name} {value:g}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _turns(tokenizer: PreTrainedTokenizerBase, start: str) -> _Turns | None:
    """The parts of the tokenizer's chat template, without ``start`` at its beginning; None if they don't make what the
    template makes."""
    template = default_template(tokenizer)
    if "strftime_now" in template:  # another text every day
        return None

    def asked(messages: Conversation, *, answer: bool = True) -> str:
        return render(tokenizer, messages, add_generation_prompt=answer).removeprefix(start)

    one, two, three, four = _MARKS
    try:
        found = _read(asked, one, two, three)
        for count in (1, 3, 5):
            talk = [_said(number, _MARKS[number % 4] + str(number)) for number in range(count)]
            prompted = [{"role": "system", "content": four}, *talk]
            if any(found.render(said) != asked(said) for said in ((talk, prompted) if found.system else (talk,))):
                return None
    except (ModelError, ValueError):
        return None
    return found if _is_sayable(found.template()) else None


def _said(number: int, content: str) -> dict[str, str]:
    return {"role": ("user", "assistant")[number % 2], "content": content}


def _read(asked: Any, one: str, two: str, three: str) -> _Turns:
    """The parts by what the template makes of three marks. Raises ValueError if it has not the form of ``_Turns``."""
    user, answer, system = _said(0, one), _said(1, two), {"role": "system", "content": three}
    first, after = _cut(asked([user], answer=False), one)
    _, ending = _cut(asked([user]), one)
    if not ending.startswith(after):
        raise ValueError
    _, replied = _cut(asked([user, answer], answer=False), one)
    before_reply, after_reply = _cut(replied, two)
    _, rest = _cut(asked([user, answer, _said(0, three)], answer=False), two)
    before_next, _ = _cut(rest, three)
    if not before_reply.startswith(after) or not before_next.startswith(after_reply):
        raise ValueError
    try:
        opened, rest = _cut(asked([system, user], answer=False), three)
        prompt = opened, _cut(rest, one)[0]
    except (ModelError, ValueError):
        prompt = None
    return _Turns(
        first=first,
        system=prompt,
        user=(before_next.removeprefix(after_reply), after),
        assistant=(before_reply.removeprefix(after), after_reply),
        answer=ending.removeprefix(after),
    )


def _cut(text: str, mark: str) -> tuple[str, str]:
    """The text before and after its only ``mark``. Raises ValueError."""
    before, after = text.split(mark)
    return before, after


def _is_sayable(text: str) -> bool:
    """Whether a Modelfile can have the text between its quotation marks: Ollama leaves out other characters."""
    return '"""' not in text and all(one.isprintable() or one in "\n\t" for one in text)


def _literal(text: str) -> str:
    """A text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
