"""The server: answers whole and as a stream, log-probabilities, stops, the line, refusals, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from lbllm.chat.pool import Loaded
from lbllm.chat.stream import prompt_ids, stream
from lbllm.checkpoints.decode import FusedForward
from lbllm.serving.line import Line
from lbllm.serving.server import build
from lbllm.web import names_of
from tests.helpers.tiny_served import listening, tiny_loaded
from tests.helpers.waiting import wait_until

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "repetition_penalty": 1}
ROUTE = "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return tiny_loaded(tmp_path_factory.mktemp("served"))


@pytest.fixture
def client(loaded: Loaded) -> TestClient:
    line = Line(loaded, waiting=0, answer_tokens=12)
    return TestClient(build(line, "tiny", names_of("127.0.0.1")), base_url="http://127.0.0.1:8000")


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post(ROUTE, json={"model": "tiny", "messages": MESSAGES} | GREEDY | fields)


def choice(client: TestClient, **fields: Any) -> Any:
    answered = ask(client, **fields)
    assert answered.status_code == 200, answered.text
    return answered.json()["choices"][0]


def events(client: TestClient, **fields: Any) -> list[Any]:
    """The documents of a streamed answer."""
    answered = ask(client, stream=True, **fields)
    assert answered.status_code == 200, answered.text
    assert answered.headers["content-type"].startswith("text/event-stream")
    lines = answered.text.removesuffix("\n\n").split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer_is_that_of_a_chat(client: TestClient, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
    pieces = [*stream(loaded.model, loaded.tokenizer, MESSAGES, max_new_tokens=20, **given)]  # type: ignore[arg-type]
    fused, usual = [], FusedForward._weights

    def counted(self: FusedForward) -> Any:
        weights = usual(self)
        fused.append(weights is not None)
        return weights

    monkeypatch.setattr(FusedForward, "_weights", counted)
    answered = client.post(ROUTE, json={"model": "tiny", "messages": MESSAGES, "max_tokens": 20} | given).json()
    assert fused == [True] * (pieces[-1].tokens - 1)  # the first token comes from the prompt
    (only,) = answered["choices"]
    assert only["message"] == {
        "role": "assistant",
        "content": "".join(piece.text for piece in pieces),
        "refusal": None,
    }
    assert only["finish_reason"] == ("length" if pieces[-1].cut else "stop")
    prompt = prompt_ids(loaded.tokenizer, MESSAGES).shape[1]
    used = {"prompt_tokens": prompt, "completion_tokens": pieces[-1].tokens}
    assert answered["usage"] == used | {"total_tokens": prompt + pieces[-1].tokens}
    assert (answered["object"], answered["model"]) == ("chat.completion", "tiny")


def test_a_stream_has_the_parts_of_the_whole_answer(client: TestClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 30, "stop": ["zz", "q"]}
    whole = ask(client, **fields).json()
    *parts, last, usage = events(client, stream_options={"include_usage": True}, **fields)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(parts) > 3
    told = [part["choices"][0] for part in parts]
    assert "".join(part["delta"]["content"] for part in told) == whole["choices"][0]["message"]["content"]
    tokens = [entry for part in told[1:] for entry in part["logprobs"]["content"]]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    assert {part["finish_reason"] for part in told} == {None}
    assert last["choices"][0] | {"delta": {}} == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": whole["choices"][0]["finish_reason"],
    }
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len({part["id"] for part in (*parts, last, usage)}) == 1


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model_itself(client: TestClient, loaded: Loaded) -> None:
    model: Any = loaded.model
    texts = [loaded.tokenizer.decode([token]) for token in range(len(loaded.tokenizer))]

    def same_text(text: str) -> list[int]:
        return [token for token, other in enumerate(texts) if other == text]

    # A penalty and a temperature choose other tokens, and do not change what the model finds likely.
    for fields in ({}, {"temperature": 1.5, "repetition_penalty": 2, "seed": 3}):
        found = choice(client, logprobs=True, top_logprobs=5, max_tokens=15, **fields)
        ids = prompt_ids(loaded.tokenizer, MESSAGES)
        for entry in found["logprobs"]["content"]:
            row = torch.log_softmax(model(ids, use_cache=False).logits[0, -1].double(), -1)
            likeliest = [one["logprob"] for one in entry["top_logprobs"]]
            assert likeliest == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)
            # Several tokens show as the same text: parts of a character.
            named = [(abs(float(row[token]) - entry["logprob"]), token) for token in same_text(entry["token"])]
            difference, token = min(named)
            assert difference < 1e-3
            for one in entry["top_logprobs"]:
                own = [float(row[token]) for token in same_text(one["token"])]
                assert min(abs(logprob - one["logprob"]) for logprob in own) < 1e-3
            if "\ufffd" in entry["token"]:
                assert entry["bytes"] is None
            else:
                assert bytes(entry["bytes"]).decode() == entry["token"]
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert choice(client, max_tokens=2)["logprobs"] is None


def test_an_answer_ends_before_a_stop_sequence_and_at_its_limit(client: TestClient) -> None:
    whole = choice(client)  # the server's limit
    text = whole["message"]["content"]
    assert whole["finish_reason"] == "length"
    stop = text[5:8]
    ended = choice(client, stop=["not there", stop])
    assert ended["message"]["content"] == text[: text.index(stop)]
    assert ended["finish_reason"] == "stop"
    begun = choice(client, max_completion_tokens=3, logprobs=True)
    assert text.startswith(begun["message"]["content"].rstrip("\ufffd"))
    assert begun["finish_reason"] == "length"


def test_the_list_of_models(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/health").json() == {"status": "ok"}


def test_refusals_have_openai_s_form(client: TestClient, loaded: Loaded) -> None:
    def error(answered: Any, status: int) -> Any:
        assert answered.status_code == status
        assert answered.json()["error"].keys() == {"message", "type", "param", "code"}
        return answered.json()["error"]

    other = error(ask(client, model="gpt-4o"), 404)
    assert (other["code"], other["param"]) == ("model_not_found", "model")
    assert "'gpt-4o', which is not served here; give 'tiny'" in other["message"]
    assert error(client.get("/v1/models/gpt-4o"), 404)["code"] == "model_not_found"
    assert error(ask(client, tools=[{}], stream=True), 400)["param"] == "tools"
    assert "not valid JSON" in error(client.post(ROUTE, content=b"{"), 400)["message"]
    assert "1,000,000 are allowed" in error(client.post(ROUTE, content=b"x" * 1_000_001), 413)["message"]
    long = error(ask(client, messages=[{"role": "user", "content": "stars " * 9000}]), 400)
    assert (long["code"], long["param"]) == ("context_length_exceeded", "messages")
    assert "the model's context holds 8192" in long["message"]
    assert "POST /v1/chat/completions" in error(client.post("/v1/embeddings", json={}), 404)["message"]
    error(client.get(ROUTE), 405)
    foreign = client.post(ROUTE, json={}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_an_error_of_the_model_is_told(client: TestClient, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("a cable is loose")

    monkeypatch.setattr(type(loaded.model), "generate", broken)
    answered = ask(client)
    assert answered.status_code == 500
    assert "a cable is loose" in answered.json()["error"]["message"]
    last = ask(client, stream=True).text.strip().split("\n\n")[-1]
    assert "a cable is loose" in json.loads(last.removeprefix("data: "))["error"]["message"]
    monkeypatch.undo()
    assert choice(client)["message"]["content"]


def test_one_is_answered_some_wait_and_who_leaves_makes_room(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    # An answer without an end: what is interrupted must not end by itself.
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(type(loaded.tokenizer), "eos_token_id", None, raising=False)
    line = Line(loaded, waiting=1, answer_tokens=12)
    long = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8000, "stream": True}

    async def visit(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as visitor:
            async with visitor.stream("POST", ROUTE, json=long) as first:
                lines = first.aiter_lines()
                while "content" not in (text := await anext(lines)) or '"content": ""' in text:
                    pass
                waiting = asyncio.create_task(visitor.post(ROUTE, json=long | {"stream": False}))
                while len(line._answers) < 2:
                    await asyncio.sleep(0.01)
                full = await visitor.post(ROUTE, json=long)
                assert (full.status_code, full.headers["retry-after"]) == (503, "5")
                assert full.json()["error"]["code"] == "line_full"
                assert "the line is full, with 1 waiting" in full.json()["error"]["message"]
                # Somebody who waits goes away, and another one takes the place.
                waiting.cancel()
                while len(line._answers) > 1:
                    await asyncio.sleep(0.01)
                short = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3}
                next_one = asyncio.create_task(visitor.post(ROUTE, json=short))
                while len(line._answers) < 2:
                    await asyncio.sleep(0.01)
                assert not next_one.done()
            # The one that was answered is gone: the next one has its turn.
            answered = await asyncio.wait_for(next_one, 30)
            assert answered.json()["usage"]["completion_tokens"] == 3

    with listening(line) as address:
        asyncio.run(visit(address))
        wait_until(lambda: not line._answers, seconds=20)
