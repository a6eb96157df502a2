"""Attention by products against attention written out in float64, and whole models with it against those without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lbllm.models.blocks import share_copy
from lbllm.stages import attention
from tests.helpers.cases import cases
from tests.helpers.tiny_models import DENSE_ARCHITECTURES, VOCABULARY, tiny


def written_out(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(b, T, h, d), one query after the other."""
    batch, heads, tokens, _ = query.shape
    rows = []
    for one in range(batch):
        for head in range(heads):
            shared = head * key.shape[1] // heads
            for token in range(tokens):
                scores = scaling * key[one, shared, : token + 1] @ query[one, head, token]
                rows.append(scores.softmax(0) @ value[one, shared, : token + 1])
    return torch.stack(rows).view(batch, heads, tokens, -1).transpose(1, 2)


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32))
@cases(30)
def test_it_is_causal_attention_and_so_are_its_gradients(
    batch: int, shared: int, each: int, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, tokens, width) for heads, width in ((shared * each, 4), (shared, 4), (shared, 6))]
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    weight = torch.randn(batch, tokens, shared * each, 6, generator=generator, dtype=torch.float64)
    found, _ = attention.causal_attention(nn.Module(), *inputs, None, scaling=1 / math.sqrt(3))
    wanted = written_out(*inputs, 1 / math.sqrt(3))
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_under_autocast_it_computes_in_bfloat16_whatever_it_is_given() -> None:
    """The rotary embedding makes queries and keys float32 there, values stay bfloat16."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 20, 8, generator=generator) for heads in (4, 2, 2))
    inputs = (query.requires_grad_(), key.requires_grad_(), value.bfloat16().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = attention.causal_attention(nn.Module(), *inputs, None, scaling=0.3)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    exact = [one.detach().double().requires_grad_() for one in inputs]
    wanted = written_out(exact[0], exact[1], exact[2], 0.3)
    wanted.square().sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)
    for mine, theirs in zip(inputs, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == mine.dtype
        assert float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 0.03


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
@torch.no_grad()
def test_a_model_gives_the_same_with_it(architecture: str) -> None:
    model, _ = tiny(architecture)
    other = share_copy(model)
    attention.attend_by_products(other)
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    for mask in (None, torch.ones(2, 24).index_fill_(1, torch.tensor([0, 1]), 0)):
        logits = [one(input_ids=ids, attention_mask=mask, use_cache=False).logits for one in (model, other)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation != attention.NAME


def test_windows_and_decoding_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are for a whole text; a token over a cache, and a given mask, take the usual way."""
    model, _ = tiny("llama")
    attention.attend_by_products(model)
    used: list[int] = []
    apply = attention._CausalAttention.apply

    def counted(*args: Any) -> Any:
        used.append(1)
        return apply(*args)

    monkeypatch.setattr(attention._CausalAttention, "apply", counted)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True)
        layers = len(used)
        assert layers == model.config.num_hidden_layers
        next_ = model(input_ids=torch.tensor([[10]]), past_key_values=whole.past_key_values).logits
        assert len(used) == layers
        again = model(input_ids=torch.arange(11)[None], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(next_, again, rtol=1e-4, atol=1e-4)
