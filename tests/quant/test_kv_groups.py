"""The KV cache with keys in groups: layers against a reference in NumPy, and whole models one token at a time."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import lbllm
from lbllm import kernels
from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.errors import ConfigError
from lbllm.events import RunDone
from lbllm.microscope.activations import cache
from lbllm.microscope.hybrid import FirstBlocks, hybrid
from lbllm.models.blocks import capture_calls, decoder_blocks, first_inputs, run_block
from lbllm.pipeline.packed_model import stage_model
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.kv_groups import GroupedKVLayer, TrainingGroupedKVLayer, training_cache
from lbllm.quant.model_cache import GroupedLayers
from lbllm.sections import STAGES, QuantConfig
from tests.helpers.cases import cases
from tests.helpers.tiny_models import tiny
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.helpers.tiny_pairs import tiny_pair as tiny_views
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

TEXT = "The old mill by the river grinds the wheat of four villages, and the miller knows every sack."
SMALL = KVFormat(4, 4, 1)


def states(tokens: int, dim: int, seed: int) -> Tensor:
    """Keys or values (2, 3, tokens, dim), float32, with a large channel and a large first token."""
    x = torch.randn(2, 3, tokens, dim, generator=torch.Generator().manual_seed(seed))
    x[..., 0] += 20
    x[:, :, :1] *= 30
    return x


def rounded(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Asymmetric rounding with minimum and step in float16, in float64."""
    low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float64)
    step = ((x.max(axis, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    step = np.maximum(step, 2.0**-22)
    return np.clip(np.round((x - low) / step), 0, 2**bits - 1) * step + low


def reference(x: Tensor, kv: KVFormat, position: int, *, keys: bool) -> np.ndarray:
    """What the token at a position sees of the tokens up to itself."""
    found = x[:, :, : position + 1].half().double().numpy()
    for start in range(kv.first, position - kv.group_size + 1, kv.group_size):
        group = slice(start, start + kv.group_size)
        found[:, :, group] = rounded(found[:, :, group], kv.bits, 2 if keys else 3)
    return found


def pieces(tokens: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, tokens, *(cut % tokens for cut in cuts)})
    return list(pairwise(edges))


FORMATS = st.builds(KVFormat, st.sampled_from([4, 8]), st.integers(1, 6), st.integers(0, 3))


@given(FORMATS, st.integers(1, 25), st.integers(2, 7), st.lists(st.integers(0, 24), max_size=6), st.integers(0, 99))
@cases(30)
def test_the_last_token_sees_the_reference_however_the_cache_is_filled(
    kv: KVFormat, tokens: int, dim: int, cuts: list[int], seed: int
) -> None:
    both = states(tokens, dim, seed), states(tokens, dim + 1, seed + 1)
    layer, whole = GroupedKVLayer(kv), GroupedKVLayer(kv)
    for begin, end in pieces(tokens, cuts):
        layer.update(*(x[:, :, begin:end] for x in both))
    whole.update(*both)
    assert all(torch.equal(a, b) for a, b in zip(layer.decoded(), whole.decoded(), strict=True))
    for x, found, keys in zip(both, layer.decoded(), (True, False), strict=True):
        want = reference(x, kv, tokens - 1, keys=keys)
        # A value in the middle between two steps may fall to either side in float32.
        off = np.abs(found.double().numpy() - want) > 1e-3 * np.abs(want).max()
        assert off.mean() < 0.01


def test_bits_of_a_value_are_those_that_are_stored() -> None:
    kv, tokens = KVFormat(4, 8, 2), 45
    layer = GroupedKVLayer(kv)
    layer.update(states(tokens, 16, 0), states(tokens, 16, 1))
    # Half a byte for each code, four bytes for each channel of a group and for each token's values; two first tokens,
    # 40 in groups and 3 after them in 16 bits, in a place for 10.
    groups = 2 * 3 * (40 * 16 + 5 * 16 * 4 + 40 * 4)
    assert layer.nbytes() == groups + 2 * 2 * 3 * 10 * 16 * 2
    assert kv.bits_per_value(16, tokens) == pytest.approx((8 * groups / (2 * 2 * 3 * 16) + 16 * 5) / tokens)
    assert KVFormat(4).bits_per_value(64, tokens) == 4.5
    assert KVFormat(16).bits_per_value(64, tokens) == 16


def test_a_cropped_cache_keeps_what_its_tokens_were() -> None:
    keys, values = states(12, 6, 0), states(12, 6, 1)
    layer = GroupedKVLayer(SMALL)
    layer.update(keys, values)
    before = layer.decoded()
    layer.crop(-1)
    assert layer.get_seq_length() == 11
    assert all(torch.equal(a, b[:, :, :11]) for a, b in zip(layer.decoded(), before, strict=True))
    layer.crop(-4)  # into the second group, whose rounded values stay
    for got, want in zip(layer.decoded(), before, strict=True):
        assert torch.equal(got, torch.cat((want[:, :, :5], want[:, :, 5:7].half().float()), 2))
    layer.update(keys[:, :, 7:], values[:, :, 7:])
    for got, want in zip(layer.decoded(), before, strict=True):
        assert torch.equal(got[:, :, :5], want[:, :, :5])
        assert float((got - want).abs().max()) < 0.2 * float(want.abs().max())
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes()) == (0, 0)
    layer.update(keys, values)
    assert all(torch.equal(a, b) for a, b in zip(layer.decoded(), before, strict=True))


def test_sequences_are_reordered_repeated_and_selected() -> None:
    keys, values = states(12, 6, 0), states(12, 6, 1)
    layer = GroupedKVLayer(SMALL)
    layer.update(keys, values)
    before = layer.decoded()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer = pickle.loads(pickle.dumps(layer))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(layer.decoded(), before, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_rounding_straight_through(training: bool) -> None:
    keys = states(9, 6, 0).requires_grad_()
    values = states(9, 6, 1).requires_grad_()
    kv = KVFormat(8, 4, 1)
    layer = TrainingGroupedKVLayer(kv) if training else GroupedKVLayer(kv)
    layer.update(keys, values)
    assert layer.seen is not None
    kept = layer.seen.take()
    sum(part.sum() for part in kept).backward()  # type: ignore[union-attr]
    for states_, part in ((keys, kept[0]), (values, kept[1])):
        assert states_.grad is not None
        assert part.shape[2] == 5
        assert float((states_.grad[:, :, :5] == 1).float().mean()) > 0.6
        assert not states_.grad[:, :, 5:].any()


# Whole models.

QUANT = {"group_size": 16, "act_bits": 16, "kv_group_size": 8}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quant = QuantConfig.model_validate(QUANT | ({"kv_bits": 8, "kv_first": 0} if request.param == "qwen3" else {}))
    return tiny_checkpoint(tmp_path_factory.mktemp("groups"), request.param, quant)[0]


def text(tokens: int, rows: int = 1) -> Tensor:
    return token_ids(rows, seed=3).repeat(1, 4)[:, :tokens]


@torch.no_grad()
def test_a_prompt_gives_what_its_tokens_give_one_by_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    ids = text(40)
    want = model(ids, use_cache=False).logits
    for fused in (True, False):
        monkeypatch.setattr(kernels, "ready", kernels.ready if fused else lambda: False)
        kept = DynamicCache()
        parts = [model(ids[:, :3], past_key_values=kept).logits, model(ids[:, 3:14], past_key_values=kept).logits]
        parts += [model(ids[:, k : k + 1], past_key_values=kept).logits for k in range(14, 40)]
        got = torch.cat(parts, 1)
        # A value in the middle between two steps may fall to either side.
        assert float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median()) < 1e-4
        assert float((got - want).norm() / want.norm()) < 0.02
    # Another text after the same group sees the same group.
    other = ids.clone()
    other[:, 30:] = other[:, :10]
    assert torch.equal(model(other).logits[:, :30], want[:, :30])


@torch.no_grad()
def test_padding_after_a_text_changes_nothing(checkpoint: Path) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    ids = text(30, rows=2)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, :20], model(ids[:1, :20]).logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(padded[1:], model(ids[1:]).logits, rtol=1e-3, atol=1e-4)


