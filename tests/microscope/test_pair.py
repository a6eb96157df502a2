"""Which two models make a pair, and which texts and places there are."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from lbllm.errors import ConfigError, ModelError
from lbllm.microscope.pair import Pair
from lbllm.microscope.passes import Memo
from tests.helpers.tiny_models import SENTENCES, VOCABULARY, tiny
from tests.helpers.tiny_pairs import as_loaded, tiny_pair, tiny_student


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair("llama", skip=("*.0.mlp.up_proj",))


def test_it_says_what_is_binarized(pair: Pair) -> None:
    assert (pair.blocks, pair.path, len(pair.layers)) == (2, "model.layers", 7)
    assert pair.binarized[1] == tuple(pair.layers)
    assert pair.binarized[0] == tuple(name for name in pair.layers if name != "mlp.up_proj")
    assert pair.places(None, "mlp.up_proj") == [(1, "mlp.up_proj")]
    assert len(pair.places(None, None)) == 13


def test_a_text_is_read_as_the_chat_reads_it(pair: Pair) -> None:
    ids, left_out = pair.ids(SENTENCES[0])
    assert pair.tokenizer.decode(ids[0].tolist()) == SENTENCES[0]
    assert left_out == 0
    assert [tuple(part.shape) if isinstance(part, torch.Tensor) else part for part in pair.ids(SENTENCES[0], 5)] == [
        (1, 5),
        ids.shape[1] - 5,
    ]
    # The context of the tiny models.
    assert pair.ids([5] * 300)[0].shape == (1, 256)
    assert torch.equal(pair.ids(ids)[0], ids)
    assert torch.equal(pair.ids(ids[0].tolist())[0], ids)


@pytest.mark.parametrize("text", ["a", [7], torch.tensor([[7]])])
def test_a_text_of_one_token_is_refused(pair: Pair, text: Any) -> None:
    with pytest.raises(ModelError, match=r"the text has 1 token; .* write at least two words"):
        pair.ids(text)


def test_other_texts_that_can_not_be_read(pair: Pair) -> None:
    with pytest.raises(ModelError, match="empty"):
        pair.ids("")
    with pytest.raises(ModelError, match=f"embeddings have {VOCABULARY} rows"):
        pair.ids([1, VOCABULARY])
    with pytest.raises(ModelError, match="-1 is not the id of a token"):
        pair.ids([1, -1])


def test_places_that_are_not_there(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="there is no block 2; the blocks are 0 to 1"):
        pair.check(2)
    with pytest.raises(ConfigError, match="there is no block -1"):
        pair.check(-1)
    with pytest.raises(ConfigError, match=r"its layers are self_attn\.q_proj, "):
        pair.check(1, "self_attn")


def loaded(architecture: str, *, packed: bool, **changes: Any) -> Any:
    model, tokenizer = tiny(architecture, **changes)
    return as_loaded(tiny_student(model) if packed else model, tokenizer, packed=packed)


@pytest.mark.parametrize(
    ("teacher", "student", "words"),
    [
        ({}, {"vocab_size": 400}, "different vocabularies (320 and 400 tokens)"),
        ({}, {"seed": 1}, "the student was made from another teacher"),
        ({"num_hidden_layers": 1}, {}, "the student has more blocks than the teacher, which has 1"),
        ({"num_hidden_layers": 3}, {}, "the layer 2/self_attn.q_proj of shape (48, 48) in the teacher is missing"),
        ({"intermediate_size": 64}, {}, "of shape (64, 48) in the teacher is of shape (90, 48) in the student"),
        ({"hidden_size": 64}, {}, "another teacher"),
    ],
)
def test_models_that_do_not_belong_together(teacher: Any, student: Any, words: str) -> None:
    left, right = loaded("llama", packed=False, **teacher), loaded("llama", packed=True, **student)
    if "num_hidden_layers" in teacher:  # the same embeddings, although the weights are drawn in another order
        left.model.set_input_embeddings(right.model.get_input_embeddings())
    elif "intermediate_size" in teacher:
        left.model.get_input_embeddings().weight.data.copy_(right.model.get_input_embeddings().weight)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        Pair(left, right)
    assert "choose a student and the teacher it was made from" in str(caught.value)


def test_two_of_a_kind_are_no_pair(pair: Pair) -> None:
    with pytest.raises(ModelError, match="the student has no binarized layer"):
        Pair(pair.teacher, pair.teacher)
    with pytest.raises(ModelError, match="the teacher is a packed checkpoint"):
        Pair(pair.student, pair.student)


def test_another_tokenizer_of_the_same_size_is_refused(pair: Pair) -> None:
    _, tokenizer = tiny("llama")
    tokenizer.add_tokens(["<|more|>"])
    with pytest.raises(ModelError, match="different vocabularies"):
        Pair(pair.teacher, dataclasses.replace(pair.student, tokenizer=tokenizer))


def test_the_latest_results_are_kept_within_their_size() -> None:
    memo, made = Memo(18), []

    def ask(key: str, size: int) -> str:
        def make() -> str:
            made.append(key)
            return key * 2

        return memo.get(key, make, lambda _: size)

    assert [ask(key, 3) for key in "abcdef" * 2] == [key * 2 for key in "abcdef"] * 2
    assert made == [*"abcdef"]
    ask("a", 3)  # used later than b
    ask("g", 3)
    ask("h", 3)
    ask("a", 3)
    assert made == [*"abcdefgh"]
    ask("b", 3)
    assert made[-1] == "b"
    # Those of one text stay, whatever their size.
    for key in "vwxyz" * 2:
        ask(key, 100)
    assert made[9:] == [*"vwxyz"]
