"""Stage 3, activation-aware refinement: train with 4-bit activations and KV cache while the weights' bits stay fixed.

The stage trains the group parameters (alpha, mu) and the knee and clips of each input. It goes block by block, with the
full-precision teacher as target. Activations are quantized inside the block and in the blocks before it. A search sets
the first knee: without a good one, 4-bit activations destroy the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lbllm import ranks
from lbllm.models.blocks import layer_inputs
from lbllm.models.calls import BlockCall
from lbllm.quant.activations import ActQuantizer, decode, encode, make_grid
from lbllm.quant.levels import from_groups
from lbllm.quant.training_layer import BinaryLinear
from lbllm.ranks import Share
from lbllm.sections import AarConfig
from lbllm.stages.distill import HeldOut, Step, binary_layers, distill

# Candidates of the first search: the body's share of a range, and both clips. In trials on the embedded model, a clip
# below 1 was never the best first value; training moves the clips.
KNEES = (0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.37, 0.45, 0.6, 0.8, 1.0)
CLIPS = (1.0,)
OUTPUTS = 2**26


@torch.no_grad()
def search_grid(quantizer: ActQuantizer, x: Tensor, weight: Tensor, *, counts: bool = True) -> float:
    """Set a quantizer's knee and clips to the best candidates for inputs x (tokens, in) of a weight (out, in).

    The best candidates have the smallest output error relative to the token's output energy, averaged over the tokens
    of all ranks whose tokens are to count. Returns that error. Where a layer is so large that its outputs for all
    tokens would take more than OUTPUTS numbers, the tokens are measured in parts.
    """
    candidates = [(knee, clip) for clip in CLIPS for knee in KNEES] if quantizer.tail else [(1.0, 1.0)]
    sums: list[Tensor] = []
    for part in x.split(max(1, OUTPUTS // len(weight))):
        ranges, clean = quantizer.ranges(part), part @ weight.t()
        energy = clean.square().sum(-1).clamp_min(1e-12)
        for knee, clip in candidates:
            share, end = x.new_full((), knee), x.new_full((), clip)
            grid = make_grid(ranges, share, end, end, quantizer.bits, quantizer.tail)
            rounded = decode(encode(ranges, grid, quantizer.bits, quantizer.tail), grid)
            noisy = from_groups(rounded, x.shape[-1]) @ weight.t()
            sums.append((noisy.sub_(clean).square_().sum(-1) / energy).sum())
    errors = (torch.stack(sums).view(-1, len(candidates)).sum(0) / len(x)).tolist()  # the only copy from the device
    errors = [ranks.mean(error, counts * len(x)) for error in errors]
    # An error that is NaN is not the least.
    best = min(range(len(errors)), key=lambda at: (math.isnan(errors[at]), errors[at]))
    knee, clip = candidates[best]
    quantizer.act.data.copy_(torch.tensor([knee, clip, clip]))
    return float(errors[best])


def add_quantizers(
    block: nn.Module,
    sharing: list[list[str]],
    call: BlockCall,
    inputs: Tensor,
    config: AarConfig,
    *,
    tail: int,
    cache: Any = None,
    batch: int,
    share: Share | None = None,
) -> None:
    """Add a quantizer with searched knee and clips to each layer of a block, in the order in which the block uses them.

    Layers with the same input and the same bits share a quantizer. ``sharing``: the layers' names grouped by input, as
    returned by ``shared_inputs``. ``cache`` replaces the block's KV cache (``training_cache``).
    """
    layers = binary_layers(block)
    tokens = (share or Share(len(inputs))).of_first(max(1, -(-config.search_tokens // inputs.shape[1])))
    for names in sharing:
        for bits in sorted({layers[name].fmt.act_bits for name in names if name in layers}):
            if bits == 16:
                continue
            same = [layers[name] for name in names if name in layers and layers[name].fmt.act_bits == bits]
            first = next(name for name in names if layers.get(name) is same[0])
            seen = inputs[: max(1, tokens)]
            x = torch.cat(list(layer_inputs(block, first, seen, call, batch, cache)))[: config.search_tokens]
            quantizer = ActQuantizer(bits, tail, config.temperature, group_size=same[0].fmt.act_group_size).to(x.device)
            search_grid(quantizer, x.float(), stacked_weights(same), counts=tokens > 0)
            for layer in same:
                layer.quantizer = quantizer


def stacked_weights(layers: list[BinaryLinear]) -> Tensor:
    """Return the weights of layers with the same input, one below the other: (sum of out, in)."""
    first, rows = layers[0], 0
    stacked = first.params.new_empty(sum(layer.out_features for layer in layers), first.in_features)
    for layer in layers:
        stacked[rows : rows + layer.out_features] = layer.expand(stacked.dtype)
        rows += layer.out_features
    return stacked


def aar_block(
    block: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    config: AarConfig,
    *,
    cache: Any = None,
    seed: int,
    autocast: Any,
    held_out: HeldOut | None = None,
    share: Share | None = None,
) -> Iterator[Step]:
    """Run stage 3 on a block of frozen ``BinaryLinear`` layers with quantizers; yields each training step.

    ``inputs`` and ``targets`` are (n, T, hidden); ``cache`` replaces the block's KV cache. Knees and clips stay in
    their ranges.
    """
    groups: list[dict[str, Any]] = []
    for layer in binary_layers(block).values():
        scale = float(layer.expand(layer.params.dtype).std())
        groups += layer.level_groups(config.lr_levels * scale)
    yield from distill(
        block,
        call,
        inputs,
        targets,
        groups,
        config,
        lr_act=config.lr_act,
        loss_kind=config.loss,
        cache=cache,
        seed=seed,
        autocast=autocast,
        held_out=held_out,
        share=share,
    )
