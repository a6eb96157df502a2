"""Embeddings of few bits in stage 4: gradients of their scales, and what is stored of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lbllm.quant.embedding_code import GROUPS, group_scales, pack_matrix, unpack_rows, with_group_scales
from lbllm.sections import EmbeddingBits
from lbllm.stages.trained_table import LEAST, MOST, TrainedTable
from tests.helpers.cases import cases

FEW: tuple[EmbeddingBits, ...] = (6, 4)


def table(
    bits: EmbeddingBits, rows: int = 9, columns: int = 70, seed: int = 0
) -> tuple[TrainedTable, nn.Embedding, nn.Linear]:
    """A table of random weights, with embeddings in float32 and a head in bfloat16 that have its values."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    embeddings, head = nn.Embedding(rows, columns), nn.Linear(columns, rows, bias=False).bfloat16()
    made = TrainedTable(pack_matrix(weight.__getitem__, (rows, columns), bits), bits, columns, [embeddings, head])
    return made, embeddings, head


@cases(20)
@given(rows=st.integers(1, 12), columns=st.integers(1, 140), bits=st.sampled_from(FEW), seed=st.integers(0, 99))
def test_the_gradient_of_each_scale_is_that_of_its_weights(
    rows: int, columns: int, bits: EmbeddingBits, seed: int
) -> None:
    made, embeddings, head = table(bits, rows, columns, seed)
    made.expand()
    start = unpack_rows(made.packed.weight, bits, columns, made.packed.scale)
    assert torch.equal(embeddings.weight, start)
    assert torch.equal(head.weight, start.bfloat16())
    torch.manual_seed(seed)
    ids, upstream = torch.randint(rows, (5,)), torch.randn(5, columns)
    logits = head(embeddings(ids).bfloat16())
    ((embeddings(ids) * upstream).sum() + logits.float().square().sum()).backward()
    grads = [weight.grad.double() for weight in (embeddings.weight, head.weight) if weight.grad is not None]
    made.collect()
    factors = torch.ones(made.factors.shape, dtype=torch.float64, requires_grad=True)
    size = GROUPS[bits]
    for row in range(rows):
        for column in range(columns):
            total = sum(float(grad[row, column]) for grad in grads)
            (factors[row, column // size] * float(start[row, column]) * total).backward()
    assert made.factors.grad is not None
    assert factors.grad is not None
    torch.testing.assert_close(made.factors.grad.double(), factors.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", FEW)
def test_what_is_frozen_is_what_was_trained_in_float16(bits: EmbeddingBits) -> None:
    made, embeddings, _ = table(bits)
    before, columns = made.packed, made.packed.scale
    with torch.no_grad():
        made.factors.copy_(torch.linspace(0.5, 1.5, made.factors.numel()).view_as(made.factors))
    made.bound()
    factors = made.factors.detach().clone()
    assert float(factors.min()) == pytest.approx(LEAST)
    assert float(factors.max()) == pytest.approx(MOST)
    made.expand()
    trained = embeddings.weight.detach().clone()
    made.freeze()
    made.expand()
    torch.testing.assert_close(embeddings.weight, trained, rtol=2**-10, atol=1e-7)
    assert torch.equal(embeddings.weight, unpack_rows(made.packed.weight, bits, 70, columns))
    assert torch.equal(made.packed.scale, columns)  # type: ignore[arg-type]
    wanted = (group_scales(before.weight, bits) * factors).half().float()
    assert torch.equal(group_scales(made.packed.weight, bits), wanted)
    # The codes are the same: with the old scales it is the old matrix.
    again = with_group_scales(made.packed.weight, bits, group_scales(before.weight, bits))
    assert torch.equal(again, before.weight)


def test_without_text_nothing_is_learned() -> None:
    made, _, _ = table(4)
    made.expand()
    made.collect()
    assert made.factors.grad is None
