"""Streaming answers: text, measurements, seeds, stops."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from lbllm.chat.stream import Messages, prompt_ids, stream
from lbllm.errors import ModelError
from tests.helpers.tiny_models import tiny

QUESTION: Messages = [{"role": "user", "content": "What is the capital of France?"}]


def answer(architecture: str = "llama", **changes: object) -> str:
    model, tokenizer = tiny(architecture)
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0} | changes
    return "".join(piece.text for piece in stream(model, tokenizer, QUESTION, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_answer_is_that_of_generate(architecture: str) -> None:
    model: Any
    model, tokenizer = tiny(architecture)
    ids = prompt_ids(tokenizer, QUESTION)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer(architecture, temperature=0.0) == expected


@torch.no_grad()
def test_what_the_answer_has_already_becomes_less_likely() -> None:
    model, tokenizer = tiny("llama")
    prompt = prompt_ids(tokenizer, QUESTION)[0].tolist()
    written: list[int] = []
    while len(written) < 20 and tokenizer.eos_token_id not in written:
        logits = model(input_ids=torch.tensor([prompt + written])).logits[0, -1].double()
        for token in set(written):  # of the answer, not of the prompt
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        written.append(int(logits.argmax()))
    found = answer(temperature=0.0, repetition_penalty=1.5)
    assert found == tokenizer.decode(written, skip_special_tokens=True)
    assert found != answer(temperature=0.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_answer_goes_on_from_its_beginning(architecture: str) -> None:
    model: Any
    model, tokenizer = tiny(architecture)
    begun = "The capital city"
    ids = torch.cat(
        [prompt_ids(tokenizer, QUESTION), tokenizer(begun, add_special_tokens=False, return_tensors="pt")["input_ids"]],
        1,
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    expected = str(tokenizer.decode(output[0, -20:], skip_special_tokens=True))
    assert begun + answer(architecture, temperature=0.0, begun=begun) == begun + expected
    # What the beginning has already counts as written by the answer.
    assert answer(architecture, temperature=0.0, begun=begun, repetition_penalty=9.0) != expected


def test_pieces_carry_measurements() -> None:
    model, tokenizer = tiny("llama")
    pieces = list(stream(model, tokenizer, QUESTION, max_new_tokens=12, temperature=0.0, top_p=1.0, seed=0))
    assert pieces[-1].tokens <= 12
    assert pieces[-1].first_token_seconds > 0
    assert pieces[-1].tokens_per_second > 0
    assert [piece.tokens for piece in pieces] == sorted(piece.tokens for piece in pieces)


def test_a_seed_repeats_its_answer_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first = answer(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert answer(seed=1) == first
    assert answer(seed=2) != first


def test_sampling_follows_the_models_distribution() -> None:
    model, tokenizer = tiny("llama")
    with torch.no_grad():
        logits = model(input_ids=prompt_ids(tokenizer, QUESTION)).logits[0, -1]
    probabilities = torch.softmax(logits / 0.5, -1)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(probabilities))]
    best = texts[int(probabilities.argmax())]
    # Several tokens show as the same text: parts of a character, special ones.
    expected = float(sum(p for p, text in zip(probabilities, texts, strict=True) if text == best))
    drawn = 0
    runs = 200
    for seed in range(runs):
        pieces = stream(model, tokenizer, QUESTION, max_new_tokens=1, temperature=0.5, top_p=1.0, seed=seed)
        drawn += "".join(piece.text for piece in pieces) == best
    assert abs(drawn / runs - expected) < 4 * (expected * (1 - expected) / runs) ** 0.5 + 0.01


def test_a_small_top_p_is_greedy() -> None:
    assert answer(top_p=1e-6) == answer(temperature=0.0)


def test_stop_ends_generation_between_tokens() -> None:
    model, tokenizer = tiny("gpt2")
    stop = threading.Event()
    tokens = 0
    for piece in stream(model, tokenizer, QUESTION, max_new_tokens=200, temperature=1.0, top_p=1.0, seed=0, stop=stop):
        stop.set()
        tokens = piece.tokens
    assert tokens < 200


def test_closing_the_iterator_ends_its_thread() -> None:
    model, tokenizer = tiny("gpt2")
    pieces = stream(model, tokenizer, QUESTION, max_new_tokens=200, temperature=1.0, top_p=1.0, seed=0)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while any(thread.name == "lbllm-chat" for thread in threading.enumerate()):
        assert time.monotonic() < deadline


def test_characters_arrive_whole() -> None:
    model, tokenizer = tiny("llama")
    pieces = list(stream(model, tokenizer, QUESTION, max_new_tokens=60, temperature=2.0, top_p=1.0, seed=3))
    assert not any(piece.text.endswith("\ufffd") for piece in pieces[:-1])


def test_an_answer_ends_at_the_context_length() -> None:
    model, tokenizer = tiny("gpt2", n_positions=64)
    length = prompt_ids(tokenizer, QUESTION).shape[1]
    pieces = list(stream(model, tokenizer, QUESTION, max_new_tokens=500, temperature=1.0, top_p=1.0, seed=0))
    assert pieces[-1].tokens <= 64 - length
    long: Messages = [{"role": "user", "content": "stars " * 100}]
    with pytest.raises(ModelError, match="context holds 64"):
        list(stream(model, tokenizer, long, max_new_tokens=5, temperature=0.0, top_p=1.0, seed=0))


def test_prompts_of_chat_and_base_models() -> None:
    _, chat = tiny("llama")
    _, base = tiny("gpt2")
    assert str(chat.decode(prompt_ids(chat, QUESTION)[0])).endswith("<|start|>assistant\n")
    assert base.decode(prompt_ids(base, QUESTION)[0]) == QUESTION[0]["content"]
    with pytest.raises(ModelError, match="empty"):
        prompt_ids(base, [{"role": "user", "content": ""}])


def test_errors_of_the_model_reach_the_reader() -> None:
    model, tokenizer = tiny("llama")
    model.model.norm = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        list(stream(model, tokenizer, QUESTION, max_new_tokens=5, temperature=0.0, top_p=1.0, seed=0))
