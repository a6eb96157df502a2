"""Decoding by the fused operators against transformers' own code on the same packed model, and what is saved after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import lbllm
from lbllm import kernels
from lbllm.checkpoints.decode import FusedForward, HalfHead
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.quant.kv_cache import PackedKVLayer
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

EVEN = {"hidden_size": 64, "intermediate_size": 96}  # rows of all layers are whole tiles
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "biases of queries, keys, values": ("qwen2", {}),
    "norms of queries and keys": ("qwen3", {}),
    "biases, an untied head": ("llama_bias", {}),
    "ragged groups, 8-bit parameters": ("llama", {"group_size": 20, "param_bits": 8, "act_bits": 8}),
    "ragged groups, 4-bit parameters": ("llama", {"group_size": 20, "param_bits": 4, "act_bits": 16}),
    "one bit, 4-bit parameters": ("qwen2", {"format": "w1", "group_size": 16, "param_bits": 4}),
    "one bit, activations as they are": ("llama", {"format": "w1", "act_bits": 16}),
    "keys and values in 16 bits": ("llama", {"act_bits": 16, "kv_bits": 16}),
    "keys and values in 16 bits, norms of them": ("qwen3", {"kv_bits": 16}),
    "keys and values in 8 bits": ("qwen2", {"kv_bits": 8}),
    "keys in groups of 16 tokens": ("llama", {"kv_group_size": 16, "kv_first": 2}),
    "ranges of 24 inputs": ("qwen2", {"act_group_size": 24, "param_bits": 4}),
    "ranges of 32 inputs, 8 bits": ("llama", {"act_group_size": 32, "act_bits": 8}),
    "whole tiles": ("llama", EVEN),
    "whole tiles, ranges of 32 inputs": ("llama", EVEN | {"act_group_size": 32}),
    "whole tiles, biases, one bit, a shorter last group": ("qwen2", EVEN | {"format": "w1", "group_size": 24}),
    "whole tiles, a layer of other groups": ("llama", EVEN | {"overrides": {"*k_proj": {"group_size": 20}}}),
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, changes = CASES[request.param]
    sizes = {name: value for name, value in changes.items() if name in EVEN}
    quant = {name: value for name, value in changes.items() if name not in EVEN}
    folder = tmp_path_factory.mktemp("decode")
    run_tiny(run_config(quant=quant), folder, tiny_teacher(architecture, **sizes))
    return folder / "checkpoint"


def count_fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that gets an entry whenever a token goes through the operator."""
    fused, usual = [], FusedForward._weights

    def counted(self: FusedForward) -> Any:
        fused.append(True)
        return usual(self)

    monkeypatch.setattr(FusedForward, "_weights", counted)
    return fused


