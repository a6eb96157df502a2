"""How much each layer's error contributes to the divergence of a binarized model from its teacher.

The divergence of a model whose layers have all moved a share t of the way from the teacher's weights W to binarized
ones V is K(t), with K(0) = 0. Its derivative is a sum over the layers, so

    K(1) = sum over layers of  integral from 0 to 1 of  <dK/dW_l at t, V_l - W_l> dt

divides K(1) among the layers exactly: each term says what a layer costs while all others have errors, too (Aumann and
Shapley 1974; as a way to explain networks, Sundararajan et al. 2017). The integral is taken by Gauss and Legendre's
rule, with a forward and a backward pass for each of its points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lbllm.measure.gradients import output_gradients
from lbllm.models.blocks import linear_weight, set_linear_weight, share_copy
from lbllm.models.teacher import Teacher
from lbllm.planning.stage_one import Step

POINTS = 4


def shares(
    teacher: Teacher, weights: Mapping[str, Tensor], sequences: Tensor, autocast: Any, step: Step
) -> dict[str, float]:
    """Divide the mean KL(teacher || model) on token ids (n, T), in nats per token, of the teacher with other
    ``weights`` (out, in), by full name, among these layers."""
    model = share_copy(teacher.model)
    layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in weights}
    moved = {name: weights[name].float() - linear_weight(teacher.model.get_submodule(name)).float() for name in weights}
    found = dict.fromkeys(weights, 0.0)
    targets = _Targets(teacher, autocast)
    points, factors = numpy.polynomial.legendre.leggauss(POINTS)
    tokens = sequences[:, 1:].numel()
    for number, (point, factor) in enumerate(zip(points, factors, strict=True)):
        step(number, POINTS)
        place, part = (float(point) + 1) / 2, float(factor) / 2 / tokens
        for name, layer in layers.items():
            set_linear_weight(layer, linear_weight(teacher.model.get_submodule(name)).float() + place * moved[name])

        def seen(name: str, entered: Tensor, grad: Tensor, part: float = part) -> None:
            found[name] += part * float(((entered @ moved[name].t()).mul_(grad)).sum(dtype=torch.float64))

        output_gradients(model, layers, sequences, seen, autocast, targets.loss)
    return found


class _Targets:
    """The loss KL(teacher || model), summed over the predictions of a sequence; the teacher computes it anew."""

    def __init__(self, teacher: Teacher, autocast: Any) -> None:
        self.teacher, self.autocast = teacher, autocast

    def loss(self, sequence: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad(), self.autocast():
            log_p = self.teacher.model(input_ids=sequence[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        return nn.functional.kl_div(logits.float().log_softmax(-1), log_p, reduction="sum", log_target=True)
