"""Requests: what is read of them, and that nothing which would change the answer is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from lbllm.chat.settings import ChatSettings
from lbllm.serving.question import RequestError, read_question

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def test_a_short_request_has_the_settings_of_a_chat() -> None:
    question, usual = read_question(ASK), ChatSettings()
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert getattr(question, name) == getattr(usual, name)
    assert (question.max_tokens, question.seed, question.stop, question.chances) == (None, None, (), None)
    assert question.messages == ASK["messages"]


def test_what_asks_for_nothing_is_let_through() -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}
    unused = {"user": "somebody", "metadata": {"a": "b"}, "service_tier": "auto", "top_logprobs": 0, "stop": None}
    nothing = {"min_p": None, "functions": None, "stream": False, "store": False}
    assert read_question(ASK | neutral | unused | nothing) == read_question(ASK)


def test_messages_of_several_forms() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    back: dict[str, Any] = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "tool_calls": [],
        "annotations": None,
    }
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}, back]
    assert read_question(ASK | {"messages": messages}).messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "Hi"},
    ]


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"model": None}, "model", "model is missing"),
        ({"model": 3}, "model", "model is 3"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "messages is []"),
        ({"messages": ["hi"]}, "messages[0]", "is 'hi'; give an object"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "messages[0].role", "'tool'; give system"),
        ({"messages": [{"role": [], "content": "7"}]}, "messages[0].role", "[]; give system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing; give a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text alone"),
        ({"messages": [{"role": "user", "content": "a", "name": "Bo"}]}, "messages[0].name", "'Bo'"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls", "[1]"),
        ({"temperature": 2.5}, "temperature", "temperature is 2.5; give a number at least 0, at most 2"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"temperature": "1"}, "temperature", "'1'"),
        ({"top_p": 0}, "top_p", "above 0, at most 1"),
        ({"repetition_penalty": True}, "repetition_penalty", "True"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; give a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens", "1.5"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "which is 6"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"seed": 10**5000}, "seed", "thousands of digits"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": {"a": 1}}, "stop", "give a text"),
        ({"stream": "yes"}, "stream", "give true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "include_usage"),
        ({"logprobs": 3}, "logprobs", "give true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"n": 2}, "n", "n is 2, which this server can't do; leave n out"),
        ({"n": True}, "n", "n is True"),
        ({"tools": [{"type": "function"}]}, "tools", "can't do"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"logit_bias": {"5": -100}}, "logit_bias", "can't do"),
        ({"presence_penalty": 0.5}, "presence_penalty", "0.5"),
        ({"min_p": 0.1}, "min_p", "'min_p' is not a field that this server knows; leave it out. It reads model,"),
        ({"max_new_tokens": 5}, "max_new_tokens", "max_completion_tokens"),
        ({"\ud800" * 300: 5}, "?" * 100, "not a field"),
    ],
)
def test_what_is_refused_names_the_field_and_the_way_out(changes: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_question(ASK | changes)
    assert refused.value.param == param
    assert says in str(refused.value)
    assert len(str(refused.value)) < 500
