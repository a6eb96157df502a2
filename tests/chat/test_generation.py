"""A model's own generation settings in a chat: ends and forbidden tokens count, what a chat can't use is left aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.chat.stream import Messages, prompt_ids, stream
from lbllm.models.teacher import load_teacher
from tests.helpers.tiny_models import save_tiny

QUESTION: Messages = [{"role": "user", "content": "What is it?"}]
UNUSABLE: dict[str, Any] = {
    "num_return_sequences": 2,
    "cache_implementation": "static",
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "prompt_lookup_num_tokens": 3,
    "max_length": 5,
    "max_new_tokens": 2,
    "min_length": 500,
    "max_time": 0.0,
    "temperature": 0.5,
    "top_k": 1,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "guidance_scale": 3.0,
    "forced_eos_token_id": 7,
    "forced_bos_token_id": 7,
    "token_healing": True,
    "assistant_early_exit": 1,
    "use_cache": False,
    "output_scores": True,
    "return_dict_in_generate": True,
    "watermarking_config": {"greenlist_ratio": 0.5},
    "cache_config": {"nbits": 4},
    "is_assistant": True,
    "encoder_repetition_penalty": 2.0,
    "low_memory": True,
}
WRONG: tuple[Any, ...] = ("x", -1, [], [["x"]], {"a": 1}, 2.5, True, [10**9], [-1], [[5, 10**30]], [""], 10**30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), "llama")


def loaded(folder: Path, content: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    (folder / "generation_config.json").write_text(content)
    teacher = load_teacher(str(folder))
    return teacher.model, teacher.tokenizer


def answer(folder: Path, content: str = "{}", **options: Any) -> str:
    options = {"max_new_tokens": 16, "temperature": 0.0, "repetition_penalty": 1.0} | options
    return "".join(piece.text for piece in stream(*loaded(folder, content), QUESTION, **options))


def test_what_a_chat_cannot_use_is_left_aside(folder: Path, tmp_path: Path) -> None:
    plain = answer(folder)
    for settings in (UNUSABLE, UNUSABLE | {"do_sample": True}):
        model, tokenizer = loaded(folder, json.dumps(settings))
        pieces = stream(model, tokenizer, QUESTION, max_new_tokens=16, temperature=0.0, repetition_penalty=1.0)
        assert "".join(piece.text for piece in pieces) == plain
        model.save_pretrained(tmp_path / "saved")  # the model keeps what it came with
    stated = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (stated["num_return_sequences"], stated["cache_implementation"]) == (2, "static")


@pytest.mark.parametrize("content", ["[]", "null", "{", '"x"', "\x00", "[" * 5_000, '{"max_new_tokens": -1}'])
def test_damaged_settings_do_not_stop_a_model(content: str, folder: Path) -> None:
    assert answer(folder, content) == answer(folder)


@pytest.mark.parametrize(
    "name",
    [
        "stop_strings",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "sequence_bias",
        "eos_token_id",
        "no_repeat_ngram_size",
        "min_new_tokens",
        "exponential_decay_length_penalty",
        "pad_token_id",
    ],
)
def test_values_that_cannot_work_are_left_aside(name: str, folder: Path) -> None:
    model, tokenizer = loaded(folder, "{}")
    for value in WRONG:
        assert model.generation_config is not None
        setattr(model.generation_config, name, value)
        assert list(stream(model, tokenizer, QUESTION, max_new_tokens=1, temperature=0.0)), (name, value)


def test_stop_strings_end_an_answer(folder: Path) -> None:
    plain = answer(folder)
    stop = "b"
    for content in (json.dumps({"stop_strings": [stop]}), json.dumps({"stop_strings": stop})):
        model: Any
        model, tokenizer = loaded(folder, content)
        ids = prompt_ids(tokenizer, QUESTION)
        asked = {"max_new_tokens": 16, "do_sample": False, "tokenizer": tokenizer, "pad_token_id": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        wanted = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found = answer(folder, content)
        assert found == wanted
        assert plain.startswith(found)
        assert stop in found
        assert len(found) < len(plain)


def test_forbidden_tokens_stay_forbidden(folder: Path) -> None:
    model, tokenizer = loaded(folder, "{}")
    first = next(iter(stream(model, tokenizer, QUESTION, max_new_tokens=1, temperature=0.0)))
    ids = prompt_ids(tokenizer, QUESTION)
    with torch.no_grad():
        token = int(model(ids).logits[0, -1].argmax())
    for settings in ({"suppress_tokens": [token]}, {"begin_suppress_tokens": [token]}, {"bad_words_ids": [[token]]}):
        assert answer(folder, json.dumps(settings), max_new_tokens=1) != first.text


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_the_cache_is_used_whatever_the_files_say(place: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", "llama")
    stated = json.loads((folder / place).read_text())
    (folder / place).write_text(json.dumps(stated | {"use_cache": False}))
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    teacher = load_teacher(str(folder))
    lengths: list[int] = []
    teacher.model.get_input_embeddings().register_forward_hook(lambda module, args, _: lengths.append(args[0].shape[1]))
    list(stream(teacher.model, teacher.tokenizer, QUESTION, max_new_tokens=6, temperature=0.0))
    assert lengths[1:] == [1] * 5


def test_halves_of_characters_become_question_marks(folder: Path) -> None:
    model, tokenizer = loaded(folder, "{}")
    for talk, template in ((QUESTION, True), (QUESTION, False)):
        broken = [talk[0] | {"content": "a\ud800b\udcff"}]
        whole = [talk[0] | {"content": "a?b?"}]
        assert torch.equal(
            prompt_ids(tokenizer, broken, template=template), prompt_ids(tokenizer, whole, template=template)
        )
        assert list(stream(model, tokenizer, broken, max_new_tokens=1, template=template))
