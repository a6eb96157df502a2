"""The kernels against the PyTorch reference and float64, on random layers; and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lbllm import kernels
from lbllm.quant.activations import ActQuantizer, decode, encode
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerFormat
from tests.helpers import ROOT
from tests.helpers.cases import cases


def random_layer(
    rows: int, columns: int, fmt: LayerFormat, *, bias: bool = False, seed: int = 0, tail: int = 2
) -> PackedLinear:
    """A packed layer of random bits and parameters."""
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear(columns, rows, fmt, bias=bias, tail=tail, dtype=torch.float32)
    layer.weight.random_(0, 256, generator=generator)
    if columns % 8:
        layer.weight[..., -1] &= (1 << columns % 8) - 1
    if fmt.param_bits < 16:
        layer.params.random_(0, 256, generator=generator)
        if layer.table is not None and fmt.param_bits == 4 and layer.groups % 2:
            layer.params[:, -1] &= 15  # two groups share a byte: what is past the end of a row is zero
        assert layer.params_scale is not None
        layer.params_scale.copy_(torch.randn(layer.params_scale.shape, generator=generator) / 64)
        if layer.params_range is not None:
            layer.params_range.copy_(torch.randn(layer.params_range.shape, generator=generator) * 16)
    else:
        layer.params.copy_(torch.randn(layer.params.shape, generator=generator))
    if layer.table is not None:
        layer.table.copy_(torch.randn(layer.table.shape, generator=generator).sort().values)
    if layer.bias is not None:
        layer.bias.data.normal_(generator=generator)
    if layer.quantizer is not None:
        layer.quantizer.act.data.copy_(torch.rand(3, generator=generator))
    return layer


def layer_format(group_size: int, act_bits: int = 16) -> LayerFormat:
    return LayerFormat.model_validate(
        {"format": "w1+1", "group_size": group_size, "param_bits": 16, "act_bits": act_bits}
    )


def formats(act_bits: tuple[int, ...] = (16,)) -> st.SearchStrategy[LayerFormat]:
    return st.builds(
        lambda kind, size, params, acts: LayerFormat.model_validate(
            {"format": kind, "group_size": size, "param_bits": params, "act_bits": acts}
        ),
        st.sampled_from(["w1+1", "w1", "w1+1+1"]),
        st.sampled_from([-1, 8, 32, 64, 128]) | st.integers(1, 150),
        st.sampled_from([4, 8, 16]),
        st.sampled_from(act_bits),
    )


def expected(layer: PackedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output in float64 from the reference's weight, and the size of the sums that make it up."""
    if layer.quantizer is not None:
        x = layer.quantizer(x)
    weight, x = layer.dequantize().double(), x.double()
    bias = torch.zeros(()) if layer.bias is None else layer.bias.double()
    return x @ weight.t() + bias, x.abs() @ weight.abs().t() + bias.abs()


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    assert kernels.ready()


@cases(150)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    formats((4, 8, 16)),
    st.lists(st.integers(1, 5), max_size=2),
    st.booleans(),
    st.integers(0, 2**32),
)
@torch.no_grad()
def test_any_layer_gives_what_its_weights_say(
    rows: int, columns: int, fmt: LayerFormat, batch: list[int], bias: bool, seed: int
) -> None:
    layer = random_layer(rows, columns, fmt, bias=bias, seed=seed)
    x = torch.randn(*batch, columns, generator=torch.Generator().manual_seed(seed + 1))
    wanted, scale = expected(layer, x)
    got = layer(x)
    assert layer.words is not None
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert bool(((got - wanted).abs() <= 1e-5 * scale + 1e-30).all())


