"""The Modelfile for Ollama: its template makes the same prompts as the chat template, or says that there is none."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lbllm.chat.settings import ChatSettings
from lbllm.share.modelfile import modelfile
from tests.helpers.tiny_models import CHAT_TEMPLATE, tiny, tiny_tokenizer

# With a system prompt of its own, as SmolLM2's.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe brief.<|end|>\n{% endif %}" + CHAT_TEMPLATE
)
# The system prompt stands in the first message, contents are trimmed, as Gemma 3's and Llama 2's.
INSIDE = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}<turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ first if loop.first else '' }}{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + CHAT_TEMPLATE
)
BRACES = CHAT_TEMPLATE.replace("'<|start|>", "'{' + '{<|start|>")
# Answers of earlier turns are left out, a rule that no text around contents says.
FORGETS = CHAT_TEMPLATE.replace("message['content']", "(message['content'] if loop.last else '')")
DATED = "{{ strftime_now('%d %B') }}" + CHAT_TEMPLATE


def written(template: str | None, *, start: bool = False, **generation: Any) -> tuple[str, PreTrainedTokenizerBase]:
    model, _ = tiny("llama")
    tokenizer = tiny_tokenizer(chat=False)
    if template is not None:
        tokenizer.chat_template = template
    model.generation_config = GenerationConfig(**generation)
    return modelfile(model, tokenizer, "mine-Q4_1.gguf", context=4096, start=start), tokenizer


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of a template with range, if, else if, else, eq, and, not over messages."""
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    system = "".join(message["content"] for message in messages if message["role"] == "system")

    def holds(condition: str, place: int) -> bool:
        role = messages[place]["role"]
        known = {
            **{f'eq .Role "{name}"': role == name for name in ("system", "user", "assistant")},
            "eq $place 0": place == 0,
            "not (and $.System (eq $place 1))": not (system and place == 1),
        }
        return known[condition]

    def run(index: int, place: int, writes: bool) -> tuple[str, int]:
        """The text up to the end, or else, of this level, and the place of that in ``pieces``."""
        text = ""
        while index < len(pieces):
            if index % 2 == 0:
                text += pieces[index] if writes else ""
            elif pieces[index].startswith("range"):
                after = index
                for one in range(len(messages)):
                    part, after = run(index + 1, one, writes)
                    text += part
                index = after
            elif pieces[index].startswith("if "):
                done, condition = False, pieces[index].removeprefix("if ")
                while True:
                    chosen = writes and not done and (condition == "" or holds(condition, place))
                    part, index = run(index + 1, place, chosen)
                    text, done = text + part, done or chosen
                    if pieces[index] == "end":
                        break
                    condition = pieces[index].removeprefix("else").strip().removeprefix("if ")
            elif pieces[index] == "end" or pieces[index].startswith("else"):
                return text, index
            elif writes:
                text += messages[place]["content"] if pieces[index] == ".Content" else "{{"
            index += 1
        return text, index

    return run(0, 0, True)[0]


CHATS = [
    [*([{"role": "system", "content": "Answer in French."}] if system else []), *turns]
    for system, turns in product(
        (False, True),
        (
            [{"role": "user", "content": "Why?"}],
            [
                {"role": "user", "content": "Hello\n\nthere"},
                {"role": "assistant", "content": "Hi {{ x }}"},
                {"role": "user", "content": "Why?"},
            ],
        ),
    )
]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DEFAULT_SYSTEM, INSIDE, NO_SYSTEM, BRACES])
@pytest.mark.parametrize("start", [False, True])
def test_the_template_makes_the_same_prompts(template: str, start: bool) -> None:
    text, tokenizer = written(template, start=start)
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.M | re.S)
    assert found is not None
    for chat in CHATS:
        if template == NO_SYSTEM and chat[0]["role"] == "system":
            continue
        wanted: Any = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert isinstance(tokenizer.bos_token, str)
        assert go(found[1], chat) == (wanted.removeprefix(tokenizer.bos_token) if start else wanted)


@pytest.mark.parametrize("template", [FORGETS, DATED, CHAT_TEMPLATE + '"""', CHAT_TEMPLATE + "\u200b"])
def test_a_template_that_can_t_be_said_is_left_to_ollama(template: str) -> None:
    text, _ = written(template)
    assert 'TEMPLATE """' not in text
    assert "# The model's chat template could not be translated" in text


def test_settings_and_ends_of_an_answer() -> None:
    text, _ = written(CHAT_TEMPLATE, eos_token_id=[2, 0], stop_strings=["\n\n", 'say "no\u00e9"!'])
    lines = text.splitlines()
    assert lines[0] == "FROM ./mine-Q4_1.gguf"
    settings = ChatSettings()
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop """<|pad|>"""',
        'PARAMETER stop """<|end|>"""',
        'PARAMETER stop """',
        'PARAMETER stop """say "no\u00e9"!"""',
        f"PARAMETER temperature {settings.temperature:g}",
        "PARAMETER top_k 0",
        f"PARAMETER top_p {settings.top_p:g}",
        f"PARAMETER repeat_penalty {settings.repetition_penalty:g}",
        "PARAMETER num_ctx 4096",
    ]


def test_a_model_without_a_chat_template_gets_the_bare_prompt() -> None:
    text, _ = written(None)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
