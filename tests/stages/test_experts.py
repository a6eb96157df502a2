"""Stage 1's statistics of an expert, and its training, against float64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.experts import Trial, centres, cut
from lbllm.models.blocks import decoder_blocks
from lbllm.sections import WatConfig
from lbllm.stages.experts import PRIOR, LayerInputs, statistics
from lbllm.stages.routing import enter, linear_in_sum, resumed, summed
from lbllm.streams import Streams
from tests.helpers.tiny_models import tiny

CPU = torch.device("cpu")


def small_trial(tokens: int = 96) -> Trial:
    mlp = decoder_blocks(tiny("llama")[0])[1][0].get_submodule("mlp").requires_grad_(False)
    x = [torch.randn(tokens // 16, 16, 48, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return Trial(cut(mlp, 3, 2, x[0].flatten(0, -2)), x)


def test_a_hessian_is_shrunk_to_that_of_the_layer_by_its_number_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(40, 8, generator=generator) for _ in range(2))
    weights = torch.rand(40, generator=generator)
    rows = torch.tensor([3, 4, 9])
    layer = statistics(x, target, weights, CPU)
    own = statistics(x[rows], target[rows], weights[rows], CPU)
    hessian, drift = own.mean_with(layer)
    a, b, w, more = x.double(), target.double(), weights.double(), PRIOR * 8

    def sums(part: Any) -> tuple[Tensor, Tensor]:
        weighted = a[part] * w[part, None]
        return weighted.t() @ a[part], (b[part] - a[part]).t() @ weighted

    for found, one, every in zip((hessian, drift), sums(rows), sums(slice(None)), strict=True):
        torch.testing.assert_close(found.double(), (one + more * every / 40) / (3 + more), rtol=0, atol=1e-5)
    none = statistics(x[:0], target[:0], weights[:0], CPU).mean_with(layer)[0]
    torch.testing.assert_close(none.double(), sums(slice(None))[0] / 40, rtol=0, atol=1e-5)


def test_a_block_in_two_passes_is_the_block_itself() -> None:
    trial = small_trial()
    mixture, x = trial.mixture, trial.seen[0]
    streams, plain = Streams(torch.float32, None), contextlib.nullcontext
    entered = enter(mixture, x, {}, 2, streams, plain)
    assert sum(len(one.rows) for one in entered.routed(3).values()) == 2 * 96
    total = summed(mixture.experts, entered, streams, CPU, plain)
    again = torch.cat(list(resumed(mixture, x, {}, 2, total, plain)))
    torch.testing.assert_close(again, mixture(x), rtol=0, atol=1e-6)
    assert linear_in_sum(mixture, x[:1], {}, total, plain) == pytest.approx(1, abs=1e-3)


def test_experts_that_train_one_by_one_get_as_near_as_together() -> None:
    trial = small_trial()
    config = WatConfig(tokens=96, batch_tokens=16, epochs=4, lr_weight=0.02)
    start = trial.initialize()
    before = trial.errors(start[0])["trained"]
    found = {}
    for name in ("together", "one_by_one"):
        student, latents = trial.initialize()
        getattr(trial, name)(student, latents, config)
        found[name] = trial.errors(student)["trained"]
    assert found["one_by_one"] < before
    assert found["one_by_one"] < 1.2 * found["together"]


def test_the_router_of_clusters_has_a_row_for_each() -> None:
    assert centres(torch.randn(50, 6), 4).shape == (4, 6)


def test_an_expert_without_tokens_gets_the_layers_statistics() -> None:
    trial = small_trial()
    layer = LayerInputs.of(trial.entered, trial.entered.x, CPU)
    assert layer.all.tokens == 96
    assert len(layer.sample) == 96
    assert int(layer.sample.max()) < 96
