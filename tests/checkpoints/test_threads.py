"""Threads that share a freshly loaded packed model: each gets the answer that it would get alone."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lbllm
from lbllm import kernels
from tests.helpers.cases import FACTOR
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

EVEN = {"hidden_size": 64, "intermediate_size": 96}  # rows of all layers are whole tiles
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module", params=[{}, {"act_group_size": 32, "param_bits": 4}], ids=["tables", "words"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that nobody has asked; tests ask copies of it."""
    folder = tmp_path_factory.mktemp("threads")
    run_tiny(run_config(quant=request.param), folder, tiny_teacher("llama", **EVEN))
    assert kernels.ready()
    return lbllm.load(folder / "checkpoint")[0]


@torch.no_grad()
def greedy(model: Any) -> Any:
    return model.generate(token_ids(1, seed=1), **OPTIONS)


@torch.no_grad()
def beams(model: Any) -> Any:
    return model.generate(token_ids(1, seed=2), num_beams=3, **OPTIONS)


@torch.no_grad()
def forward(model: Any) -> Any:
    return model(token_ids(2, seed=3)).logits


@torch.no_grad()
def stored(model: Any) -> Any:
    state = model.state_dict()
    return torch.cat([tensor.float().flatten() for tensor in state.values()])


@torch.no_grad()
def expanded(model: Any) -> Any:
    return copy.deepcopy(model).model.layers[0].mlp.up_proj.dequantize()


def gradient(model: Any) -> Any:
    embeds = model.get_input_embeddings()(token_ids(1, seed=4)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.square().sum().backward()
    return embeds.grad


TOGETHER: dict[str, list[Callable[[Any], Any]]] = {
    "two answers": [greedy, greedy],
    "three answers": [greedy, greedy, greedy],
    "beams and texts": [beams, forward, greedy],
    "saving and copying": [greedy, stored, expanded],
    "gradients": [gradient, gradient, greedy],
}


@pytest.mark.parametrize("calls", TOGETHER)
def test_first_calls_at_once_give_what_each_gives_alone(loaded: Any, calls: str) -> None:
    wanted = [call(copy.deepcopy(loaded)) for call in TOGETHER[calls]]
    for _ in range(max(2, int(3 * FACTOR))):
        model, barrier = copy.deepcopy(loaded), threading.Barrier(len(wanted))
        results: list[Any] = [None] * len(wanted)

        def work(place: int, model: Any = model, barrier: Any = barrier, results: Any = results) -> None:
            barrier.wait()
            for _ in range(2):
                try:
                    results[place] = TOGETHER[calls][place](model)
                except Exception as error:
                    results[place] = error
                    return

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(wanted))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for got, one in zip(results, wanted, strict=True):
            assert isinstance(got, torch.Tensor), repr(got)
            assert torch.equal(got, one)


def test_threads_that_begin_at_once_load_the_kernels_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built, barrier, found = [], threading.Barrier(4), []

    def build(folder: Path, instructions: str) -> Path:
        built.append(folder)
        os.sched_yield()
        raise kernels.BuildError("there is no compiler")

    def work() -> None:
        barrier.wait()
        found.append(kernels.ready())

    monkeypatch.setattr(kernels, "build", build)
    kernels.ready.cache_clear()
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (found, len(built)) == ([False] * 4, 1)
        assert len([warning for warning in seen if "there is no compiler" in str(warning.message)]) == 1
    finally:
        kernels.ready.cache_clear()
