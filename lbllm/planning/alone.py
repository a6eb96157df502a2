"""Each layer binarized alone, on the inputs that it gets in the teacher: its weight in one format, and its error in
every format.

The error is what stage 1 minimizes. With error compensation it is the sum, over a layer's weights, of their squared
error divided by the squared diagonal of U, the Cholesky factor of the inverse Hessian (GPTQ, Frantar et al. 2023). The
compensated weights are spread about as the weights themselves, so clustering some rows gives it without going through
the columns, for each format in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbllm.models.blocks import linear_weight
from lbllm.models.teacher import Teacher
from lbllm.planning.stage_one import Step, Stream
from lbllm.quant.levels import assign, group_length, take_levels, to_groups
from lbllm.quant.packing import stored_levels
from lbllm.quant.table import fit_format
from lbllm.sections import LayerFormat, PtqConfig
from lbllm.stages.hessians import factorize, input_statistics
from lbllm.stages.ptq import binarize_together, by_format, rounded_weight, to_layer

# At most about so many weights of a layer tell its errors.
SAMPLE = 2**15


@torch.no_grad()
def alone(
    teacher: Teacher,
    reference: Sequence[Mapping[str, LayerFormat]],
    formats: Sequence[LayerFormat],
    sequences: Tensor,
    config: PtqConfig,
    autocast: Any,
    step: Step,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Return each layer's weight (out, in), bfloat16, after stage 1 in its ``reference`` format, without the error of
    other layers; and its errors in ``formats`` as shares of its error in the reference format. Both by full name.

    ``reference``: for each block the layers to binarize; ``sequences``: token ids (n, T).
    """
    stream = Stream(teacher, sequences, autocast)
    weights: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {}
    for number, chosen in enumerate(reference):
        step(number, len(reference))
        block, path = stream.blocks[number], f"{stream.path}.{number}"
        sharing, inputs = stream.taught(number)
        for names in sharing:
            wanted = [name for name in names if name in chosen]
            if not wanted:
                continue
            seen = inputs[names[0]]
            factors = factorize(input_statistics(iter(seen), iter(seen))[0], config.damping)
            for fmt, same in by_format(wanted, dict(chosen)):
                solved = binarize_together(block, same, factors[0], fmt, config, factors=factors)
                for name, result in solved.items():
                    source = block.get_submodule(name)
                    weights[f"{path}.{name}"] = rounded_weight(to_layer(source, fmt, result)).bfloat16()
            for name in wanted:
                weight = linear_weight(block.get_submodule(name))
                first, *found = clustering_errors(weight, factors[1], (chosen[name], *formats), config.em_steps)
                errors[f"{path}.{name}"] = [error / max(first, 1e-30) for error in found]
    return weights, errors


def clustering_errors(weight: Tensor, factor: Tensor, formats: Sequence[LayerFormat], em_steps: int) -> list[float]:
    """For each format the sum, over some rows of a weight (out, in), of squared error over squared diagonal of U (in,
    in), ``factor``, where each group has the levels that fit it best, rounded as a checkpoint stores them."""
    rows = weight[:: max(1, weight.numel() // SAMPLE)].float().contiguous()
    importance = factor.diagonal().square().reciprocal()[None]
    fitted: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
    found = []
    for fmt in formats:
        length = group_length(fmt.group_size, weight.shape[1])
        groups, counted = to_groups(rows, length), to_groups(importance, length)
        if (fmt.format, length) not in fitted:
            fitted[fmt.format, length] = fit_format(groups, counted, fmt.format, em_steps)
        levels, table = fitted[fmt.format, length]
        levels = stored_levels(levels, fmt.param_bits, table)
        missing = groups - take_levels(levels, assign(groups, levels))
        found.append(float((missing.square_() * counted).sum(dtype=torch.float64)))
    return found
