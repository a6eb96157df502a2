"""Levers of stages 1 and 2, tried on the first blocks of a model: what comes out is judged as a hybrid, whose other
blocks are the teacher's.

A trial of stage 2 is the stage as a run has it, with one change: a setting, or layers that compute their weight, or
pass on its gradient, in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.levers_model import Bench, State
from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    embedded_batches,
    entering,
    layer_inputs,
    linear_weight,
    run_block,
    share_copy,
    shared_inputs,
)
from lbllm.quant.levels import from_groups, to_groups
from lbllm.quant.training_layer import BinaryLinear, Mode
from lbllm.sections import PtqConfig, WatConfig
from lbllm.stages.block_state import collect, restore
from lbllm.stages.distill import binary_layers, distill, token_error
from lbllm.stages.hessians import align, correction_, damp_, input_statistics
from lbllm.stages.ptq import ptq_block
from lbllm.stages.wat import thaw_layers

BATCH = 4


class PulledLinear(BinaryLinear):
    """Latent weights are moved a part of the way to their levels after every few steps, and their gradient gets noise
    (WinQ); or codes are fixed for the last steps."""

    lever: BlockLever
    steps: int
    step = 0

    def expand_dense(self, dtype: torch.dtype) -> None:
        """Begin a step."""
        lever = self.lever
        with torch.no_grad():
            if self.latent is not None and lever.pull and self.step and self.step % lever.pull_every == 0:
                self.latent.lerp_(self.expand(self.latent.dtype), lever.pull)
            if lever.frozen and self.step == round(self.steps * (1 - lever.frozen)):
                self.freeze()
        self.step += 1
        super().expand_dense(dtype)

    @torch.no_grad()
    def pass_on(self, beta: float = 0.0, slope: Tensor | None = None) -> None:
        """Set the gradients, with noise that is the same if a step asks twice."""
        super().pass_on(beta, slope)
        if self.latent is not None and self.latent.grad is not None and self.lever.noise:
            random = torch.Generator().manual_seed(self.step * 1_000_003 + self.latent.numel())
            size = self.lever.noise * self.latent.grad.square().mean().sqrt()
            self.latent.grad.add_(torch.randn(self.latent.shape, generator=random) * size)


class SoftLinear(BinaryLinear):
    """A weight is the mean of its group's levels by their probabilities: a softmax of logits (out, n, g, K) over a
    temperature that falls to ``lever.coldest``. Nothing is drawn; at the end each weight takes its most probable level
    (GSQ, without its Gumbel noise)."""

    lever: BlockLever
    steps: int
    step = 0
    logits: nn.Parameter | None

    def thaw(self, latent: Tensor, mode: Mode) -> None:
        """Begin with probabilities that fall with the squared distance between latent weight and level."""
        with torch.no_grad():
            groups = to_groups(latent.to(self.params), self.length)[..., None]
            levels = self.levels().detach()
            spread = (levels.amax(-1) - levels.amin(-1))[..., None, None] / (levels.shape[-1] - 1)
            self.logits = nn.Parameter(-((groups - levels[..., None, :]) / spread.clamp_min(1e-8)).square() / 0.5)

    @property
    def temperature(self) -> float:
        """It falls evenly in its logarithm."""
        return float(self.lever.warmest ** (1 - self._share) * self.lever.coldest**self._share)

    @property
    def _share(self) -> float:
        return min(1.0, max(0, self.step - 1) / max(1, self.steps - 1))

    def trained(self) -> list[nn.Parameter]:
        """The logits and the group parameters."""
        return [self.params] if self.logits is None else [self.logits, self.params]

    def expand_dense(self, dtype: torch.dtype) -> None:
        """Begin a step."""
        self.step += 1
        super().expand_dense(dtype)

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) for the present temperature."""
        if self.logits is None:
            return super().expand(dtype)
        shares = (self.logits / self.temperature).softmax(-1)
        mean = (shares * self.levels()[..., None, :]).sum(-1)
        return from_groups(mean, self.in_features).to(dtype)

    @torch.no_grad()
    def pass_on(self, beta: float = 0.0, slope: Tensor | None = None) -> None:
        """Set the gradients of logits and group parameters."""
        if self.logits is None:
            super().pass_on(beta, slope)
            return
        assert self.gradient is not None
        grad = to_groups(self.gradient.to(self.params.dtype), self.length)[..., None]
        with torch.enable_grad():
            levels = self.levels()
        shares = (self.logits / self.temperature).softmax(-1)
        mean = (shares * levels.detach()[..., None, :]).sum(-1, keepdim=True)
        self.logits.grad = grad * shares * (levels.detach()[..., None, :] - mean) / self.temperature
        self.params.grad = None
        levels.backward((grad * shares).sum(-2))

    @torch.no_grad()
    def freeze(self) -> None:
        """Take the most probable level of each weight."""
        assert self.logits is not None
        self.index = from_groups(self.logits.argmax(-1).to(torch.uint8), self.in_features).contiguous()
        self.logits = None


