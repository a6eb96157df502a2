"""Levers of stage 4, tried from one common start, and what a restart from a packed checkpoint costs.

A trial is stage 4 as a run has it, with one change: a setting, or a rule that is not part of the stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.levers_model import Bench, State
from lbllm.errors import LbllmError
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.quant.levels import assign, from_groups, to_groups
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import E2eConfig
from lbllm.stages.block_state import collect
from lbllm.stages.distill import binary_layers
from lbllm.stages.e2e import EndToEnd

RELATED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class EndLever:
    """What a trial changes. ``settings``: of stage 4.

    ``pull``: the part of the way to its level that each latent weight is moved after every ``pull_every`` steps.
    ``noise``: normal noise in the gradient of the latent weights, relative to its root mean square (both: WinQ).
    ``frozen``: the share of the steps at the end in which codes are fixed and levels go on.
    ``from_levels``: latent weights begin at their levels instead of where stage 1 left them.
    ``relations``: the weight of the loss on attention relations (BitDistill) of the block at ``late`` of the depth.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    pull: float = 0.0
    pull_every: int = 4
    noise: float = 0.0
    frozen: float = 0.0
    from_levels: bool = False
    relations: float = 0.0
    late: float = 0.8


END_LEVERS: dict[str, EndLever] = {
    "latent weights": EndLever(),
    "levels alone": EndLever({"lr_weight": 0.0}),
    "latents begin at their levels": EndLever(from_levels=True),
    "codes frozen for the last tenth": EndLever(frozen=0.1),
    "codes frozen for the last third": EndLever(frozen=1 / 3),
    "latents pulled by 0.1 every 4 steps": EndLever(pull=0.1),
    "latents pulled by 0.3 every 8 steps": EndLever(pull=0.3, pull_every=8),
    "gradient noise 0.3": EndLever(noise=0.3),
    "pulled by 0.1 every 4 steps, noise 0.3": EndLever(pull=0.1, noise=0.3),
    "token similarity, weight 1": EndLever({"gram_weight": 1.0}),
    "token similarity, weight 10": EndLever({"gram_weight": 10.0}),
    "outputs of blocks, weight 1": EndLever({"feature_weight": 1.0}),
    "attention relations, weight 1": EndLever(relations=1.0),
    "attention relations, weight 10": EndLever(relations=10.0),
}


def relation_error(student: Tensor, teacher: Tensor, width: int) -> Tensor:
    """KL(teacher || student) of the relations softmax(A A^T / sqrt(width)) between all tokens of a text, for each head
    of ``width`` features of A (T, features): a scalar, the mean over tokens and heads (BitDistill, after MiniLMv2)."""
    heads = [one.float().unflatten(-1, (-1, width)).transpose(0, 1) for one in (student, teacher)]
    ours, theirs = ((one @ one.mT / math.sqrt(width)).log_softmax(-1) for one in heads)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


