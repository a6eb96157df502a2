"""The Triton kernels against float64 and the reference quantizer: in Triton's interpreter, or on a GPU where one is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lbllm.quant.activations import ActQuantizer
from lbllm.sections import LayerFormat
from tests.helpers.cases import cases
from tests.kernels.test_kernels import expected, formats, layer_format, quantizer_cases, random_layer

pytest.importorskip("triton", reason="Triton has no build for this machine")
from lbllm.kernels import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cases(15)
@given(
    st.integers(1, 90),
    st.integers(1, 300),
    formats(),
    st.sampled_from([1, 3, 16, 21, 70]),
    st.booleans(),
    st.integers(0, 2**32),
)
@torch.no_grad()
def test_any_layer_gives_what_its_weights_say(
    rows: int, columns: int, fmt: LayerFormat, tokens: int, bias: bool, seed: int
) -> None:
    layer = random_layer(rows, columns, fmt, bias=bias, seed=seed)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed + 1))
    wanted, scale = expected(layer, x)
    weight, params = layer.weight.to(DEVICE), layer.params.data.to(DEVICE)
    params_scale, added = (None if part is None else part.data.to(DEVICE) for part in (layer.affine(), layer.bias))
    for dtype, error in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
        got = gpu.packed_linear(x.to(DEVICE, dtype), weight, params, params_scale, added, columns, layer.length).cpu()
        assert got.shape == wanted.shape
        assert got.dtype == dtype
        assert bool(((got - wanted).abs() <= error * scale + 1e-30).all())


def test_no_tokens_and_more_dimensions() -> None:
    layer = random_layer(5, 40, layer_format(8))
    parts = (layer.weight.to(DEVICE), layer.params.to(DEVICE), None, None, 40, layer.length)
    assert gpu.packed_linear(torch.randn(0, 40, device=DEVICE), *parts).shape == (0, 5)
    assert gpu.packed_linear(torch.randn(2, 3, 40, device=DEVICE), *parts).shape == (2, 3, 5)


@cases(30)
@given(quantizer_cases(5))
@torch.no_grad()
def test_the_quantizer_gives_the_values_of_training(case: tuple[ActQuantizer, Tensor]) -> None:
    quantizer, x = case
    got = gpu.quantize_activations(x.to(DEVICE), *quantizer.settings()).cpu()
    wanted = quantizer(x)
    # A GPU divides and rounds a last bit differently: single values may fall on the neighbouring step.
    close = torch.isclose(got, wanted, rtol=1e-5, atol=1e-30)
    assert float(close.float().mean()) > 0.99 if got.numel() > 100 else float((~close).sum()) <= 1
