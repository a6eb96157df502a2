"""Stage 3, activation-aware refinement: 4-bit activations and KV cache with the bits of the weights fixed.

Latent weights and bitmap are frozen; trained are the group parameters (alpha, mu) and each input's knee and clips,
block by block against the full-precision teacher, with quantized activations inside the block and in the stream that
enters it. The knee starts from a search: without a good first knee 4-bit activations destroy the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lbllm.models.blocks import BlockCall, layer_inputs
from lbllm.quant.activations import ActQuantizer, decode, encode, make_grid
from lbllm.quant.kv_cache import TrainingCache
from lbllm.quant.levels import from_groups
from lbllm.sections import AarConfig
from lbllm.stages.distill import Step, binary_layers, distill

# Candidates of the first search: the body's share of a token's range, and both clips. A clip below 1 never won it in
# trials on the embedded model; training moves the clips.
KNEES = (0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.37, 0.45, 0.6, 0.8, 1.0)
CLIPS = (1.0,)


@torch.no_grad()
def search_grid(quantizer: ActQuantizer, x: Tensor, weight: Tensor) -> float:
    """Set a quantizer's knee and clips to the best of a small grid for inputs (tokens, in) of a weight (out, in).

    Best: the least output error relative to each token's output energy, averaged. Returns that error.
    """
    ranges, clean = quantizer.ranges(x), x @ weight.t()
    energy = clean.square().sum(-1).clamp_min(1e-12)
    best, choice = float("inf"), (1.0, 1.0)
    knees = KNEES if quantizer.tail else (1.0,)
    for clip in CLIPS if quantizer.tail else (1.0,):
        for knee in knees:
            share, end = x.new_tensor(knee), x.new_tensor(clip)
            grid = make_grid(ranges, share, end, end, quantizer.bits, quantizer.tail)
            rounded = decode(encode(ranges, grid, quantizer.bits, quantizer.tail), grid)
            noisy = from_groups(rounded, x.shape[-1]) @ weight.t()
            error = float(((noisy - clean).square().sum(-1) / energy).mean())
            if error < best:
                best, choice = error, (knee, clip)
    quantizer.act.data.copy_(x.new_tensor([choice[0], choice[1], choice[1]]))
    return best


def add_quantizers(
    block: nn.Module,
    sharing: list[list[str]],
    call: BlockCall,
    inputs: Tensor,
    config: AarConfig,
    *,
    tail: int,
    kv_bits: int,
    batch: int,
) -> None:
    """Give each layer of a block a searched quantizer, in the order of use; layers that share an input share the
    quantizer.

    ``sharing``: the layers' names grouped by input, as ``shared_inputs`` gives them.
    """
    layers = binary_layers(block)
    cache = TrainingCache(kv_bits) if kv_bits < 16 else None
    tokens = max(1, -(-config.search_tokens // inputs.shape[1]))
    for names in sharing:
        for bits in sorted({layers[name].fmt.act_bits for name in names if name in layers}):
            if bits == 16:
                continue
            same = [layers[name] for name in names if name in layers and layers[name].fmt.act_bits == bits]
            first = next(name for name in names if layers.get(name) is same[0])
            x = torch.cat(list(layer_inputs(block, first, inputs[:tokens], call, batch, cache)))[: config.search_tokens]
            quantizer = ActQuantizer(bits, tail, config.temperature, group_size=same[0].fmt.act_group_size).to(x.device)
            search_grid(quantizer, x.float(), torch.cat([layer.weight().detach() for layer in same]))
            for layer in same:
                layer.quantizer = quantizer


def aar_block(
    block: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    config: AarConfig,
    *,
    kv_bits: int,
    seed: int,
    autocast: Any,
) -> Iterator[Step]:
    """Stage 3 on a block of frozen ``BinaryLinear`` layers that have their quantizers; knees and clips stay in their
    ranges."""
    groups: list[dict[str, Any]] = []
    for layer in binary_layers(block).values():
        scale = float(layer.weight().detach().std())
        groups.append({"params": [layer.params], "lr": config.lr_levels * scale})
    yield from distill(
        block,
        call,
        inputs,
        targets,
        groups,
        config,
        lr_act=config.lr_act,
        loss_kind="relative",
        kv_bits=kv_bits,
        seed=seed,
        autocast=autocast,
    )
