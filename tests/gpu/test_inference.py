"""Packed models on a device in name only: answers, chat, lens, zero-shot, KV cache; and what a GPU's kernels get."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from lbllm import load
from lbllm.chat.lens import lens
from lbllm.chat.stream import stream
from lbllm.measure.zero_shot import likelihoods
from lbllm.quant import packed_layer
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerFormat
from tests.helpers.named_device import DEVICE, Host, named_device
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids
from tests.kernels.test_kernels import random_layer

BACK = torch.device("cpu")
FORMATS = [
    LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=4, act_group_size=64),
    LayerFormat(format="w1", group_size=128, param_bits=8, act_bits=8),
    LayerFormat(format="w1+1", group_size=-1, param_bits=16, act_bits=16),
    LayerFormat(format="w1+1+1", group_size=16, param_bits=4, act_bits=16),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with biases, 4-bit parameters, ranges of 64 inputs and a KV cache of 4 bits."""
    folder = tmp_path_factory.mktemp("run")
    quant = {"param_bits": 4, "act_group_size": 64}
    config = run_config(quant=quant, ptq={"tokens": 64, "em_steps": 1, "sweeps": 0})
    run_tiny(config, folder, tiny_teacher("llama_bias"))
    return folder / "checkpoint"


@pytest.fixture
def host() -> Iterator[Host]:
    with named_device() as host:
        yield host


def placed(checkpoint: Path) -> tuple[PreTrainedModel, Any]:
    """The model on the device and its tokenizer."""
    model, tokenizer = load(checkpoint)
    return model.to(DEVICE), tokenizer  # type: ignore[arg-type]


def test_everything_of_a_loaded_model_moves(checkpoint: Path, host: Host) -> None:
    model, _ = placed(checkpoint)
    assert all(tensor.device == DEVICE for tensor in (*model.parameters(), *model.buffers()))
    again = copy.deepcopy(model)
    assert all(tensor.device == DEVICE for tensor in (*again.parameters(), *again.buffers()))
    back = model.to(BACK)  # type: ignore[arg-type]
    ids = token_ids(1)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, load(checkpoint)[0](ids).logits)


@torch.no_grad()
def test_answers_are_those_of_the_cpu(checkpoint: Path, host: Host) -> None:
    (model, _), ids = placed(checkpoint), token_ids(1)[:, :8]
    told = model.generate(ids.to(DEVICE), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    here = load(checkpoint, dtype=torch.float32)[0].generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert told.device == DEVICE
    assert told.tolist() == here.tolist()


@torch.no_grad()
def test_a_word_copies_nothing_to_the_host(checkpoint: Path, host: Host) -> None:
    model, _ = placed(checkpoint)
    cache, ids = DynamicCache(), token_ids(1).to(DEVICE)
    model(ids[:, :-1], past_key_values=cache)
    host.copies.clear()
    position = torch.tensor([[31]], device=DEVICE)
    model(ids[:, -1:], past_key_values=cache, position_ids=position)
    assert host.copies == []


def test_chat_and_lens(checkpoint: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = placed(checkpoint)
    generate = GenerationMixin.generate

    def there(self: Any, *args: Any, **kwargs: Any) -> Any:  # a chat generates in a thread of its own
        with named_device():
            return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", there)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator.clone_state())
    for temperature in (0.0, 0.8):
        pieces = list(
            stream(
                model, tokenizer, [{"role": "user", "content": "The river"}], max_new_tokens=3, temperature=temperature
            )
        )
        assert pieces[-1].tokens >= 1
    # A tensor in name only can't be one of inference mode.
    with torch.no_grad():
        plain: Any = vars(lens)["__wrapped__"]
        teacher = tiny_teacher("llama_bias").model.to(DEVICE)  # type: ignore[arg-type]
        found = plain(teacher, model, tokenizer, "The river runs.")
    assert len(found.tokens) > 2


@torch.no_grad()
def test_zero_shot_choices(checkpoint: Path, host: Host) -> None:
    model, _ = placed(checkpoint)
    there = likelihoods(model, [5, 6, 7], [[8, 9], [10]])
    here = likelihoods(load(checkpoint)[0], [5, 6, 7], [[8, 9], [10]])
    assert [value for value, _ in there] == pytest.approx([value for value, _ in here], rel=0.02)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.format}, {fmt.param_bits}")
def test_a_layer_trains_its_inputs_and_its_bias_there(fmt: LayerFormat, host: Host) -> None:
    layer = random_layer(24, 80, fmt, bias=True).to(DEVICE)
    x = torch.randn(3, 80).to(DEVICE).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.device == DEVICE


@torch.no_grad()
def test_an_expanded_layer_moves_with_its_weight(host: Host) -> None:
    layer, x = random_layer(24, 80, FORMATS[0], bias=True), torch.randn(3, 80)
    wanted = layer(x)
    layer.keep_dense(torch.float32)
    there = layer.to(DEVICE)
    assert torch.allclose(there(x.to(DEVICE)).cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert there.to(BACK)(x).device == BACK


class Kernels(ModuleType):
    """Stands for ``lbllm.kernels.gpu``; keeps the tensors that it gets."""

    def __init__(self) -> None:
        super().__init__("kernels")
        self.seen: list[Tensor] = []

    def quantize_activations(self, x: Tensor, *parts: Any) -> Tensor:
        self.seen += [part for part in (x, *parts) if isinstance(part, Tensor)]
        return torch.empty_like(x)

    def packed_linear(self, x: Tensor, weight: Tensor, *parts: Any) -> Tensor:
        self.seen += [part for part in (x, weight, *parts) if isinstance(part, Tensor)]
        return x.new_empty(*x.shape[:-1], len(weight))


@torch.no_grad()
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.format}, {fmt.param_bits}")
def test_the_kernels_get_tensors_of_the_device_alone(fmt: LayerFormat, host: Host) -> None:
    kernels, layer, x = Kernels(), random_layer(24, 80, fmt, bias=True).to(DEVICE), torch.randn(2, 3, 80).to(DEVICE)
    host.copies.clear()
    assert layer.by_triton(x, kernels).shape == (2, 3, 24)
    assert len(kernels.seen) >= 4
    assert {tensor.device for tensor in kernels.seen} == {DEVICE}
    assert host.copies == []


@torch.no_grad()
def test_a_layer_on_a_gpu_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    monkeypatch.setattr(packed_layer, "on_gpu", lambda: kernels)
    with FakeTensorMode(), torch.device("cuda"):
        layer = PackedLinear(80, 24, FORMATS[2], bias=True, tail=3, dtype=torch.bfloat16)
        y = layer(torch.empty(2, 3, 80, dtype=torch.bfloat16))
    assert y.device.type == "cuda"
    assert len(kernels.seen) == 4
    assert {tensor.device.type for tensor in kernels.seen} == {"cuda"}
