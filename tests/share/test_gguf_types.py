"""Packed layers in llama.cpp's types: as the gguf package reads them, they are nearer to the packed weights than
those of a converter, and what does not fit is refused with the length of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.hf import load
from lbllm.commands.main import main
from lbllm.errors import ConfigError, ModelError
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import Format, LayerFormat, QuantConfig
from lbllm.share.export import export
from lbllm.share.gguf_names import SHAPES, GgufType
from lbllm.share.gguf_size import gguf_sizes
from lbllm.share.gguf_types import pack_layer, stored_matrices
from tests.helpers.cases import cases
from tests.helpers.tiny_packed import packed_layer, tiny_checkpoint

TYPES: tuple[GgufType, ...] = ("q8_0", "q5_1", "q5_k", "q4_1", "q4_k")
# What the error of groups of 16 may be, relative to the weights.
WITHIN = {"q8_0": 0.006, "q5_1": 0.03, "q5_k": 0.035, "q4_1": 0.06, "q4_k": 0.065}


def layer_of(rows: int, columns: int, seed: int = 0, **fmt: Any) -> PackedLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(columns, rows, bias=False)
    stated = {"format": "w1+1", "group_size": 16, "param_bits": 4, "act_bits": 16, "act_group_size": -1} | fmt
    return packed_layer(layer, LayerFormat(**stated), QuantConfig())


def read(blocks: torch.Tensor, kind: GgufType) -> NDArray[np.float32]:
    """The weights that the blocks stand for, by the gguf package."""
    found: NDArray[np.float32] = gguf.quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind.upper()])
    return found


def error(found: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - weight) / np.linalg.norm(weight.astype(np.float64)))


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_hold_the_packed_weights(kind: GgufType) -> None:
    layer = layer_of(24, 512)
    weight = layer.dequantize().numpy()
    found = error(read(pack_layer(layer, kind), kind), weight)
    assert found < WITHIN[kind]
    with_ends = gguf.quants.quantize(
        weight, GGMLQuantizationType[{"q5_k": "Q5_1", "q4_k": "Q4_1"}.get(kind, kind.upper())]
    )
    kind_of_ends: Any = {"q5_k": "q5_1", "q4_k": "q4_1"}.get(kind, kind)
    assert found < 0.85 * error(read(torch.from_numpy(with_ends), kind_of_ends), weight)


@pytest.mark.parametrize("kind", ["q5_1", "q4_1"])
def test_four_values_of_a_block_are_nearer_than_eight(kind: GgufType) -> None:
    """A group of 64 has 16 or 32 codes for four values."""
    wide, narrow = layer_of(24, 512, group_size=64), layer_of(24, 512, group_size=16)
    errors = [error(read(pack_layer(layer, kind), kind), layer.dequantize().numpy()) for layer in (wide, narrow)]
    assert errors[0] < 0.55 * errors[1]


def test_two_values_are_exact_to_float16() -> None:
    layer = layer_of(8, 256, group_size=64, format="w1", param_bits=16)
    weight = layer.dequantize().numpy()
    np.testing.assert_allclose(read(pack_layer(layer, "q4_1"), "q4_1"), weight, rtol=2e-3, atol=1e-6)


@cases(15)
@given(
    kind=st.sampled_from(TYPES),
    group=st.sampled_from([8, 16, 20, 32, 48, 96, 128, -1]),
    fmt=st.sampled_from(["w1", "w1+1", "w1+1+1"]),
    bits=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 9),
)
def test_every_format_and_group(kind: GgufType, group: int, fmt: Format, bits: int, seed: int) -> None:
    """Also groups that have no common borders with blocks, and equal weights: the error is at most that of a block's
    range divided evenly."""
    bits = 8 if fmt == "w1+1+1" and bits == 16 else bits
    layer = layer_of(3, 512, seed, group_size=group, format=fmt, param_bits=bits)
    weight = layer.dequantize().numpy()
    found = read(pack_layer(layer, kind), kind)
    blocks, ours = weight.reshape(-1, 32), found.reshape(-1, 32)
    top = {"q8_0": 254, "q5_1": 31, "q5_k": 31, "q4_1": 15, "q4_k": 15}[kind]
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    step = (2 * np.abs(blocks).max(1) if kind == "q8_0" else high - low) / top
    unit = np.abs(weight).max() / 63 if kind.endswith("_k") else 0  # of a block's scale and offset
    allowed = np.sqrt(32) * (step / 2 + unit) * 1.02
    assert (np.linalg.norm(ours - blocks, axis=1) <= allowed + 1e-6).all()


def test_equal_weights_and_zeros() -> None:
    layer = layer_of(2, 256)
    for value in (0.0, 0.25, -0.5):
        layer.dequantize()
        same = nn.Linear(256, 2, bias=False)
        nn.init.constant_(same.weight, value)
        fmt = LayerFormat(format="w1+1", group_size=16, param_bits=16, act_bits=16, act_group_size=-1)
        packed = packed_layer(same, fmt, QuantConfig())
        for kind in TYPES:
            np.testing.assert_allclose(read(pack_layer(packed, kind), kind), value, rtol=2e-2, atol=1e-7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with rows of 64 and of 256 weights."""
    quant = QuantConfig(group_size=16, param_bits=4, act_bits=16, kv_bits=16)
    sizes = {"hidden_size": 64, "intermediate_size": 256}
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", quant, **sizes)[0]


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4_k"])
def test_the_file_has_the_type_and_the_weights(kind: GgufType, tiny: Path, tmp_path: Path) -> None:
    source = find_checkpoint(str(tiny))
    dense, typed = (
        {tensor.name: tensor for tensor in GGUFReader(next(folder.glob("*.gguf"))).tensors}
        for folder in (
            export(source, "gguf", tmp_path / "dense").path,
            export(source, "gguf", tmp_path / "typed", gguf_type=kind).path,
        )
    )
    instead = {"q5_k": "Q5_1", "q4_k": "Q4_1"}.get(kind, kind.upper())
    kinds = {name: tensor.tensor_type.name for name, tensor in typed.items()}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.1.ffn_down.weight"]) == (instead, kind.upper())
    for name, tensor in typed.items():
        wanted, found = (gguf.quants.dequantize(one.data, one.tensor_type) for one in (dense[name], tensor))
        assert error(found, wanted) < WITHIN[kind], name
    (file,) = (tmp_path / "typed").glob("*.gguf")
    assert file.name == f"typed-{kind.upper()}.gguf"
    card = (tmp_path / "typed" / "README.md").read_text()
    assert f"in {kind.upper()} ({SHAPES[kind].bits:g} bits a weight)" in card
    sizes = gguf_sizes(tiny)
    assert list(sizes) == list(SHAPES)
    assert sizes[kind] == sum(tensor.n_bytes for tensor in typed.values())
    assert sizes["bf16"] == sum(tensor.n_bytes for tensor in dense.values())


