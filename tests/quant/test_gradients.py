"""Gradients through packed layers and packed models, to the inputs: those of the unpacked reference in PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

import lbllm
from lbllm import kernels
from lbllm.errors import ConfigError
from lbllm.quant.kv_cache import TrainingKVLayer
from lbllm.quant.model_cache import KeepBits
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerFormat
from tests.helpers.cases import cases
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids
from tests.kernels.test_kernels import formats, random_layer


class Reference(nn.Module):
    """A packed layer's weight, expanded, and its quantizer."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.weight, self.bias, self.quantizer = layer.dequantize(), layer.bias, copy.deepcopy(layer.quantizer)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.quantizer is None else self.quantizer(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


@pytest.fixture(params=["kernels", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert kernels.ready()
    if request.param == "PyTorch":
        monkeypatch.setattr(kernels, "ready", lambda: False)
    return str(request.param)


@cases(40)
@given(
    st.integers(1, 40) | st.sampled_from([32, 64]),
    st.integers(1, 100) | st.sampled_from([64, 96]),
    formats((4, 8, 16)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_layer_gives_the_gradients_of_its_weight(
    rows: int, columns: int, fmt: LayerFormat, bias: bool, answered: bool, seed: int
) -> None:
    assert kernels.ready()
    layer = random_layer(rows, columns, fmt, bias=bias, seed=seed)
    reference = Reference(layer)
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(3, columns, generator=generator), torch.randn(3, rows, generator=generator)
    for module in (layer, reference):
        module.requires_grad_(bias)
    plain = layer(x).detach() if answered else None
    results = []
    for module in (layer, reference):
        given_x = x.clone().requires_grad_()
        output = module(given_x)
        output.backward(grad)
        quantizer = None if module.quantizer is None else module.quantizer.act.grad
        results.append([output.detach(), given_x.grad, None if module.bias is None else module.bias.grad, quantizer])
    for got, wanted in zip(*results, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()) + 1e-30)
    # The values are those of a pass without gradients.
    assert plain is None or torch.equal(results[0][0], plain)


def test_a_gradient_that_is_not_there_is_an_error(way: str) -> None:
    fmt = LayerFormat.model_validate({"format": "w1+1", "group_size": 8, "param_bits": 16, "act_bits": 4})
    layer = random_layer(32, 64, fmt)
    x = torch.randn(2, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"setup_context|jvp"):
        torch.func.grad(lambda given: layer(given).sum())(x.detach())
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


def test_a_low_precision_keeps_its_dtype(way: str) -> None:
    fmt = LayerFormat.model_validate({"format": "w1+1", "group_size": 8, "param_bits": 16, "act_bits": 4})
    layer = random_layer(32, 64, fmt, bias=True)
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    output = layer(x)
    output.backward(torch.ones_like(output))
    other = x.detach().clone().requires_grad_()
    Reference(layer)(other).sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert output.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, other.grad, rtol=0.05, atol=0.05 * float(other.grad.abs().max()))


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "one range a token": ("llama", {}),
    "groups of inputs": ("qwen3", {"act_group_size": 24}),
    "16 bits": ("llama", {"act_bits": 16, "kv_bits": 16}),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, quant = MODELS[request.param]
    folder = tmp_path_factory.mktemp("gradients")
    run_tiny(run_config(quant=quant), folder, tiny_teacher(architecture))
    return folder / "checkpoint"


def unpacked(model: Any) -> Any:
    """The reference: expanded weights, PyTorch's quantizers, the KV cache of training, the class's own forward."""
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, PackedLinear):
            other.set_submodule(name, Reference(module))
    for hook in other.model._forward_pre_hooks.values():
        if isinstance(hook, KeepBits):
            hook.layer_class = TrainingKVLayer
    del other.model.forward
    return other


def gradient(model: Any, embeds: Tensor, first: int = 0) -> Tensor:
    """The gradient of a loss of the logits to the embeddings from ``first`` on."""
    given = embeds[:, first:].clone().requires_grad_()
    output = model(inputs_embeds=torch.cat((embeds[:, :first], given), 1), use_cache=True)
    output.logits[:, first:].logsumexp(-1).square().sum().backward()
    assert given.grad is not None
    return given.grad


def test_a_model_gives_the_gradient_of_the_unpacked_one(checkpoint: Path, way: str) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    embeds = model.get_input_embeddings()(token_ids(1, seed=3)).detach()
    wanted = gradient(unpacked(model), embeds)
    for _ in range(2):
        got = gradient(model, embeds)
        assert float(got.norm()) == pytest.approx(float(wanted.norm()), rel=1e-2)
        assert float(nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)) > 0.999
        model.generate(token_ids(1), max_new_tokens=3)


def test_a_token_after_a_cached_text_gets_its_gradient(checkpoint: Path) -> None:
    model: Any = lbllm.load(checkpoint)[0]
    embeds = model.get_input_embeddings()(token_ids(1, seed=3)).detach()
    last = embeds.shape[1] - 1
    with torch.no_grad():
        cache = model(inputs_embeds=embeds[:, :last], use_cache=True).past_key_values
    given = embeds[:, last:].clone().requires_grad_()
    model(inputs_embeds=given, past_key_values=cache).logits.logsumexp(-1).square().sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, gradient(unpacked(model), embeds, last), rtol=0.05, atol=1e-3)


def test_a_gradient_through_the_stored_cache_is_refused(tmp_path: Path) -> None:
    run_tiny(run_config(), tmp_path, tiny_teacher("llama"))
    model: Any = lbllm.load(tmp_path / "checkpoint")[0]
    embeds = model.get_input_embeddings()(token_ids(1, seed=3)).requires_grad_()
    cache = model(inputs_embeds=embeds[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=r"keeps 4 bits and no gradient.*torch\.no_grad"):
        model(inputs_embeds=embeds[:, -1:], past_key_values=cache)
    with torch.no_grad():
        assert model(inputs_embeds=embeds[:, -1:], past_key_values=cache).logits.isfinite().all()
