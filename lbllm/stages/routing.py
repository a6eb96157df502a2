"""What reaches the experts of a block, for all tokens of a stage: inputs and choices, and the sum that they return.

A block with experts is computed in two passes. The first ends at the experts and keeps what they are called with. Then
each expert computes all of its tokens at once, so that its weights are needed once, and the weighted outputs are added
up. The second pass gives the block this sum in place of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm.models.blocks import Captured, device_of, entering, run_block
from lbllm.models.calls import BlockCall
from lbllm.models.experts import Experts, Routed, answering, experts_of, routed
from lbllm.streams import Streams

# Rows that one expert computes at the same time.
ROWS = 4_096


@dataclass
class Entered:
    """What the experts of a block are called with for all tokens of a stage.

    ``x`` (rows, in): the inputs, in the dtype of the streams; ``chosen`` and ``weights`` (rows, k): the experts of each
    row, and what their outputs are multiplied by; ``token`` (rows,): which token a row belongs to. The rows are the
    tokens themselves, except for experts that get sorted tokens. All on the CPU.
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor
    token: Tensor
    tokens: int

    def routed(self, count: int) -> dict[int, Routed]:
        """The rows of each expert that has some, by its number."""
        return {one.expert: one for one in routed(self.chosen, count)}

    def factors(self, one: Routed) -> Tensor:
        """What the outputs of an expert's rows are multiplied by, (rows, 1)."""
        return self.weights[one.rows, one.places, None]


@torch.no_grad()
def enter(
    block: nn.Module, stream: Tensor, call: BlockCall, batch: int, streams: Streams, autocast: Any, cache: Any = None
) -> Entered:
    """Run a block on hidden states (n, T, hidden) up to its experts, and return what these are called with."""
    found = experts_of(block)
    assert found is not None
    experts, device = found[1], device_of(block)
    box: list[tuple[Tensor, Tensor, Tensor]] = []

    def stop(hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        box.append((x, *experts.choices(x, (*routing, *named.values()))))
        raise Captured

    tokens = stream.shape[0] * stream.shape[1]
    x, chosen_rows, weight_rows, token_rows = (streams.rows(tokens) for _ in range(4))
    done = 0
    with answering(experts, stop):
        for part in stream.split(batch):
            try:
                with autocast():
                    run_block(block, entering(part, device), call, cache)
            except Captured:
                pass
            rows, chosen, weights = (tensor.cpu() for tensor in box.pop())
            count = part.shape[0] * part.shape[1]
            token = torch.arange(len(rows)) % count + done
            if experts.form.sorted_tokens:
                kept = chosen[:, 0] < experts.count
                rows, chosen, weights, token = rows[kept], chosen[kept], weights[kept], token[kept]
            x.append(rows.to(streams.dtype))
            chosen_rows.append(chosen)
            weight_rows.append(weights.float())
            token_rows.append(token)
            done += count
    return Entered(x.joined(), chosen_rows.joined(), weight_rows.joined(), token_rows.joined(), tokens)


def outputs(
    experts: Experts, expert: nn.Module, entered: Entered, one: Routed, device: torch.device, autocast: Any
) -> Tensor:
    """Return the weighted outputs (rows, out) of one expert for its rows, float32 on the CPU."""
    found = []
    for rows, factors in zip(one.rows.split(ROWS), entered.factors(one).split(ROWS), strict=True):
        with autocast():
            part = experts.output(expert, entering(entered.x[rows], device)) * factors.to(device)
        found.append(part.float().cpu())
    return torch.cat(found)


@torch.no_grad()
def summed(
    experts: Experts,
    entered: Entered,
    streams: Streams,
    device: torch.device,
    autocast: Any,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the weighted sum (tokens, out) of all experts for each token, float32. Each expert is made once."""
    total = streams.empty(entered.tokens, entered.x.shape[1], dtype=torch.float32).zero_()
    for number, one in entered.routed(experts.count).items():
        check()
        found = outputs(experts, experts.expert(number), entered, one, device, autocast)
        total.index_add_(0, entered.token[one.rows], found)
    return total


@torch.no_grad()
def resumed(
    block: nn.Module, stream: Tensor, call: BlockCall, batch: int, total: Tensor, autocast: Any, cache: Any = None
) -> Iterator[Tensor]:
    """Yield a block's outputs for hidden states (n, T, hidden), ``batch`` sequences at a time, whose experts return the
    sums ``total`` (tokens, out)."""
    found = experts_of(block)
    assert found is not None
    device, done = device_of(block), 0

    def answer(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        part = total[done : done + count].to(hidden.device, hidden.dtype)
        if not found[1].form.sorted_tokens:
            return part.view_as(hidden)
        result = torch.zeros_like(hidden)  # the block adds up what it gets for each expert
        result[:count] = part
        return result

    for part in stream.split(batch):
        count = part.shape[0] * part.shape[1]
        with answering(found[1], answer), autocast():
            output = run_block(block, entering(part, device), call, cache)
        yield output
        done += count


@torch.no_grad()
def linear_in_sum(
    block: nn.Module, stream: Tensor, call: BlockCall, total: Tensor, autocast: Any, cache: Any = None
) -> float | None:
    """Return by what a block multiplies the sum of its experts before it adds it to its output, or None where the sum
    enters in another way, for example through a norm. ``stream``: one sequence (1, T, hidden)."""
    part = total[: stream.shape[1]]
    scale = float(part.square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(0)
    step = scale * torch.randn(part.shape, generator=generator)
    (before,), (after,) = (
        [out.float().cpu().flatten(0, -2) for out in resumed(block, stream, call, 1, sums, autocast, cache)]
        for sums in (part, part + step)
    )
    change = after - before
    factor = float((change * step).sum() / step.square().sum())
    apart = float((change - factor * step).norm() / change.norm().clamp_min(1e-30))
    return factor if apart < 0.02 and factor > 0 else None
