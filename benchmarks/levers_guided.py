"""Stage 1 with Hessians that are weighted by the squared gradient of the end loss, one for each group of a layer's
outputs (GuidedQuant, Kim et al. 2025; YAQA, Tseng et al. 2025), tried on the first blocks of a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.levers_blocks import BATCH, FirstBlocks
from lbllm.measure.gradients import output_gradients
from lbllm.models.blocks import (
    all_inputs,
    layer_inputs,
    linear_layers,
    linear_weight,
    set_linear_weight,
    share_copy,
    shared_inputs,
)
from lbllm.quant.levels import from_groups, levels_to_params, params_to_levels, take_levels, to_groups
from lbllm.quant.packing import stored_params
from lbllm.sections import LayerFormat, PtqConfig
from lbllm.stages.hessians import correction_, factorize_, input_statistics
from lbllm.stages.ptq import binarize_rows


@dataclass(frozen=True)
class Guide:
    """How many groups the outputs of a layer have, each with a Hessian of its own, and whether it is weighted by the
    squared gradient; else all are the layer's usual Hessian, and only the grids of the groups are their own. ``most``:
    the largest weight of a token, over the mean."""

    groups: int
    weighted: bool = True
    most: float = 10.0


GUIDES: dict[str, Guide] = {
    "one Hessian for a layer": Guide(1, weighted=False),
    "weighted by the squared gradient": Guide(1),
    "4 output groups, weighted": Guide(4),
    "4 output groups, not weighted": Guide(4, weighted=False),
}

Weights = dict[str, Tensor]  # of a layer, by "block/layer": (tokens, groups), with mean 1


def token_weights(chain: FirstBlocks, guide: Guide) -> Weights:
    """The squared gradients of the layers of the first blocks, as means over the outputs of each group."""
    blocks = chain.bench.blocks[: chain.count]
    layers = {
        f"{number}/{name}": layer for number, block in enumerate(blocks) for name, layer in linear_layers(block).items()
    }
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def seen(name: str, entered: Tensor, grad: Tensor) -> None:
        means = torch.stack([part.square().mean(-1) for part in grad.tensor_split(guide.groups, -1)], -1)
        # The last token of a sequence predicts nothing, and no pass sees it.
        found[name].append(torch.cat([means, means.new_zeros(1, guide.groups)]))

    model = chain.bench.teacher.model
    output_gradients(model, layers, chain.sequences, seen, chain.bench.autocast)
    return {name: _bounded(torch.cat(parts), guide.most) for name, parts in found.items()}


def _bounded(weights: Tensor, most: float) -> Tensor:
    weights = weights / weights.mean(0).clamp_min(1e-30)
    weights = weights.clamp_max(most)
    return weights / weights.mean(0).clamp_min(1e-30)


@torch.no_grad()
def guided_blocks(chain: FirstBlocks, config: PtqConfig, guide: Guide) -> list[nn.Module]:
    """The first blocks after stage 1, as dense blocks with the binarized weights."""
    with torch.enable_grad():
        weights = token_weights(chain, guide) if guide.weighted else {}
    targets, inputs = chain.streams()
    finished: list[nn.Module] = []
    for number in range(chain.count):
        block, call = chain.bench.blocks[number], chain.calls[number]
        student: nn.Module = share_copy(block)
        with chain.bench.autocast():
            meant = all_inputs(block, targets, call, BATCH)
        for sharing in shared_inputs(block, inputs[:1], call):
            seen = list(layer_inputs(student, sharing[0], inputs, call, BATCH))
            for name in sharing:
                fmt = chain.bench.formats[number][name]
                own = weights.get(f"{number}/{name}")
                made = _binarized(
                    linear_weight(block.get_submodule(name)), seen, meant[sharing[0]], own, fmt, config, guide.groups
                )
                set_linear_weight(student.get_submodule(name), made)
        targets = chain.advance(block, targets, number)
        inputs = chain.advance(student, inputs, number)
        finished.append(student)
    return finished


def _binarized(
    weight: Tensor,
    seen: list[Tensor],
    meant: list[Tensor],
    weights: Tensor | None,
    fmt: LayerFormat,
    config: PtqConfig,
    groups: int,
) -> Tensor:
    """The rounded weight (out, in) of a layer whose output groups are solved one by one."""
    rows = [len(part) for part in weight.tensor_split(groups)]
    borders = [sum(rows[:number]) for number in range(groups + 1)]
    parts = []
    for number, (begin, end) in enumerate(pairwise(borders)):
        scales = _scales(weights, number, seen)
        hessian, drift = input_statistics(
            [x.float() * scale for x, scale in zip(seen, scales, strict=True)],
            [x.float() * scale for x, scale in zip(meant, scales, strict=True)],
        )
        correction = correction_(hessian, drift, config)
        result = binarize_rows([weight[begin:end]], factorize_(hessian, config.damping), fmt, config, correction)
        levels = params_to_levels(stored_params(levels_to_params(result.levels), fmt.param_bits, result.grid))
        length = -(-weight.shape[1] // levels.shape[1]) if fmt.group_size == -1 else fmt.group_size
        parts.append(from_groups(take_levels(levels, to_groups(result.index, length)), weight.shape[1]))
    return torch.cat(parts)


def _scales(weights: Tensor | None, group: int, seen: list[Tensor]) -> list[Tensor]:
    """What each token's input is multiplied by, (tokens, 1): the Hessian of the products is the weighted one."""
    if weights is None:
        return [x.new_ones(1, 1) for x in seen]
    roots = weights[:, group, None].sqrt()
    return list(roots.split([len(x) for x in seen]))