@cases(150)
@given(
    st.integers(1, 4),
    st.integers(1, 60),
    st.sampled_from(["w1+1", "w1"]),
    st.sampled_from([-1, 8, 24, 64, 128]),
    st.integers(0, 3),
    st.sampled_from([1, 2, 8, 9, 40]),
    st.booleans(),
    st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    st.integers(0, 2**32),
)
@example(2, 1, "w1", -1, 0, 2, False, 1e-3, 2)  # all members of a group at a level far smaller than its alpha and mu
@torch.no_grad()
def test_four_bit_activations_meet_their_weights_in_tables(
    tiles: int, blocks: int, kind: str, group: int, tail: int, tokens: int, bias: bool, size: float, seed: int
) -> None:
    fmt = layer_format(group, 4).model_copy(update={"format": kind})
    layer = random_layer(32 * tiles, 8 * blocks, fmt, bias=bias, seed=seed, tail=tail)
    generator = torch.Generator().manual_seed(seed + 1)
    # Some values far out, and tokens of one sign.
    x = size * torch.randn(tokens, 8 * blocks, generator=generator).pow(3)
    x[0] = x[0].abs() * (-1 if seed % 2 else 1)
    wanted, scale = expected(layer, x)
    got = layer(x)
    assert layer.words is not None
    assert layer.words.dtype == torch.uint8
    assert bool(((got - wanted).abs() <= 1e-5 * scale + 1e-30).all())
    quantizer, layer.quantizer = layer.quantizer, None
    plain = layer(x)
    assert layer.words.dtype == torch.int32
    wanted, scale = expected(layer, x)
    assert bool(((plain - wanted).abs() <= 1e-5 * scale + 1e-30).all())
    layer.quantizer = quantizer
    assert torch.equal(layer(x), got)


@torch.no_grad()
def test_a_value_that_is_no_number_is_not_lost_in_a_table() -> None:
    layer = random_layer(32, 64, layer_format(32, 4))
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 64)
        x[1, 5] = value
        got = layer(x)
        assert bool(got[0].isfinite().all())
        assert not bool(got[1].isfinite().any())


@cases(100)
@given(
    st.integers(1, 20) | st.sampled_from([32, 64]),
    st.integers(1, 300) | st.integers(1, 30).map(lambda blocks: 8 * blocks),
    formats((4, 16)),
    st.integers(0, 2**32),
)
@torch.no_grad()
def test_the_bits_come_back_as_they_were(rows: int, columns: int, fmt: LayerFormat, seed: int) -> None:
    layer = random_layer(rows, columns, fmt, seed=seed)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(2, columns))
    assert layer.weight.numel() == 0
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def quantizer_and_tokens(
    tokens: int, features: int, grid: tuple[int, int], knee: float, size: float, seed: int
) -> tuple[ActQuantizer, Tensor]:
    """A quantizer of ``grid`` (bits, tail steps) with random clips, and tokens with some values far out, one of them of
    one sign."""
    bits, tail = grid
    quantizer = ActQuantizer(bits, tail)
    generator = torch.Generator().manual_seed(seed)
    quantizer.act.copy_(torch.tensor([knee, *(1.5 * torch.rand(2, generator=generator)).tolist()]))
    x = size * torch.randn(tokens, features, generator=generator).pow(3)
    x[0] = x[0].abs()
    return quantizer, x


def quantizer_cases(tokens: int) -> st.SearchStrategy[tuple[ActQuantizer, Tensor]]:
    return st.builds(
        quantizer_and_tokens,
        st.integers(1, tokens),
        st.integers(1, 200),
        st.sampled_from([(4, 0), (4, 1), (4, 2), (4, 3), (8, 0)]),
        st.floats(-1, 2),
        st.sampled_from([0.0, 1e-20, 1.0, 1e4]),
        st.integers(0, 2**32),
    )


@cases(100)
@given(quantizer_cases(9))
@torch.no_grad()
def test_the_quantizer_gives_the_very_values_of_the_formulas(case: tuple[ActQuantizer, Tensor]) -> None:
    quantizer, x = case
    grid = quantizer.grid(x)
    expected = decode(encode(x, grid, quantizer.bits, quantizer.tail), grid)
    assert torch.equal(torch.ops.lbllm.quantize_activations(x, *quantizer.settings()), expected)


@cases(100)
@given(quantizer_cases(9), st.floats(0.05, 2))
def test_the_quantizer_sends_back_the_same_gradients_with_and_without_a_compiler(
    case: tuple[ActQuantizer, Tensor], temperature: float
) -> None:
    quantizer, x = case
    quantizer.temperature = temperature
    x.requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for compiled in (True, False):
        with mock.patch.object(kernels, "ready", lambda compiled=compiled: compiled):
            found.append(torch.autograd.grad((quantizer(x.clone()) * direction).sum(), [x, quantizer.act]))
    assert torch.equal(found[0][0], found[1][0])
    largest = float(x.detach().abs().amax()) * direction.abs().sum().item()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6 * largest + 1e-30)


