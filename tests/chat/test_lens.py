"""The lens against the definition of KL, its tokens against the text; where two answers part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.chat.lens import STEPS, TOP, first_difference, lens, same_vocabulary, step_labels
from lbllm.chat.stream import Messages, prompt_ids
from lbllm.errors import ModelError
from tests.helpers.tiny_models import SENTENCES, tiny, tiny_tokenizer

QUESTION: Messages = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize("messages", [None, QUESTION])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_token_has_the_divergence_of_the_whole_vocabulary(architecture: str, messages: Messages | None) -> None:
    teacher, tokenizer = tiny(architecture)
    student, _ = tiny(architecture, seed=1)
    text = SENTENCES[0]
    found = lens(teacher, student, tokenizer, text, messages=messages)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    before = prompt_ids(tokenizer, messages) if messages else ids[:, :0]
    whole = torch.cat([before, ids], 1)
    with torch.no_grad():
        log_p, log_q = (torch.log_softmax(model(input_ids=whole).logits[0], -1) for model in (teacher, student))
    assert len(found.tokens) == ids.shape[1]
    assert "".join(token.text for token in found.tokens) == text
    for number, token in enumerate(found.tokens):
        place = before.shape[1] + number - 1
        if place < 0:
            assert token.kl is None
            assert not token.teacher
            continue
        kl = torch.nn.functional.kl_div(log_q[place], log_p[place], reduction="sum", log_target=True)
        assert token.kl == pytest.approx(float(kl), abs=1e-5)
        own = int(whole[0, place + 1])
        assert token.teacher_probability == pytest.approx(float(log_p[place, own].exp()), rel=1e-4)
        assert token.student_probability == pytest.approx(float(log_q[place, own].exp()), rel=1e-4)
        values = log_p[place].exp().topk(TOP).values.tolist()
        assert [candidate.probability for candidate in token.teacher] == pytest.approx(values, rel=1e-4)
    assert found.mean_kl > 0
    assert 0 <= found.agreement <= 1


def test_a_model_beside_itself_has_no_divergence() -> None:
    model, tokenizer = tiny("llama")
    found = lens(model, model, tokenizer, SENTENCES[1], messages=QUESTION)
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert {token.step for token in found.tokens} == {0}


def test_characters_of_several_tokens_stay_whole() -> None:
    model, tokenizer = tiny("llama")
    text = "Ein Bär, 水 und 🙂 am Ende ü"
    found = lens(model, model, tokenizer, text)
    assert "".join(token.text for token in found.tokens) == text
    assert not any("\ufffd" in token.text for token in found.tokens)


def test_long_texts_are_cut_and_say_so() -> None:
    model, tokenizer = tiny("llama")
    text = SENTENCES[2] * 20
    every = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert every > 256
    cut = lens(model, model, tokenizer, text, limit=10)
    assert (len(cut.tokens), cut.left_out) == (10, every - 10)
    # The context of 256 tokens ends a text as well, and the conversation before takes its share.
    assert len(lens(model, model, tokenizer, text).tokens) == 256
    with pytest.raises(ModelError, match="fills the models' context"):
        lens(model, model, tokenizer, text, messages=[{"role": "user", "content": text}])


def test_what_can_not_be_compared_is_refused() -> None:
    model, tokenizer = tiny("llama")
    other, _ = tiny("llama", vocab_size=400)
    with pytest.raises(ModelError, match="320 and 400"):
        lens(model, other, tokenizer, "text")
    with pytest.raises(ModelError, match="empty"):
        lens(model, model, tokenizer, "")


def test_vocabularies() -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(chat=False)
    assert same_vocabulary(tokenizer, other)
    other.add_tokens(["<|more|>"])
    assert not same_vocabulary(tokenizer, other)


def test_every_step_has_a_label() -> None:
    assert len(step_labels()) == len(STEPS) + 1
    assert list(STEPS) == sorted(STEPS)


@pytest.mark.parametrize(
    ("left", "right", "position"),
    [
        ("The sky is blue", "The sky is grey", 11),
        ("The sky", "The sky", None),
        ("The sky", "The sky is", 7),
        ("The sky", "The skyline", 4),
        ("The sky is", "The skyline", 4),
        ("Blue", "Green", 0),
        ("Yes.", "Yes!", 0),
        ("a\nb", "a\nc", 2),
        ("", "word", 0),
        ("", "", None),
    ],
)
def test_answers_part_at_a_whole_word(left: str, right: str, position: int | None) -> None:
    assert first_difference(left, right) == position
    assert first_difference(right, left) == position


@given(st.text(alphabet="ab \n", max_size=12), st.text(alphabet="ab \n", max_size=12))
def test_nothing_before_the_difference_differs(left: str, right: str) -> None:
    position = first_difference(left, right)
    if position is None:
        assert left == right
    else:
        assert left[:position] == right[:position]
        assert left[position:] != right[position:]