@torch.no_grad()
def test_a_token_gives_what_transformers_code_gives(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lbllm.load(checkpoint)
    assert isinstance(model.model.forward, FusedForward)
    fused = count_fused(monkeypatch)
    ids = token_ids(1, seed=3)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    parted = []
    assert fused == []
    for place in range(20, 90):
        token = ids[:, place % ids.shape[1]][:, None]
        # From the same cache: a rounded code that falls on the other side would part the two for good.
        other = copy.deepcopy(cache)
        got = model(token, past_key_values=cache, use_cache=True).logits
        assert fused.pop()
        with monkeypatch.context() as patch:
            patch.setattr(FusedForward, "_cache_layers", lambda *_, **__: None)
            want = model(token, past_key_values=other, use_cache=True).logits
        assert fused == []
        assert cache.get_seq_length() == other.get_seq_length() == place + 1
        # A value on the border between two activation codes may fall to either side, rarely: then all after it differs.
        if float((got - want).abs().max()) > 1e-4 * float(want.abs().max()):
            parted.append(place)
            continue
        for mine, theirs in zip(cache.layers, other.layers, strict=True):
            for a, b in zip(mine.stores, theirs.stores, strict=True):
                assert (a[0] != b[0]).float().mean() < 0.01
                torch.testing.assert_close(a[1], b[1])
    assert len(parted) <= 3


@torch.no_grad()
def test_a_model_in_bfloat16_decodes_the_same_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lbllm.load(checkpoint, dtype=torch.bfloat16)
    cache = model(token_ids(1, seed=3), use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    got = model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits
    monkeypatch.setattr(FusedForward, "_cache_layers", lambda *_, **__: None)
    want = model(torch.tensor([[7]]), past_key_values=other, use_cache=True).logits
    assert got.dtype == want.dtype == torch.bfloat16
    # bfloat16 rounds so coarsely that a few 4-bit codes come out as their neighbours.
    assert float((got - want).float().norm() / want.float().norm()) < 0.5


@torch.no_grad()
def test_everything_else_takes_the_usual_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    ids = token_ids(2, seed=4)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cases: list[dict[str, Any]] = [
        {"inputs": ids[:1]},
        {"inputs": ids},
        {"inputs": ids, "attention_mask": mask},
        {"inputs": ids[:1], "num_beams": 2},
        {"inputs": ids[:1], "past_key_values": DynamicCache()},
    ]
    results = [model.generate(**options | copy.deepcopy(case)) for case in cases]
    monkeypatch.setattr(FusedForward, "_cache_layers", lambda *_, **__: None)
    for case, result in zip(cases, results, strict=True):
        assert torch.equal(model.generate(**options | copy.deepcopy(case)), result)


@torch.no_grad()
def test_sixteen_bits_are_what_float32_keeps_rounded_to_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.enable_grad():
        run_tiny(run_config(quant={"act_bits": 16, "kv_bits": 16}), tmp_path, tiny_teacher("llama"))
    model, _ = lbllm.load(tmp_path / "checkpoint")
    ids = token_ids(1, seed=3)
    made, given, whole = DynamicCache(config=model.config), DynamicCache(), model(ids, use_cache=True)
    for cache in (made, given):
        assert torch.equal(model(ids, past_key_values=cache).logits, whole.logits)
    with monkeypatch.context() as patch:
        patch.setattr(FusedForward, "_fits_here", lambda _: False)
        exact, want = model(ids, use_cache=True).past_key_values, model(ids).logits
    assert torch.equal(whole.logits, want)
    assert type(exact.layers[0]) is DynamicLayer
    for cache in (made, given, whole.past_key_values):
        for mine, theirs in zip(cache.layers, exact.layers, strict=True):
            for (values, _), kept in zip(mine.stores, (theirs.keys, theirs.values), strict=True):
                assert torch.equal(values, kept.half())
            assert 2 * mine.nbytes() == theirs.keys.nbytes + theirs.values.nbytes
    # A cache of one's own that is filled or that keeps other kinds of layers is left as it is.
    static = StaticCache(model.config, max_cache_len=64)
    for other in (exact, static):
        model(ids[:, -1:] if other is exact else ids, past_key_values=other)
        assert not any(isinstance(layer, PackedKVLayer) for layer in other.layers)
    first = model(ids[:, :4], use_cache=True).past_key_values
    steps = [model(ids[:, k : k + 1], past_key_values=first).logits for k in range(4, ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), want[:, 4:], rtol=0, atol=2e-3 * float(want.abs().max()))


@torch.no_grad()
def test_any_number_of_threads_gives_the_same(checkpoint: Path) -> None:
    model, _ = lbllm.load(checkpoint)
    ids = token_ids(1, seed=3)
    prompt = model(ids[:, :20], use_cache=True).past_key_values
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            cache = copy.deepcopy(prompt)
            logits = [model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits for k in range(20, 30)]
            results.append(torch.cat(logits))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.no_grad()
def test_tokens_taken_back_are_decoded_anew(checkpoint: Path) -> None:
    model, _ = lbllm.load(checkpoint)
    ids = token_ids(1, seed=3)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    first = [model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits for k in range(8, 12)]
    cache.crop(-3)
    assert cache.get_seq_length() == 9
    again = [model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits for k in range(9, 12)]
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again, strict=True))


@torch.no_grad()
def test_a_hook_on_a_block_and_a_window_are_respected(checkpoint: Path) -> None:
    model, _ = lbllm.load(checkpoint)
    cache = model(token_ids(1, seed=3), use_cache=True).past_key_values
    fused = model.model.forward
    token = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
    assert fused._cache_layers(**token) is not None
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    model(**token, use_cache=True)
    assert seen == [1]
    handle.remove()
    model.config.sliding_window = 8
    assert fused._cache_layers(**token) is None


@torch.no_grad()
def test_a_loaded_model_can_be_converted_and_asked_for_all_states(checkpoint: Path) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    cache = model(token_ids(1, seed=3), use_cache=True).past_key_values
    output = model(torch.tensor([[7]]), past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == len(model.model.layers) + 1
    for dtype in (torch.float16, torch.bfloat16):
        model = model.to(dtype)
        cache = model(token_ids(1, seed=3), use_cache=True).past_key_values
        assert bool(model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits.isfinite().all())


@torch.no_grad()
def test_a_model_that_has_answered_is_saved_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    assert isinstance(model.lm_head.forward, HalfHead)
    model.generate(token_ids(1, seed=3)[:, :8], max_new_tokens=4)
    assert all(block.self_attn.q_proj.words is not None for block in model.model.layers)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / WEIGHTS) for folder in (checkpoint, tmp_path))
    assert before.keys() == after.keys()
    # The file may hold in 32 bits what it held in 16: the values are the same.
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    twin = copy.deepcopy(model)
    assert twin.model.forward.decoder is twin.model


@torch.no_grad()
def test_the_output_head_in_bfloat16_gives_the_same_logits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lbllm.load(checkpoint)
    assert kernels.ready()
    assert model.lm_head.weight.dtype == torch.bfloat16
    hidden = model.config.hidden_size
    for shape in ((1, 1, hidden), (3, hidden), (2, 40, hidden)):
        x = torch.randn(shape)
        expected = x.double() @ model.lm_head.weight.double().t()
        torch.testing.assert_close(model.lm_head(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert model.get_input_embeddings()(token_ids(1, seed=3)).dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr("lbllm.kernels.ready", lambda: False)
        torch.testing.assert_close(model.lm_head(x).double(), expected, rtol=1e-5, atol=1e-5)