@torch.no_grad()
def test_few_and_many_tokens_give_the_same() -> None:
    layer = random_layer(70, 500, layer_format(96))
    x = torch.randn(40, 500)
    whole = layer(x)
    for count in (1, 2, 3, 5, 8, 9):
        torch.testing.assert_close(layer(x[:count]), whole[:count], rtol=1e-4, atol=1e-3)
    assert layer(x[:0]).shape == (0, 70)
    for dtype in (torch.bfloat16, torch.float16):
        assert layer(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(layer(x[:3].to(dtype)).float(), whole[:3], rtol=0.05, atol=0.5)


def test_a_wrong_size_is_refused_in_words() -> None:
    layer = random_layer(4, 64, layer_format(32))
    with pytest.raises(RuntimeError, match="last dimension of x must be 64"):
        layer(torch.randn(2, 63))


MEMORY = """
import resource, torch
from lbllm.quant.packed_layer import PackedLinear
from tests.kernels.test_kernels import layer_format
layer = PackedLinear(8192, 8192, layer_format(128), bias=False, tail=2, dtype=torch.float32)
layer(torch.zeros(1, 64 * 128))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
for tokens in (1, 7, 64):
    layer(torch.randn(tokens, 8192))
assert layer.words is not None
print(peak() - before)
"""


def test_a_layer_is_never_expanded_in_memory() -> None:
    """Packed it takes 17 MB, as float32 it would take 268."""
    assert int(_process(MEMORY).stdout) < 40e6


WITHOUT = """
import os, warnings, torch
from lbllm import kernels
from tests.kernels.test_kernels import layer_format, random_layer
for changes in ({"LBLLM_KERNELS": "none"}, {"LBLLM_KERNELS": "", "CXX": "", "PATH": os.environ["LBLLM_HOME"]}):
    os.environ.update(changes)
    kernels.ready.cache_clear()
    layer = random_layer(9, 70, layer_format(32, 4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = [layer(torch.ones(1, 70)) for _ in range(3)]
    assert layer.words is None
    print(len(seen), "compiler" in str(seen[0].message) if seen else None)
"""


def test_without_a_compiler_it_computes_all_the_same_and_says_so_once(tmp_path: Path) -> None:
    unwanted, missing = _process(WITHOUT, {"LBLLM_HOME": str(tmp_path)}).stdout.splitlines()
    assert unwanted.split() == ["0", "None"]
    assert missing.split() == ["1", "True"]


def test_every_source_file_decides_about_the_library(tmp_path: Path) -> None:
    """A library that is kept must not be used after a file was changed, added or renamed."""
    assert {"library.cpp", "packed.h"} <= {source.name for source in kernels.SOURCES}
    sources = [tmp_path / "a.cpp", tmp_path / "b.h"]
    for source in sources:
        source.write_text(source.name)
    names = [kernels._key(sources, "flags"), kernels._key(sources, "other flags"), kernels._key(sources[:1], "flags")]
    sources[1].write_text("changed")
    names.append(kernels._key(sources, "flags"))
    names.append(kernels._key([sources[0], sources[1].rename(tmp_path / "c.h")], "flags"))
    assert len(set(names)) == len(names)


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(kernels.BuildError, match=r"false failed: exit code 1, without a message\. Set CXX"):
        kernels.build(tmp_path, "portable")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.skipif("PYTEST_PORTABLE" in os.environ, reason="this is that process")
@pytest.mark.soak
@pytest.mark.parametrize("instructions", get_args(kernels.InstructionSet))
def test_other_instruction_sets_compute_the_same(instructions: str) -> None:
    if instructions == kernels.instruction_set() or (
        instructions == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        pytest.skip("tested above, or not had by this processor")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        str(ROOT / "tests/quant/test_embedding.py"),
        "-k",
        "any_layer or bits_come or (test_kernels and tables) or layout or a_head_gives",
    ]
    environment = os.environ | {"LBLLM_KERNELS": instructions, "PYTEST_PORTABLE": "1", "LBLLM_FEW_CASES": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "21 passed" in result.stdout


def _process(code: str, environment: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result
