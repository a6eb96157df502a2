"""Embeddings and output heads in 8, 6 and 4 bits: layout, rounding, and modules and operators against float64."""

from __future__ import annotations

import copy
import pickle
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lbllm import kernels
from lbllm.errors import ConfigError, ModelError
from lbllm.quant import embedding_code
from lbllm.quant.embedding_code import (
    GROUPS,
    is_rounding_of,
    pack_matrix,
    pack_rows,
    round_matrix,
    row_bytes,
    unpack_rows,
)
from lbllm.quant.packed_embedding import PackedEmbedding, PackedHead, PackedTable, replace_tables, tables, weight_count
from lbllm.sections import EmbeddingBits, QuantConfig
from tests.helpers.cases import cases
from tests.helpers.tiny_models import tiny

PACKED: tuple[EmbeddingBits, ...] = (8, 6, 4)


def random_rows(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8


def unpacked_by_hand(packed: Tensor, bits: EmbeddingBits, columns: int) -> list[list[float]]:
    """The weights as the layout describes them, one by one."""
    group, rows = GROUPS[bits], []
    size = 2 + group * bits // 8
    for row in packed.tolist():
        weights = []
        for column in range(columns):
            part = bytes(row[column // group * size :][:size])
            scale, codes, j = float(np.frombuffer(part[:2], "<f2")[0]), part[2:], column % group
            if bits == 8:
                level = codes[j] - 256 * (codes[j] > 127)
            elif bits == 6:
                high = codes[32 + j % 16] >> (j // 16 * 2) & 3
                level = (codes[j % 32] >> (j // 32 * 4) & 15) + 16 * high - 32
            else:
                level = embedding_code.LEVELS_4[codes[j % 16] >> (j // 16 * 4) & 15]
            weights.append(scale * level)
        rows.append(weights)
    return rows


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("columns", [1, 31, 64, 90])
def test_rows_have_the_layout_that_is_described(bits: EmbeddingBits, columns: int) -> None:
    packed = torch.randint(0, 256, (5, row_bytes(columns, bits)), generator=torch.Generator().manual_seed(1))
    packed = packed.to(torch.uint8)
    packed[:, 1 :: 2 + GROUPS[bits] * bits // 8] &= 0x3B  # finite scales
    expected = torch.tensor(unpacked_by_hand(packed, bits, columns), dtype=torch.float64)
    assert torch.equal(unpack_rows(packed, bits, columns, None).double(), expected)
    scale = torch.linspace(0.5, 2, columns).half()
    scaled = (expected.float() * scale.float()).double()
    assert torch.equal(unpack_rows(packed, bits, columns, scale).double(), scaled)
    if kernels.ready():
        numbers = torch.tensor([4, 0, 0, 3])
        assert torch.equal(torch.ops.lbllm.embedding_rows(packed, numbers, bits, columns).double(), expected[numbers])


def test_eight_bits_are_the_blocks_of_gguf_files() -> None:
    weights = random_rows(40, 96).numpy()
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    exact = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0).copy())
    packed = pack_rows(exact, 8, None)
    assert torch.equal(packed, torch.from_numpy(blocks.copy()))
    assert torch.equal(unpack_rows(packed, 8, 96, None), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)


@pytest.mark.random
@given(
    bits=st.sampled_from(PACKED),
    columns=st.integers(1, 140),
    seed=st.integers(0, 10**6),
    power=st.integers(-8, 8),
)
@cases(15)
def test_the_rounding_is_as_good_as_the_nearest_level(bits: EmbeddingBits, columns: int, seed: int, power: int) -> None:
    """No group has a larger squared error than with its largest weight at the last level, in float64."""
    rows = random_rows(3, columns, seed) * 2.0**power
    packed, scale = pack_matrix(rows.__getitem__, (3, columns), bits)
    columns_scale = torch.ones(columns, dtype=torch.float64) if scale is None else scale.double()

    def grouped(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, -columns % GROUPS[bits])).unflatten(-1, (-1, GROUPS[bits]))

    relative = grouped(rows.double() / columns_scale)
    levels = {8: range(-127, 128), 6: range(-32, 32), 4: embedding_code.LEVELS_4}[bits]
    known = torch.tensor(levels, dtype=torch.float64)
    largest = relative.gather(-1, relative.abs().argmax(-1, keepdim=True))
    unit = largest.where(largest != 0, torch.ones_like(largest)) / float(known.max())
    nearest = known[(relative / unit - known[:, None, None, None]).abs().argmin(0)] * unit
    squares = grouped(columns_scale.square())
    bound = (squares * (nearest - relative).square()).sum(-1)
    rounded = unpack_rows(packed, bits, columns, scale).double()
    error = grouped((rounded - rows.double()).square()).sum(-1)
    size = grouped(rows.double().square()).sum(-1)
    assert bool((error <= bound * 1.02 + size * 1e-5 + 1e-14 * 4.0**power).all())
    assert is_rounding_of(packed, rows, bits, scale)
    assert not is_rounding_of(packed, random_rows(3, columns, seed + 1) * 2.0**power, bits, scale)


def test_weights_that_no_scale_can_hold_are_refused() -> None:
    for bad in (float("nan"), float("inf"), 1e9):
        rows = random_rows(2, 40)
        rows[1, 7] = bad
        for bits in PACKED:
            with pytest.raises(ModelError, match=rf"too large for {bits} bits; set quant\.embedding_bits to 16"):
                pack_matrix(rows.__getitem__, (2, 40), bits)
    assert torch.equal(round_matrix(torch.zeros(2, 40), 4), torch.zeros(2, 40))


def head_of(rows: int, columns: int, bits: EmbeddingBits, *, bias: bool = False) -> PackedHead:
    weights = random_rows(rows, columns)
    head = PackedHead(rows, columns, bits, torch.float32, bias=bias).pack(lambda part: weights[part])
    if head.bias is not None:
        head.bias.data.copy_(random_rows(1, rows)[0])
    return head


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("bits", PACKED)
def test_a_head_gives_the_logits_of_its_unpacked_rows(
    bits: EmbeddingBits, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.ready()
    monkeypatch.setattr(kernels, "ready", lambda: by_kernels)
    for rows, columns in ((70, 64), (33, 90)):
        head = head_of(rows, columns, bits, bias=True)
        weight = head.unpack(slice(0, rows)).double()
        assert head.bias is not None
        for shape in ((columns,), (1, 1, columns), (3, columns), (8, columns), (2, 6, columns), (0, columns)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            expected = x.double() @ weight.t() + head.bias.double()
            torch.testing.assert_close(head(x).double(), expected, rtol=1e-5, atol=1e-5)
            assert head(x.bfloat16()).dtype == torch.bfloat16
        x = torch.randn(2, 5, columns, dtype=torch.float64, requires_grad=True)
        head(x).square().sum().backward()
        reference = x.detach().clone().requires_grad_()
        (reference @ weight.t() + head.bias.double()).square().sum().backward()
        torch.testing.assert_close(x.grad, reference.grad)


@pytest.mark.parametrize("bits", PACKED)
def test_an_embedding_gives_the_rows_of_tokens(bits: EmbeddingBits, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_rows(50, 48)
    made = PackedEmbedding(50, 48, bits, torch.float32, 3.0).pack(lambda part: weights[part])
    ids = torch.tensor([[3, 49], [0, 3]])
    expected = 3 * round_matrix(weights, bits)[ids]
    assert torch.equal(made(ids), expected)
    assert made.bfloat16()(ids).dtype == torch.bfloat16
    with pytest.raises(IndexError, match="no row 50 of 50"):
        made(torch.tensor([50]))
    monkeypatch.setattr(kernels, "ready", lambda: False)
    assert torch.equal(made.float()(ids), expected)


@pytest.mark.parametrize("architecture", ["llama", "llama_bias", "gemma3", "opt", "gpt2", "gpt_neox"])
def test_a_model_with_packed_tables_answers_like_one_with_rounded_weights(architecture: str) -> None:
    model, _ = tiny(architecture)
    parts, count = tables(model), sum(parameter.numel() for parameter in model.parameters())
    tied = len({id(part.weight) for part in parts.values()}) == 1
    packed, untouched = copy.deepcopy(model), copy.deepcopy(model)
    replace_tables(packed, QuantConfig(embedding_bits=6))
    for name, made in tables(packed).items():
        assert isinstance(made, PackedTable)
        own, rounded = untouched.get_submodule(name), model.get_submodule(name)
        assert isinstance(own.weight, Tensor)
        assert isinstance(rounded.weight, Tensor)
        made.pack(own.weight.detach().__getitem__)
        if isinstance(made, PackedHead) and made.bias is not None:
            made.bias.data.copy_(own.bias)  # type: ignore[arg-type]
        rounded.weight.data.copy_(round_matrix(own.weight.detach(), 6))
    assert len({id(part.weight) for part in tables(packed).values()}) == (1 if tied else 2)
    assert weight_count(packed) == count
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        for one in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            torch.testing.assert_close(one(ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert len({id(part.weight) for part in tables(one).values()}) == (1 if tied else 2)


def test_a_module_of_another_kind_is_refused_by_its_name() -> None:
    class Other(nn.Embedding):
        pass

    model, _ = tiny("llama")
    model.set_input_embeddings(Other(320, 48))
    with pytest.raises(ConfigError, match=r"embed_tokens is a Other, .* \(Embedding bits\) to 16"):
        replace_tables(model, QuantConfig(embedding_bits=4))


def test_every_number_of_bits_has_a_group() -> None:
    assert set(get_args(EmbeddingBits)) == {16, *GROUPS}