class Trial(EndToEnd):
    """Stage 4 with a lever."""

    def __init__(self, lever: EndLever, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lever = lever
        self.random = torch.Generator().manual_seed(options["seed"])
        self.kept: list[dict[str, Tensor]] = [{}, {}]
        if lever.relations:
            for model, kept in zip((self.student, self.teacher), self.kept, strict=True):
                self._watch(model, kept)

    def _watch(self, model: nn.Module, kept: dict[str, Tensor]) -> None:
        """Keep the queries, keys and values of one late block in each pass."""
        blocks = decoder_blocks(model)[1] if model is self.teacher else self._student_blocks()
        block = blocks[math.floor(self.lever.late * len(blocks))]
        found = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
        for name in RELATED:
            if name not in found:
                raise LbllmError(f"attention relations need layers named {', '.join(RELATED)}; {name} is missing")

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                kept[name] = output

            found[name].register_forward_hook(keep)

    def _student_blocks(self) -> nn.ModuleList:
        # Binarized layers are no nn.Linear: the list is found by its place in the teacher.
        path = decoder_blocks(self.teacher)[0]
        blocks = self.student.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def compare(self, student: Any, teacher: Any, tokens: Tensor) -> Tensor:
        loss = super().compare(student, teacher, tokens)
        if self.lever.relations:
            width = self.student.config.hidden_size // self.student.config.num_attention_heads
            errors = [relation_error(self.kept[0][name][0], self.kept[1][name][0], width) for name in RELATED]
            loss = loss + self.lever.relations * torch.stack(errors).mean()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        lever, done = self.lever, self.step + 1
        latents = [(layer, layer.latent) for layer in self.layers if layer.latent is not None]
        if lever.noise:
            for _, latent in latents:
                assert latent.grad is not None
                size = lever.noise * latent.grad.square().mean().sqrt()
                latent.grad.add_(torch.randn(latent.shape, generator=self.random) * size)
        super().update()
        if lever.pull and done % lever.pull_every == 0:
            for layer, latent in latents:
                latent.lerp_(layer.weight(), lever.pull)
        if lever.frozen and done == round(len(self.order) * (1 - lever.frozen)):
            for layer in self.layers:
                layer.freeze()


def train(
    bench: Bench,
    states: list[State],
    latents: Sequence[dict[str, Tensor]],
    sequences: Tensor,
    config: E2eConfig,
    lever: EndLever,
    seed: int,
) -> tuple[list[State], float]:
    """Stage 4 of the model of ``states`` on token ids (n, T), from the latent weights of ``restarted``.

    Returns the new states, with latent weights, and the loss of the last step.
    """
    student, layers = bench.student(states)
    config = config.model_copy(update=lever.settings)
    training = Trial(
        lever,
        student,
        bench.teacher.model,
        layers,
        sequences,
        config,
        latents=[latent for block in latents for latent in block.values()] if config.lr_weight > 0 else (),
        seed=seed,
        autocast=bench.autocast,
    )
    steps = [step for step in training.steps() if step is not None]
    blocks = student.get_submodule(decoder_blocks(bench.teacher.model)[0])
    named = [binary_layers(block) for block in blocks.children()]
    kept = [
        {f"{name}.latent": layer.latent.half() for name, layer in layers.items() if layer.latent is not None}
        for layers in named
    ]
    training.freeze()
    ended = [collect(layers) | more for layers, more in zip(named, kept, strict=True)]
    return ended, steps[-1].loss


# Where latent weights begin again if only levels and codes are left.

Rule = Callable[[BinaryLinear, Tensor], Tensor]


def _cells(layer: BinaryLinear) -> tuple[Tensor, Tensor, Tensor]:
    """For each weight (out, in) of a frozen layer: its level, and the borders of the cell of that level, infinite
    outside the outer levels."""
    value = layer.weight().detach()
    levels = layer.levels().detach().sort(-1).values
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    ends = torch.full_like(levels[..., :1], torch.inf)
    low, high = torch.cat((-ends, middles), -1), torch.cat((middles, ends), -1)
    index = assign(to_groups(value, layer.length), levels).long()
    below, above = (from_groups(one.gather(-1, index), layer.in_features) for one in (low, high))
    return value, below, above


def at_level(layer: BinaryLinear, teacher: Tensor) -> Tensor:
    """The level itself."""
    return layer.weight().detach()


def kept_or_level(layer: BinaryLinear, teacher: Tensor) -> Tensor:
    """The teacher's weight where it has the layer's code, else the level."""
    return layer.nearest_to(teacher)


def mid_cell(layer: BinaryLinear, teacher: Tensor) -> Tensor:
    """The middle of the level's cell; the level itself where the cell has only one border."""
    value, low, high = _cells(layer)
    return torch.where(low.isfinite() & high.isfinite(), (low + high) / 2, value)


def clipped(layer: BinaryLinear, teacher: Tensor) -> Tensor:
    """The teacher's weight, moved into the cell of the layer's code: at least a tenth of the way from border to level
    inside it."""
    value, low, high = _cells(layer)
    low = torch.where(low.isfinite(), low + 0.1 * (value - low), low)
    high = torch.where(high.isfinite(), high - 0.1 * (high - value), high)
    return teacher.to(value).maximum(low).minimum(high)


def halfway(layer: BinaryLinear, teacher: Tensor) -> Tensor:
    """Halfway between the level and ``clipped``."""
    return (layer.weight().detach() + clipped(layer, teacher)) / 2


def mirrored(layer: BinaryLinear, teacher: Tensor) -> Tensor:
    """The teacher's weight; where it is outside the cell, mirrored at the border into it, at most to the level."""
    value, low, high = _cells(layer)
    teacher = teacher.to(value)
    below, above = teacher < low, teacher >= high
    inside = torch.where(below, (2 * low - teacher).minimum(value), (2 * high - teacher).maximum(value))
    return layer.nearest_to(torch.where(below | above, inside, teacher))


RULES: dict[str, Rule] = {
    "teacher's weight where it has the code, else the level": kept_or_level,
    "the level": at_level,
    "the middle of the cell": mid_cell,
    "teacher's weight, clipped into the cell": clipped,
    "halfway from the level to the clipped weight": halfway,
    "teacher's weight, mirrored into the cell": mirrored,
}
WITH_LATENTS = "its latent weights"


@torch.no_grad()
def restarted(
    bench: Bench, states: list[State], rule: Rule | None, best: Sequence[dict[str, Tensor]] | None = None
) -> list[dict[str, Tensor]]:
    """The latent weights (out, in) to restart with, by layer for each block: those of ``states``, or for a rule new
    ones. ``best``: what the rule begins with instead of the teacher's weights."""
    latents: list[dict[str, Tensor]] = []
    for number, (student, state) in enumerate(zip(bench.restored(states), states, strict=True)):
        dense = linear_layers(bench.blocks[number])
        layers, found = binary_layers(student), {}
        for name, layer in layers.items():
            if rule is None:
                found[name] = state[f"{name}.latent"].float()
            else:
                found[name] = rule(layer, linear_weight(dense[name]) if best is None else best[number][name])
        latents.append(found)
    return latents


@torch.no_grad()
def agreement(bench: Bench, states: list[State]) -> float:
    """The share of weights whose code is that of the teacher's weight."""
    same = total = 0
    for block, student in zip(bench.blocks, bench.restored(states), strict=False):
        dense = linear_layers(block)
        for name, layer in binary_layers(student).items():
            weight = linear_weight(dense[name])
            same += int((layer.nearest_to(weight) == weight).sum())
            total += weight.numel()
    return same / total