@dataclass(frozen=True)
class BlockLever:
    """What a trial changes. ``settings``: of stage 2. ``layer``: the class of the layers in training. ``pull``,
    ``pull_every``, ``noise``, ``frozen``: of ``PulledLinear``, as in ``EndLever``. ``warmest``, ``coldest``,
    ``lr_logits``: of ``SoftLinear``."""

    settings: dict[str, Any] = field(default_factory=dict)
    layer: type[BinaryLinear] | None = None
    pull: float = 0.0
    pull_every: int = 4
    noise: float = 0.0
    frozen: float = 0.0
    warmest: float = 1.0
    coldest: float = 0.05
    lr_logits: float = 0.1


BLOCK_LEVERS: dict[str, BlockLever] = {
    "stage 2": BlockLever(),
    "twice the passes": BlockLever({"epochs": 2}),
    "both input streams": BlockLever({"streams": "both"}),
    "probabilities, rate 0.1": BlockLever(layer=SoftLinear),
    "probabilities, rate 0.03": BlockLever(layer=SoftLinear, lr_logits=0.03),
    "codes frozen for the last tenth, stage 2": BlockLever(layer=PulledLinear, frozen=0.1),
    "latents pulled by 0.1 every 4 steps, stage 2": BlockLever(layer=PulledLinear, pull=0.1),
    "pulled by 0.1 every 4 steps, noise 0.3, stage 2": BlockLever(layer=PulledLinear, pull=0.1, noise=0.3),
}


