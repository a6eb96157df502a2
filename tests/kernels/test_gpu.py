"""The Triton kernels against float64 and the reference quantizer: in Triton's interpreter, or on a GPU where one is."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.quant import gpu_trial
from lbllm.quant.activations import ActQuantizer
from lbllm.sections import LayerFormat
from tests.helpers.cases import cases
from tests.kernels.test_kernels import expected, formats, layer_format, quantizer_cases, random_layer

pytest.importorskip("triton", reason="Triton has no build for this machine")
import triton.language as tl
from triton.runtime import interpreter

from lbllm.kernels import gpu

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as 16 bits and multiplies these as integers; here as the numbers they are."""

    def create_dot(builder: Any, a: Any, b: Any, total: Any, *others: Any) -> Any:
        left, right = (_as_float32(part) if part.dtype == tl.bfloat16 else part.data for part in (a, b))
        return interpreter.TensorHandle(np.matmul(left, right, dtype=np.float32) + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _as_float32(part: Any) -> Any:
    return (part.data.astype(np.uint32) << 16).view(np.float32)


@cases(15)
@given(
    st.integers(1, 90),
    st.integers(1, 300),
    formats(),
    st.sampled_from([1, 3, 16, 21, 70]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**32),
)
@torch.no_grad()
def test_any_layer_gives_what_its_weights_say(
    rows: int, columns: int, fmt: LayerFormat, tokens: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    layer = random_layer(rows, columns, fmt, bias=bias, seed=seed)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed + 1))
    wanted, scale = expected(layer, x)
    there = layer.to(DEVICE)
    got = there.by_triton(x.to(DEVICE, dtype), gpu).cpu()
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    error = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert bool(((got - wanted).abs() <= error * scale + 1e-30).all())


@torch.no_grad()
def test_a_layer_with_shorter_last_groups_and_ranges() -> None:
    tokens = 16
    fmt = LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=4, act_group_size=64)
    layer = random_layer(24, 200, fmt, bias=True, seed=tokens)
    assert layer.quantizer is not None
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(tokens)).pow(3)
    quantized = layer.quantizer.to(DEVICE).by_triton(x.to(DEVICE), gpu)
    # A GPU divides and rounds a last bit differently: single values may fall on the neighbouring step.
    assert float(torch.isclose(quantized.cpu(), layer.quantizer.cpu()(x), rtol=1e-5, atol=1e-30).float().mean()) > 0.99
    there = layer.to(DEVICE)
    got = there.by_triton(x.to(DEVICE), gpu).cpu()
    there.quantizer = None
    wanted, scale = expected(there.cpu(), quantized.cpu())
    assert bool(((got - wanted).abs() <= 1e-5 * scale).all())


@pytest.mark.parametrize("tokens", [1, 16, pytest.param(65, marks=pytest.mark.soak)])
def test_the_trial_finds_no_fault(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trial, "TOKENS", (tokens,))
    assert gpu_trial.faults(DEVICE) == []


@pytest.mark.parametrize("wrong", ["packed_linear", "quantize_activations"])
def test_the_trial_names_what_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trial, "TOKENS", (1,))
    monkeypatch.setattr(gpu_trial, "FORMATS", gpu_trial.FORMATS[:2])
    right = getattr(gpu, wrong)
    monkeypatch.setattr(gpu, wrong, lambda *parts: right(*parts) * 1.05)
    found = gpu_trial.faults(DEVICE)
    # Two dtypes of each format that has what is wrong.
    assert len(found) == (4 if wrong == "packed_linear" else 2)
    assert "w1+1, groups of 16, 4-bit parameters, 4-bit activations, 1 tokens in float32: " in found[0]


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*parts: Any) -> Tensor:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(gpu, "packed_linear", fails)
    monkeypatch.setattr(gpu_trial, "TOKENS", (1,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_trial, "faults", partial(gpu_trial.faults, DEVICE))
    gpu_trial.on_gpu.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"4-bit parameters.*PassManager::run failed, and 11 more.*lbllm doctor"):
            assert gpu_trial.on_gpu() is None
    finally:
        gpu_trial.on_gpu.cache_clear()


def test_no_tokens_and_more_dimensions() -> None:
    layer = random_layer(5, 40, layer_format(8)).to(DEVICE)
    assert layer.by_triton(torch.randn(0, 40, device=DEVICE), gpu).shape == (0, 5)
    assert layer.by_triton(torch.randn(2, 3, 40, device=DEVICE), gpu).shape == (2, 3, 5)


@cases(30)
@given(quantizer_cases(5))
@torch.no_grad()
def test_the_quantizer_gives_the_values_of_training(case: tuple[ActQuantizer, Tensor]) -> None:
    quantizer, x = case
    wanted = quantizer(x)
    got = quantizer.to(DEVICE).by_triton(x.to(DEVICE), gpu).cpu()
    # A GPU divides and rounds a last bit differently: single values may fall on the neighbouring step.
    close = torch.isclose(got, wanted, rtol=1e-5, atol=1e-30)
    assert float(close.float().mean()) > 0.99 if got.numel() > 100 else float((~close).sum()) <= 1