def test_rows_that_fit_no_block_are_refused_with_their_length(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=16, act_bits=16, kv_bits=16)
    folder, _ = tiny_checkpoint(tmp_path, "llama", quant)  # rows of 48 and of 90
    source = find_checkpoint(str(folder))
    with pytest.raises(ModelError, match=r"q_proj has rows of 48 weights.*blocks of 32.*bf16"):
        export(source, "gguf", tmp_path / "out", gguf_type="q4_1")
    assert not (tmp_path / "out").exists()
    assert list(gguf_sizes(folder)) == ["bf16"]
    model, _ = load(tiny_checkpoint(tmp_path / "wide", "llama", quant, hidden_size=64, intermediate_size=96)[0])
    with pytest.raises(ModelError, match=r"no layer can be Q4_K: its blocks have 256 weights.*64 or 96.*q4_1"):
        stored_matrices(model, "q4_k")
    with pytest.raises(ConfigError, match="leave out the type q8_0"):
        export(source, "dense", tmp_path / "out", gguf_type="q8_0")


def test_the_command_takes_a_type(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny), "--to", "gguf", "--type", "q5_1", "--out", str(tmp_path / "out")]) == 0
    assert "Modelfile" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "out-Q5_1.gguf"]
    assert main(["export", str(tiny), "--to", "packed", "--type", "q5_1", "--out", str(tmp_path / "b")]) == 1