class FirstBlocks:
    """The first ``count`` blocks of a bench's teacher, on token ids (n, T)."""

    def __init__(self, bench: Bench, count: int, sequences: Tensor) -> None:
        self.bench, self.count, self.sequences = bench, count, sequences
        self.calls = capture_calls(bench.teacher.model, sequences[:1], count)

    def streams(self) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's stream (n, T, hidden) before the first block."""
        model = self.bench.teacher.model
        first = torch.cat(list(embedded_batches(model, self.sequences, BATCH, model.device))).bfloat16()
        return first, first.clone()

    @torch.no_grad()
    def advance(self, block: nn.Module, stream: Tensor, number: int) -> Tensor:
        """A stream (n, T, hidden) after a block."""
        with self.bench.autocast():
            parts = [run_block(block, entering(part, part.device), self.calls[number]) for part in stream.split(BATCH)]
        return torch.cat(parts).to(stream.dtype)

    def _finished(self, number: int, state: State) -> nn.Module:
        student: nn.Module = restore(self.bench.blocks[number], self.bench.formats[number], state, 0)
        for layer in binary_layers(student).values():
            layer.keep_dense()
        return student.requires_grad_(False)

    def stage_1(self, config: PtqConfig, binarize: Callable[..., Iterator[Any]] = ptq_block) -> Iterator[State]:
        """Stage 1, block by block: each state with latent weights."""
        targets, inputs = self.streams()
        for number in range(self.count):
            block, call = self.bench.blocks[number], self.calls[number]
            with self.bench.autocast():
                meant = all_inputs(block, targets, call, BATCH)
            state: State = {}
            for name, result, layer in binarize(
                block, share_copy(block), call, inputs, meant, self.bench.formats[number], config, BATCH
            ):
                state |= collect({name: layer}) | {f"{name}.latent": result.latent}
            del meant
            targets = self.advance(block, targets, number)
            inputs = self.advance(self._finished(number, state), inputs, number)
            yield state

    def stage_2(self, states: list[State], config: WatConfig, lever: BlockLever, seed: int) -> Iterator[State]:
        """Stage 2 from states with latent weights, block by block."""
        targets, inputs = self.streams()
        config = config.model_copy(update=lever.settings)
        for number, state in enumerate(states):
            entered, targets = targets, self.advance(self.bench.blocks[number], targets, number)
            trained = self._train(number, state, inputs, targets, entered, config, lever, seed * 1_000_003 + number)
            inputs = self.advance(self._finished(number, trained), inputs, number)
            yield trained

    @torch.no_grad()
    def optima(self, states: list[State], config: PtqConfig) -> list[dict[str, Tensor]]:
        """Where each weight (out, in) of a layer would be best if all others of its row stay as they are in ``states``,
        for what stage 1 minimizes: as stage 1's coordinate descent leaves its latent weights."""
        targets, inputs = self.streams()
        found: list[dict[str, Tensor]] = []
        for number, state in enumerate(states):
            block, call = self.bench.blocks[number], self.calls[number]
            with self.bench.autocast():
                meant = all_inputs(block, targets, call, BATCH)
            student = self._finished(number, state)
            layers, best = binary_layers(student), {}
            for sharing in shared_inputs(block, inputs[:1], call):
                seen = layer_inputs(student, sharing[0], inputs, call, BATCH)
                hessian, drift = input_statistics(seen, meant[sharing[0]])
                correction = correction_(hessian, drift, config)
                damp_(hessian, config.damping)
                for name in sharing:
                    value = layers[name].weight().detach()
                    missing = align(linear_weight(block.get_submodule(name)), correction, config) - value
                    best[name] = value + (missing @ hessian) / hessian.diagonal()
            targets = self.advance(block, targets, number)
            inputs = self.advance(student, inputs, number)
            found.append(best)
        return found

    def error(self, states: list[State], judged: Tensor) -> float:
        """The relative error of what comes out of the last of the first blocks for token ids (n, T), which is cheaper
        than a whole model: the mean of ``token_error``."""
        other = FirstBlocks(self.bench, self.count, judged)
        targets, inputs = (stream.float() for stream in other.streams())
        for number, state in enumerate(states):
            targets = other.advance(self.bench.blocks[number], targets, number)
            inputs = other.advance(self._finished(number, state), inputs, number)
        return float(token_error(inputs, targets))

    def _train(
        self,
        number: int,
        state: State,
        inputs: Tensor,
        targets: Tensor,
        entered: Tensor,
        config: WatConfig,
        lever: BlockLever,
        seed: int,
    ) -> State:
        student: nn.Module = restore(self.bench.blocks[number], self.bench.formats[number], state, 0)
        layers = binary_layers(student)
        batch = max(1, config.batch_tokens // inputs.shape[1])
        for layer in layers.values():
            if lever.layer is not None:
                layer.__class__ = lever.layer
                layer.lever, layer.steps = lever, config.epochs * -(-len(inputs) // batch)  # type: ignore[assignment]
        latents = {name: state[f"{name}.latent"].float() for name in layers}
        for _ in distill(
            student,
            self.calls[number],
            inputs,
            targets,
            _groups(layers, latents, config, lever),
            config,
            loss_kind=config.loss,
            seed=seed,
            autocast=self.bench.autocast,
            teacher_inputs=entered if config.streams == "both" else None,
        ):
            pass
        kept = {f"{name}.latent": layer.latent.half() for name, layer in layers.items() if layer.latent is not None}
        for layer in layers.values():
            layer.freeze()
            layer.round_params()
        return collect(layers) | kept


def _groups(
    layers: dict[str, BinaryLinear], latents: dict[str, Tensor], config: WatConfig, lever: BlockLever
) -> list[dict[str, Any]]:
    """The optimizer's groups of layers that are ready to train."""
    if lever.layer is not SoftLinear:
        return thaw_layers(layers, latents, config)
    groups: list[dict[str, Any]] = []
    for name, layer in layers.items():
        assert isinstance(layer, SoftLinear)
        scale = float(latents[name].std())
        layer.thaw(latents[name], "coupled")
        groups.append({"params": [layer.logits], "lr": lever.lr_logits})
        groups.append({"params": [layer.params], "lr": config.lr_levels * scale})
    return groups
