"""The effect of a change on a text against the definitions, and the answers of hybrids."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from benchmarks.architectures import tiny_of
from lbllm.chat.lens import lens
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import prompt_ids
from lbllm.errors import ConfigError, ModelError
from lbllm.microscope.costs import costs
from lbllm.microscope.effect import Effect, answer, effect
from lbllm.microscope.hybrid import Choice, Dense, Edited, FirstBlocks, Only, hybrid
from lbllm.microscope.pair import Pair
from tests.helpers import ROOT
from tests.helpers.tiny_models import SENTENCES, tiny_tokenizer
from tests.helpers.tiny_pairs import pair_of, tiny_pair

TEXT = SENTENCES[0]
CHOICES: list[Choice] = [FirstBlocks(0), FirstBlocks(1), FirstBlocks(2), Dense(1), Only(0, "self_attn.v_proj")]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return tiny_pair(request.param)


@torch.no_grad()
def check(pair: Pair, found: Effect, ids: Any) -> None:
    log_p = torch.log_softmax(pair.teacher.model(input_ids=ids).logits[0].double(), -1)
    models = (pair.teacher.model, pair.student.model, hybrid(pair, found.choice))
    for model, reading in zip(models, (found.teacher, found.student, found.hybrid), strict=True):
        log_q = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[:-1]
        # An input on the border of two steps can take the other one.
        assert reading.token_kl == pytest.approx(kl.tolist(), rel=0.02, abs=1e-4)
        assert reading.kl == pytest.approx(sum(reading.token_kl) / len(reading.token_kl))
        nll = -log_q[:-1].gather(1, ids[0, 1:, None]).mean()
        assert reading.perplexity == pytest.approx(math.exp(nll), rel=1e-3)
        values = log_q[-1].exp().topk(5).values.tolist()
        assert [one.probability for one in reading.next] == pytest.approx(values, rel=0.02)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_it_is_what_the_definitions_say(pair: Pair, choice: Choice) -> None:
    ids, _ = pair.ids(TEXT)
    found = effect(pair, choice, TEXT)
    check(pair, found, ids)
    assert "".join(found.pieces) == TEXT
    assert found.left_out == 0
    assert found.teacher.kl == 0
    assert found.choice == choice


@pytest.mark.parametrize("kind", ["bloom", "lfm2", "mamba2"])
def test_models_unlike_llama_have_effects_and_costs(kind: str) -> None:
    """Alibi for each sequence; states of convolutions; no keys and values at all."""
    pair = pair_of(tiny_of(kind), tiny_tokenizer())
    for choice in (FirstBlocks(1), Dense(1), Only(0)):
        check(pair, effect(pair, choice, TEXT), pair.ids(TEXT)[0])
    layer = pair.binarized[1][0]
    (cost,) = (cost for cost in costs(pair, TEXT, blocks=[1]) if cost.layer == layer)
    assert cost.kl == pytest.approx(effect(pair, Only(1, layer), TEXT).hybrid.kl, rel=0.01, abs=1e-7)


def test_it_agrees_with_the_lens(pair: Pair) -> None:
    wanted = lens(pair.teacher.model, pair.student.model, pair.tokenizer, TEXT)
    found = effect(pair, Dense(0), TEXT).student
    assert found.token_kl == pytest.approx([token.kl for token in wanted.tokens[1:]], rel=0.02, abs=1e-4)


def test_the_ends_are_the_two_models_exactly(pair: Pair) -> None:
    none, every = (effect(pair, FirstBlocks(count), TEXT) for count in (0, pair.blocks))
    assert none.hybrid == none.teacher
    assert every.hybrid == every.student
    assert (none.returned, every.returned) == (1.0, 0.0)
    assert every.student.kl > 0


def test_a_change_in_the_middle_is_computed_from_there_on(pair: Pair) -> None:
    """Each second effect starts from hidden states that the first one left."""
    again = tiny_pair("llama") if pair.path == "model.layers" and pair.blocks == 2 else tiny_pair("gemma3")
    for choice in (Dense(1), Only(1), Edited("1/mlp.down_proj/0/0", (-1.0, 0.0, 0.5, 1.0))):
        first = effect(pair, choice, TEXT)
        assert effect(pair, choice, TEXT).hybrid == first.hybrid
        assert effect(again, choice, TEXT).hybrid == first.hybrid


def test_a_group_that_is_changed_back_changes_nothing(pair: Pair) -> None:
    before = effect(pair, FirstBlocks(pair.blocks), TEXT).hybrid
    assert effect(pair, Edited("1/mlp.down_proj/0/0", (-9.0, -3.0, 3.0, 9.0)), TEXT).hybrid != before
    assert effect(pair, FirstBlocks(pair.blocks), TEXT).hybrid == before


def test_long_texts_are_cut_and_say_so(pair: Pair) -> None:
    found = effect(pair, Dense(0), [5, 9] * 200)
    assert (len(found.pieces), found.left_out) == (256, 144)
    found = effect(pair, Dense(0), TEXT, limit=17)  # one more than the rows that are computed at once
    check(pair, found, pair.ids(TEXT, 17)[0])
    assert len(found.hybrid.token_kl) == 16


def test_what_can_not_be_read_or_changed_is_said(pair: Pair) -> None:
    with pytest.raises(ModelError, match="the text has 1 token"):
        effect(pair, Dense(0), "a")
    with pytest.raises(ConfigError, match="there is no block 9"):
        effect(pair, Dense(9), TEXT)
    with pytest.raises(ConfigError, match="choose 0 to"):
        answer(pair, FirstBlocks(9), [{"role": "user", "content": TEXT}])


def test_an_answer_is_the_hybrids(pair: Pair) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    settings = ChatSettings(temperature=0, repetition_penalty=1, max_new_tokens=6)
    ids = prompt_ids(pair.tokenizer, messages)
    for choice in (FirstBlocks(0), FirstBlocks(1), Only(1)):
        made: Any = hybrid(pair, choice)
        wanted = made.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        text = "".join(piece.text for piece in answer(pair, choice, messages, settings))
        assert text == pair.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


def test_threads_share_a_pair() -> None:
    pair = tiny_pair("llama")
    wanted = {choice: effect(tiny_pair("llama"), choice, TEXT).hybrid for choice in CHOICES}
    results: list[bool] = []

    def work(order: list[Choice]) -> None:
        results.extend(effect(pair, choice, TEXT).hybrid == wanted[choice] for choice in order)

    threads = [threading.Thread(target=work, args=(order,)) for order in (CHOICES, CHOICES[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 2 * len(CHOICES)


MEASURE = """
from pathlib import Path
from lbllm.chat.pool import ModelPool
from lbllm.microscope.effect import answer, effect
from lbllm.microscope.hybrid import Bits, Dense, Edited, FirstBlocks, Only
from lbllm.microscope.pair import Pair
from lbllm.sections import LayerFormat

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1000

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    print(f"{status('VmHWM') - before:.1f}", flush=True)

pool = ModelPool()
slots = [pool.get(name) for name in ("smollm2-135m-instruct", "shipped")]
for slot in slots:
    slot.wait()
pair = Pair(*(slot.loaded for slot in slots))
ids = list(range(1000, 1032))
for loaded in (pair.teacher, pair.student):
    loaded.model(pair.ids(ids)[0])
last, block = pair.layers[-1], pair.blocks // 2
fmt = LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=16)
levels = (-0.5, -0.25, 0.25, 0.5)
for choice in (
    FirstBlocks(block), Dense(0), Only(0, last), Dense(pair.blocks - 1, last), Only(), Bits(0, last, 3),
    Bits(0, last, 8), Bits(0, last, fmt), Edited(f"0/{last}/5/7", levels),
):
    peak(lambda: effect(pair, choice, ids))
"""


@pytest.mark.soak
def test_a_change_to_the_embedded_model_needs_little_memory() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    megabytes = [float(line) for line in run.stdout.splitlines()]
    assert len(megabytes) == 9
    assert max(megabytes) <= 50, run.stdout