def test_another_attention_is_refused(checkpoint: Path) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(ConfigError, match="attention does not read"):
        model(text(20))
    model.set_attn_implementation("lbllm_groups")
    with torch.no_grad():
        model(text(20))
    dense, _ = tiny("llama")
    dense.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=r"quant\.kv_group_size .* to -1"):
        attach_kv_cache(dense, SMALL)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_training_of_a_block_and_of_a_model_sees_what_the_cache_gives(architecture: str) -> None:
    kv = KVFormat(4, 8, 1)
    models = [tiny(architecture)[0] for _ in range(3)]
    ids = text(30, rows=2)
    for model, training in zip(models, (False, True), strict=False):
        attach_kv_cache(model, kv, training=training)
    want = models[0](ids).logits
    torch.testing.assert_close(models[1](ids).logits, want)
    assert float((models[2](ids).logits - want).norm() / want.norm()) > 1e-4
    plain = models[2]
    calls, hidden = capture_calls(plain, ids[:1]), first_inputs(plain, ids, 2)
    rounding = training_cache(kv)
    for block, call in zip(decoder_blocks(plain)[1], calls, strict=True):
        hidden = run_block(block, hidden, call, rounding)
    torch.testing.assert_close(plain.lm_head(plain.model.norm(hidden)), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_with_convolutions_keeps_their_states_too() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["conv", "full_attention"]
    config = AutoConfig.for_model("lfm2", vocab_size=320, num_hidden_layers=2, layer_types=kinds, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    attach_kv_cache(model, KVFormat(8, 8, 1))
    ids = text(24)
    want = model(ids, use_cache=True)
    kept = model(ids[:, :20], use_cache=True).past_key_values
    assert [isinstance(layer, GroupedKVLayer) for layer in kept.layers] == [False, True]
    got = torch.cat([model(ids[:, k : k + 1], past_key_values=kept).logits for k in range(20, 24)], 1)
    torch.testing.assert_close(got, want.logits[:, 20:], rtol=1e-2, atol=1e-3)
    layer = GroupedLayers(SMALL).hybrid(1)
    layer.update(states(12, 6, 0), states(12, 6, 1))  # type: ignore[attr-defined]
    assert isinstance(layer, GroupedKVLayer)
    assert layer.get_seq_length() == 12


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_microscope_shows_what_the_last_token_sees(architecture: str) -> None:
    pair = tiny_views(architecture, kv_group_size=8)
    block = pair.blocks - 1
    with torch.no_grad():
        output: Any = copy.deepcopy(pair.student.model)(input_ids=pair.ids(TEXT)[0], use_cache=True)
    view = cache(pair, block, TEXT)
    assert "over 8 tokens" in view.words
    layer = output.past_key_values.layers[block]
    for part, stored in zip((view.keys, view.values), layer.decoded(), strict=True):
        torch.testing.assert_close(part.stored, stored[0])
        assert part.error > 0
    # A model with the teacher's first block keeps the bits in the other one.
    made: Any = hybrid(pair, FirstBlocks(1))
    with torch.no_grad():
        assert made(input_ids=pair.ids(TEXT)[0], use_cache=False).logits.isfinite().all()


def test_all_stages_train_with_it_and_the_checkpoint_gives_what_the_last_one_measured(tmp_path: Path) -> None:
    quant = {"kv_group_size": 8, "act_bits": 16}
    once = {"tokens": 64, "batch_tokens": 32, "epochs": 1}
    config = run_config(stages=STAGES, quant=quant, e2e=once)
    events = run_tiny(config, tmp_path, tiny_teacher("llama"))
    assert isinstance(events[-1], RunDone)
    assert "lbllm_groups" not in (tmp_path / "checkpoint" / "config.json").read_text()
    ids = text(40)
    stored, other = lbllm.load(tmp_path / "checkpoint")[0], stage_model(config, tmp_path, "e2e", tiny_teacher("llama"))
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-3)
    stored.save_pretrained(tmp_path / "again")
    assert "lbllm_groups" not in (tmp_path / "again" / "config.json").read_text()
