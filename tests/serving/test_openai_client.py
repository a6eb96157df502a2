"""The server as OpenAI's own client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lbllm.serving.line import Line
from tests.helpers.tiny_served import listening, tiny_loaded

openai = pytest.importorskip("openai", reason="OpenAI's client is not in the lock")
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    line = Line(tiny_loaded(tmp_path_factory.mktemp("served")), waiting=2, answer_tokens=12)
    with listening(line) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_answers_whole_and_streamed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    assert whole.usage.completion_tokens <= 12
    (choice,) = whole.choices
    assert all(len(entry.top_logprobs) == 3 and entry.logprob < 0 for entry in choice.logprobs.content)
    parts = [*client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})]
    told = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert told == choice.message.content
    assert parts[-1].usage == whole.usage
    assert client.chat.completions.create(**ASK, extra_body={"repetition_penalty": 2}).choices
    with client.chat.completions.stream(**ASK, stop=[told[3:6]]) as events:
        (final,) = events.get_final_completion().choices
    assert (final.message.content, final.finish_reason) == (told[: told.index(told[3:6])], "stop")


def test_errors_are_the_client_s_own(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4o', which is not served here") as unknown:
        client.chat.completions.create(**ASK | {"model": "gpt-4o"})
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    tool = {"type": "function", "function": {"name": "weather"}}
    with pytest.raises(openai.BadRequestError, match="tools is") as refused:
        client.chat.completions.create(**ASK, tools=[tool])
    assert refused.value.param == "tools"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="tiny", input="text")
