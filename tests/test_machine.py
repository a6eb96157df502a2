"""The accelerator: known devices, the precision that was asked for or chosen, several runs in one process; float32
products."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.errors import ConfigError
from lbllm.machine import (
    bfloat16_products,
    check_device,
    check_processes,
    device_named,
    devices,
    float32_products,
    make_accelerator,
    matmul_rate,
)
from tests.helpers.cases import cases
from tests.helpers.tiny_runs import tiny_teacher, token_ids


def product_dtype(device: str, precision: str | None) -> torch.dtype:
    """The dtype in which a matrix product of float32 tensors comes out."""
    accelerator = make_accelerator(device, precision)
    x = torch.ones(4, 4, device=accelerator.device)
    with accelerator.autocast():
        return (x @ x).dtype


def test_each_run_of_a_process_gets_the_precision_it_asks_for() -> None:
    dtypes = [product_dtype("cpu", precision) for precision in ("no", "bf16", "no")]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_a_chosen_precision_can_be_asked_for_again() -> None:
    chosen = make_accelerator("auto").mixed_precision
    assert chosen in ("no", "bf16")
    assert make_accelerator("auto", chosen).mixed_precision == chosen


@pytest.mark.parametrize(
    ("instructions", "precision"), [((), "no"), (("avx512_bf16",), "bf16"), (("amx_tile",), "bf16")]
)
def test_the_processor_chooses_the_precision_and_not_the_moment(
    instructions: tuple[str, ...], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions)
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) ** 2)  # everything takes longer than what was before
    assert make_accelerator("cpu").mixed_precision == precision


def test_cpu_is_the_cpu() -> None:
    assert make_accelerator("cpu", "no").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_refused_with_the_choices(device: str) -> None:
    with pytest.raises(ConfigError, match=f"'{device}' is not known; choose from auto, cpu, cuda, cuda:N"):
        make_accelerator(device)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices() == ("auto", "cpu", "cuda")
    check_processes("cpu", 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert devices() == ("auto", "cpu", "cuda", "cuda:0", "cuda:1")
    check_device("cuda:1")
    check_processes("auto", 2)
    with pytest.raises(ConfigError, match="'cuda:2': this machine has 2 GPUs, counted from 0"):
        check_device("cuda:2")
    for device, processes, reason in (("auto", 3, "has 2 GPUs"), ("cuda:1", 2, "is one GPU"), ("cpu", 0, "at least 1")):
        with pytest.raises(ConfigError, match=f"--processes {processes}.*{reason}"):
            check_processes(device, processes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["mps", "xpu", "cuda", "cuda:7", "cpu:3", "meta", "hpu", "no", "", "cuda:-1", "a b"])
def test_a_device_that_the_machine_lacks_is_one_message(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"--device '?{device}'?"):
        device_named(device)


def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(ConfigError, match="no GPU that torch can use; choose cpu"):
        make_accelerator("cuda")


def test_the_matmul_rate_is_a_rate() -> None:
    assert 1e7 < matmul_rate(torch.float32, size=64, seconds=0.01) < 1e16


def test_a_machine_that_others_use_has_the_same_matmul_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = matmul_rate(torch.float32, seconds=0.2)
    wall = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 10 * wall())  # the same work takes ten times as long
    assert matmul_rate(torch.float32, seconds=2.0) > alone / 4


@given(seed=st.integers(0, 1_000), shape=st.tuples(*[st.integers(1, 700)] * 3))
@cases(40)
def test_products_for_evaluating_are_float32_ones(seed: int, shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    exact = x.double() @ weight.double().T
    with float32_products():
        found = torch.nn.functional.linear(x, weight)
    # Factors rounded to bfloat16 are wrong by 2e-3 of these norms.
    norms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    assert ((found.double() - exact).abs() / norms).max() < 1e-5


def test_other_products_stay_as_they_were() -> None:
    onednn: Any = torch.backends.mkldnn  # whose type hints lack ``matmul``
    before = onednn.matmul.fp32_precision
    with pytest.raises(KeyError), float32_products():
        raise KeyError
    assert onednn.matmul.fp32_precision == before
    # Two threads, of which the first to begin is the first to end.
    first, second = float32_products(), float32_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert onednn.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


@torch.no_grad()
def test_bfloat16_products_round_the_linear_layers_and_leave_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_teacher("qwen2").model, token_ids(2, seed=1)
    plain = model(ids).logits
    monkeypatch.setattr("lbllm.machine.has_bfloat16", lambda: True)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    with bfloat16_products(model):
        rounded = model(ids).logits
        exact = x.bfloat16().double() @ layer.weight.bfloat16().double().t() + layer.bias.bfloat16().double()
        torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-3)
        assert layer(x).dtype == rounded.dtype == torch.float32
    assert 0 < float((rounded - plain).norm()) < 0.05 * float(plain.norm())
    assert torch.equal(model(ids).logits, plain)
    monkeypatch.setattr("lbllm.machine.has_bfloat16", lambda: False)
    with bfloat16_products(model):
        assert torch.equal(model(ids).logits, plain)
