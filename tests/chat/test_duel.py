"""Models in the pool, two answers at once, what each model is given."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lbllm.chat.conversation import Conversation
from lbllm.chat.duel import Duel, Side
from lbllm.chat.pool import ModelPool, Slot
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import Messages, stream
from lbllm.errors import LbllmError
from tests.helpers import waiting
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

QUESTION: Messages = [{"role": "user", "content": "What is the capital of France?"}]
SHORT = ChatSettings(max_new_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A chat model, a base model and a packed checkpoint of the chat model."""
    root = tmp_path_factory.mktemp("models")
    run_tiny(run_config(stages=("ptq", "wat", "aar")), root / "run", tiny_teacher("llama"))
    return {
        "chat": str(save_tiny(root / "chat", "llama")),
        "base": str(save_tiny(root / "base", "gpt2")),
        "packed": str(root / "run" / "checkpoint"),
    }


def ready(slot: Slot) -> Slot:
    assert slot.wait(60)
    assert slot.error == ""
    return slot


def finished(duel: Duel) -> Duel:
    assert duel.wait(60)
    return duel


wait_until = partial(waiting.wait_until, seconds=20.0)


def test_all_who_ask_for_a_model_get_the_same_one(folders: dict[str, str]) -> None:
    pool = ModelPool()
    slots: list[Slot] = []
    threads = [threading.Thread(target=lambda: slots.append(pool.get(folders["chat"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(slot) for slot in slots}) == 1
    loaded = ready(slots[0]).loaded
    assert loaded.is_chat
    assert not loaded.packed
    assert loaded.weight_bytes == 4 * loaded.weights
    assert loaded.bpw == 32


def test_a_model_goes_with_the_last_who_holds_it(folders: dict[str, str]) -> None:
    pool = ModelPool()
    mine, yours = pool.get(folders["chat"]), pool.get(folders["chat"])
    model = weakref.ref(ready(mine).loaded.model)
    del mine
    gc.collect()
    assert model() is yours.loaded.model
    del yours
    other = ready(pool.get(folders["base"]))
    wait_until(lambda: gc.collect() is not None and model() is None)
    assert pool.names() == [other.name]


def test_packed_weights_answer_the_same_without_kernels(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, texts = [], []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("lbllm.kernels.ready", lambda: False)
        loaded = ready(ModelPool().get(folders["packed"])).loaded
        pieces = stream(loaded.model, loaded.tokenizer, QUESTION, max_new_tokens=16, seed=1)
        texts.append("".join(piece.text for piece in pieces))
        models.append(loaded)
    small, fast = models
    assert small.packed
    assert small.expanded_bytes == 0
    assert fast.expanded_bytes > 0
    assert fast.weight_bytes == small.weight_bytes
    assert fast.bpw == small.bpw > 2
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({}, "groups of 16"),
        (
            {"*.down_proj": {"group_size": 8}, "*.q_proj": {"group_size": -1}},
            "groups of 16 and 8 and whole rows",
        ),
    ],
)
def test_a_packed_model_says_all_its_group_sizes(tmp_path: Path, overrides: dict[str, Any], words: str) -> None:
    run_tiny(run_config(stages=["ptq"], quant={"overrides": overrides}), tmp_path, tiny_teacher("llama"))
    loaded = ready(ModelPool().get(str(tmp_path / "checkpoint"))).loaded
    assert loaded is not None
    assert loaded.precision.partition(", ")[2] == words


def test_a_failed_load_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    pool = ModelPool()
    folder = tmp_path / "model"
    slot = pool.get(str(folder))
    assert slot.wait(60)
    assert slot.state == "failed"
    assert "does not exist" in slot.error
    with pytest.raises(LbllmError, match="does not exist"):
        slot.loaded  # noqa: B018 - the access is what is tested
    save_tiny(folder, "llama")
    assert ready(pool.get(str(folder))).state == "ready"


def test_a_model_too_large_for_the_memory_is_refused(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm.chat.pool.free_memory", lambda device: 1000)
    slot = ModelPool().get(folders["chat"])
    assert slot.wait(60)
    assert "are free" in slot.error
    assert "smaller model" in slot.error


def test_both_answers_are_those_each_model_gives_alone(folders: dict[str, str]) -> None:
    pool = ModelPool()
    slots = [ready(pool.get(folders[name])) for name in ("chat", "packed")]
    alone = [
        "".join(
            piece.text
            for piece in stream(
                slot.loaded.model, slot.loaded.tokenizer, QUESTION, max_new_tokens=12, temperature=1.0, seed=0
            )
        )
        for slot in slots
    ]
    for timed in (False, True):
        duel = finished(Duel((Side(slots[0], QUESTION, SHORT), Side(slots[1], QUESTION, SHORT)), timed=timed))
        assert [answer.text for answer in duel.answers] == alone
        assert [answer.state for answer in duel.answers] == ["done", "done"]
        for answer, slot in zip(duel.answers, slots, strict=True):
            assert answer.timed == timed
            assert 0 < answer.tokens <= 12
            assert answer.first_token_seconds > 0
            assert (answer.bpw, answer.weight_bytes) == (slot.loaded.bpw, slot.loaded.weight_bytes)


def test_one_model_serves_both_sides_under_two_settings(folders: dict[str, str]) -> None:
    slot = ready(ModelPool().get(folders["packed"]))
    other = SHORT.model_copy(update={"seed": 5})
    duels = [finished(Duel((Side(slot, QUESTION, SHORT), Side(slot, QUESTION, other)))) for _ in range(2)]
    texts = [[answer.text for answer in duel.answers] for duel in duels]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_timed_answers_come_one_after_the_other(folders: dict[str, str]) -> None:
    slot = ready(ModelPool().get(folders["chat"]))
    side = Side(slot, QUESTION, ChatSettings(max_new_tokens=30))
    duel = Duel((side, side), timed=True)
    while not duel.over:
        left, right = duel.answers
        assert left.over or right.state == "waiting"
        time.sleep(0.001)
    finished(duel)


def test_an_answer_that_the_limit_cuts_off_says_so(folders: dict[str, str]) -> None:
    slot = ready(ModelPool().get(folders["chat"]))
    model, tokenizer = slot.loaded.model, slot.loaded.tokenizer
    messages = [{"role": "user", "content": "Why?"}]
    tokenizer.eos_token = None
    # No token ends an answer; then each of them does.
    for ends, cut in ((None, 3), (list(range(len(tokenizer))), 0)):
        assert model.generation_config is not None
        model.generation_config.eos_token_id = ends
        side = Side(slot, messages, ChatSettings(max_new_tokens=3 if ends is None else 1))
        assert [answer.cut for answer in finished(Duel((side, side))).answers] == [cut, cut]


def test_stop_ends_both_after_the_token_in_work(folders: dict[str, str]) -> None:
    pool = ModelPool()
    settings = ChatSettings(max_new_tokens=4096, temperature=2.0)
    slot = ready(pool.get(folders["base"]))
    duel = Duel((Side(slot, QUESTION, settings), Side(slot, QUESTION, settings)), timed=False)
    wait_until(lambda: all(answer.tokens for answer in duel.answers))
    counts = [answer.tokens for answer in duel.answers]
    duel.stop()
    finished(duel)
    for answer, before in zip(duel.answers, counts, strict=True):
        assert answer.state == "stopped" or answer.tokens < before + 20
    assert not any(thread.name == "lbllm-chat" for thread in threading.enumerate())


def test_answers_wait_for_their_models_and_one_may_fail(folders: dict[str, str], tmp_path: Path) -> None:
    pool = ModelPool()
    good, bad = pool.get(folders["chat"]), pool.get(str(tmp_path / "nothing"))
    duel = finished(Duel((Side(good, QUESTION, SHORT), Side(bad, QUESTION, SHORT))))
    assert duel.answers[0].state == "done"
    assert duel.answers[1].state == "failed"
    assert "does not exist" in duel.answers[1].error


def test_stopping_does_not_wait_for_a_model() -> None:
    slot = Slot("never loaded")
    duel = Duel((Side(slot, QUESTION, SHORT), Side(slot, QUESTION, SHORT)), timed=True)
    duel.stop()
    assert duel.wait(5)
    assert [answer.state for answer in duel.answers] == ["stopped", "stopped"]


def test_each_model_remembers_its_own_answers(folders: dict[str, str]) -> None:
    pool = ModelPool()
    slots = (ready(pool.get(folders["chat"])), ready(pool.get(folders["packed"])))
    talk = Conversation()
    settings = SHORT.model_copy(update={"system": "Be brief."})
    first = talk.ask("One?", slots, ("a", "b"), (settings, settings))
    finished(first.duel)
    second = talk.ask("Two?", slots, ("a", "c"), (settings, SHORT))
    finished(second.duel)
    assert talk.messages(second, 0) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first.answers[0].text},
        {"role": "user", "content": "Two?"},
    ]
    # Another model than the one that answered before, and no system prompt.
    assert talk.messages(second, 1) == [{"role": "user", "content": "Two?"}]
    assert talk.drop_last() == "Two?"
    talk.clear()
    assert not talk.exchanges
    assert not talk.running


def test_both_go_on_from_a_chosen_beginning_and_the_old_answers_come_back(folders: dict[str, str]) -> None:
    pool = ModelPool()
    slots = (ready(pool.get(folders["chat"])), ready(pool.get(folders["packed"])))
    talk = Conversation()
    first = talk.ask("One?", slots, ("a", "b"), (SHORT, SHORT))
    finished(first.duel)
    second = talk.go_on("Paris is", slots)
    finished(second.duel)
    assert talk.exchanges == [second]
    assert talk.messages(second, 0) == [{"role": "user", "content": "One?"}]
    for slot, found in zip(slots, second.answers, strict=True):
        alone = stream(
            slot.loaded.model,
            slot.loaded.tokenizer,
            [{"role": "user", "content": "One?"}],
            max_new_tokens=12,
            temperature=1.0,
            seed=SHORT.seed,
            begun="Paris is",
        )
        assert found.text == "Paris is" + "".join(piece.text for piece in alone)
        assert found.tokens <= 12
    talk.back()
    assert talk.exchanges == [first]
    talk.back()
    assert talk.exchanges == [first]


def test_a_model_without_template_goes_on_with_the_prompt_alone(folders: dict[str, str]) -> None:
    pool = ModelPool()
    chat, base = ready(pool.get(folders["chat"])), ready(pool.get(folders["base"]))
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    plain = SHORT.model_copy(update={"template": False})
    duel = finished(Duel((Side(base, messages, SHORT), Side(chat, messages, plain))))
    for answer, slot in zip(duel.answers, (base, chat), strict=True):
        alone = stream(
            slot.loaded.model,
            slot.loaded.tokenizer,
            QUESTION,
            max_new_tokens=12,
            temperature=1.0,
            seed=0,
            template=False,
        )
        assert answer.completes
        assert answer.text == "".join(piece.text for piece in alone)
