"""Other methods on the experts of a block: Hessians of the tokens that are routed to each, shrunk as in stage 1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lbllm.models.blocks import device_of
from lbllm.models.calls import BlockCall
from lbllm.models.experts import experts_of
from lbllm.stages.experts import LayerInputs, Statistics, statistics
from lbllm.stages.hessians import bounded
from lbllm.stages.routing import enter
from lbllm.streams import Streams


@torch.no_grad()
def quantize_experts(
    block: nn.Module, hidden: Tensor, call: BlockCall, batch: int, quantize: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Quantize all layers of a block's experts in place, if it has some, calibrated on hidden states (n, T, hidden).

    ``quantize(name, layer, hessian)`` changes one layer; ``name`` is that in the block.
    """
    found = experts_of(block)
    if found is None:
        return
    path, experts = found
    device = device_of(block)
    entered = enter(block, hidden, call, batch, Streams(torch.float32, None), contextlib.nullcontext)
    layer, rows = LayerInputs.of(entered, entered.x, device), entered.routed(experts.count)
    for number in range(experts.count):
        expert, one = experts.expert(number), rows.get(number)
        own = torch.zeros(0, dtype=torch.long) if one is None else one.rows

        def apply(names: list[str], seen: Statistics, prior: Statistics, number: int = number) -> None:
            hessian, _ = seen.mean_with(prior)
            for name in names:
                quantize(f"{path}.{number}.{name}", experts.expert(number).get_submodule(name), hessian)

        first = [name for name, _ in expert.named_children() if name != "down_proj"]
        x = entered.x[own]
        apply(first, statistics(x, x, layer.weights[own], device), layer.all)
        inner = experts.inner(expert, entered.x[torch.cat([own, layer.sample])].to(device))
        weights, count = bounded(inner.square().sum(1)), len(own)
        seen, prior = (
            statistics(inner[part], inner[part], weights[part], device) for part in (slice(count), slice(count, None))
        )
        apply(["down_proj"], seen, prior)
