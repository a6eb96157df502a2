"""Chat templates run with bounds: the text that transformers gives, or one message."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lbllm.chat.stream import Messages, prompt_text
from lbllm.errors import ModelError
from tests.helpers.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

TALK: Messages = [{"role": "user", "content": "a <b> \ud800 ü\n"}, {"role": "assistant", "content": "é"}]
GOOD = (
    CHAT_TEMPLATE,
    "{%- for m in messages -%}\n  {% if true %}\n x\n {% endif %}\n{%- endfor %}\n",
    "{% generation %}hi{% endgeneration %}{{ bos_token }}{{ messages | tojson }}{{ tools is none }}",
    "{{ dict(a=1) | tojson(indent=2) }}{{ eos_token ~ pad_token }}{{ strftime_now('%Y') }}",
    "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}{{ n.i }}{{ messages[0].content.strip().upper() }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[-1]['content']) }}{{ messages[0].name is defined }}",
)
BAD = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "itself without end",
    "{{ messages + 3 }}": "TypeError",
    "{{ nothing.at_all }}": "undefined",
    "{% if x": "unexpected end",
    "{{ raise_exception('no system role') }}": "no system role",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "too much time",
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}": "characters|memory",
    "{{ 'a' * 10**10 }}": "memory",
    "{{ 'a'.center(10**12) }}": "memory",
    "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}": "memory",
    "{{ '%0999999999d' % 1 }}": "memory",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ namespace(__class__=1) }}": "underscore",
    "{% include '/etc/passwd' %}": "loader",
}


@pytest.mark.parametrize("template", GOOD)
@pytest.mark.parametrize("talk", [TALK, TALK[:1]], ids=["two", "one"])
def test_the_text_is_that_of_transformers(template: str, talk: Messages) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    wanted = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert prompt_text(tokenizer, talk) == wanted


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_fails_or_never_ends_is_a_message(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    began = time.process_time()
    with pytest.raises(ModelError, match=rf"chat template refuses these messages: .*({BAD[template]})"):
        prompt_text(tokenizer, TALK)
    assert time.process_time() - began < 1  # the time of its own process is bounded there
    tokenizer.chat_template = CHAT_TEMPLATE
    assert prompt_text(tokenizer, TALK).endswith("<|start|>assistant\n")


def test_of_several_templates_the_default_counts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "default": "y"}
    assert prompt_text(tokenizer, TALK) == "y"
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(ModelError, match="templates for rag, tool_use, and none is called default; turn"):
        prompt_text(tokenizer, TALK)
    assert prompt_text(tokenizer, TALK[:1], template=False) == TALK[0]["content"]
    tokenizer.chat_template = 3
    with pytest.raises(ModelError, match="is no text but a int"):
        prompt_text(tokenizer, TALK)


def test_threads_share_the_process() -> None:
    tokenizer = tiny_tokenizer()
    talks = [[{"role": "user", "content": str(number)}] for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for talk, text in zip(talks, pool.map(lambda talk: prompt_text(tokenizer, talk), talks), strict=True):
            assert f"user\n{talk[0]['content']}<|end|>" in text
