"""One block of a real model with its inputs and targets, to try out stages in any order.

Of the blocks before it, stage 1 binarizes the nearest ones and the others stay dense, so that the block gets inputs as
in a run. It is trained on one text and evaluated on another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm.errors import ConfigError
from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    linear_layers,
    linear_weight,
    run_batches,
    share_copy,
    shared_inputs,
)
from lbllm.models.teacher import Teacher
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.kv_groups import training_cache
from lbllm.quant.levels import LEVELS, assign, fit_levels, from_groups, group_length, levels_to_params, to_groups
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import WHOLE_ROW, AarConfig, Format, LayerFormat, ParamBits, PtqConfig, WatConfig
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.block_state import collect, restore
from lbllm.stages.distill import Step, binary_layers, distill, token_error
from lbllm.stages.ptq import ptq_block
from lbllm.stages.wat import thaw_layers, wat_block

BATCH = 4
FOUR_BITS, HALF = KVFormat(4), KVFormat(16)
EM_STEPS = 20  # of a clustering that nothing comes after


@dataclass(frozen=True)
class Made:
    """The block as stages have made it. ``latents``: what stage 2 would train, if an earlier stage was the last;
    ``diverged``: where the loss became NaN, else empty."""

    block: nn.Module
    latents: dict[str, Tensor]
    kv: KVFormat = HALF
    diverged: str = ""


class OneBlock:
    """Block ``number`` of a teacher, with ``before`` binarized ones ahead of it, trained on token ids (n, T) and judged
    by others (m, T)."""

    def __init__(
        self, teacher: Teacher, trained: Tensor, judged: Tensor, number: int, *, before: int, group_size: int
    ) -> None:
        _, self.blocks = decoder_blocks(teacher.model)
        if not 0 <= number < len(self.blocks):
            raise ConfigError(f"--blocks {number}: {teacher.name} has blocks 0 to {len(self.blocks) - 1}")
        self.number, self.group_size = number, group_size
        self.calls = capture_calls(teacher.model, trained[:1])
        self.meant = [first_inputs(teacher.model, text, BATCH) for text in (trained, judged)]
        first = max(0, number - before)
        for earlier in range(first):
            self.meant = [self._advance(self.blocks[earlier], hidden, earlier) for hidden in self.meant]
        self.seen = self.meant
        for earlier in range(first, number):
            student = self.initialize(PtqConfig(), number=earlier).block
            self.seen = [self._advance(student, hidden, earlier) for hidden in self.seen]
            self.meant = [self._advance(self.blocks[earlier], hidden, earlier) for hidden in self.meant]
        self.targets = [self._advance(self.blocks[number], hidden, number) for hidden in self.meant]

    @torch.no_grad()
    def _advance(self, block: nn.Module, hidden: Tensor, number: int, cache: Any = None) -> Tensor:
        return torch.cat(list(run_batches(block, hidden, self.calls[number], BATCH, cache)))

    def _format(self, kind: Format, group_size: int | None = None, param_bits: ParamBits = 16) -> LayerFormat:
        return LayerFormat(format=kind, group_size=group_size or self.group_size, param_bits=param_bits, act_bits=4)

    def _copy(self, made: Made, tail: int = 3, act_group_size: int = WHOLE_ROW) -> nn.Module:
        """A block of its own, to train."""
        layers = binary_layers(made.block)
        formats = {
            name: layer.fmt.model_copy(update={"act_group_size": act_group_size}) for name, layer in layers.items()
        }
        return restore(self.blocks[self.number], formats, collect(layers), tail)

    def initialize(
        self,
        config: PtqConfig,
        kind: Format = "w1+1",
        *,
        number: int | None = None,
        group_sizes: dict[str, int] | None = None,
        param_bits: ParamBits = 16,
    ) -> Made:
        """Stage 1, of another block where its ``number`` is given. ``group_sizes``: of layers whose name ends so."""
        number = self.number if number is None else number
        block, student, call = self.blocks[number], share_copy(self.blocks[number]), self.calls[number]
        formats = dict.fromkeys(linear_layers(block), self._format(kind, None, param_bits))
        for end, size in (group_sizes or {}).items():
            formats |= {name: self._format(kind, size, param_bits) for name in formats if name.endswith(end)}
        meant = all_inputs(block, self.meant[0], call, BATCH)
        latents: dict[str, Tensor] = {}
        for name, result, layer in ptq_block(block, student, call, self.seen[0], meant, formats, config, BATCH):
            student.set_submodule(name, layer)
            latents[name] = result.latent.float()
        return Made(student, latents)

    @torch.no_grad()
    def cluster(self, kind: Format = "w1+1") -> Made:
        """What stage 1 is compared with: each group's weights in clusters, all of them equally important, without
        regard to inputs."""
        student = share_copy(self.blocks[self.number])
        fmt, latents = self._format(kind), {}
        for name, layer in linear_layers(self.blocks[self.number]).items():
            weight = linear_weight(layer).contiguous()
            columns = weight.shape[1]
            groups = to_groups(weight, group_length(self.group_size, columns))
            counted = to_groups(torch.ones(1, columns), groups.shape[-1])  # the padding of a last group counts nothing
            levels = fit_levels(groups, counted, LEVELS[kind], EM_STEPS)
            index = from_groups(assign(groups, levels), columns).contiguous()
            student.set_submodule(name, BinaryLinear(layer, fmt, levels_to_params(levels), index))
            latents[name] = weight
        return _rounded(Made(student, latents))

    def train(self, made: Made, config: WatConfig, *, both_streams: bool = False) -> Made:
        """Stage 2; with ``both_streams`` on each sequence twice, as what came through the blocks before as they are
        binarized, and as what comes through the teacher's (Lillama, Sy et al. 2024)."""
        block = self._copy(made)
        inputs, targets = self.seen[0], self.targets[0]
        if both_streams:
            inputs, targets = torch.cat([inputs, self.meant[0]]), torch.cat([targets, targets])
        steps = wat_block(
            block,
            self.calls[self.number],
            inputs,
            targets,
            made.latents,
            config,
            seed=0,
            autocast=contextlib.nullcontext,
        )
        diverged = _finish(steps)
        return _rounded(Made(block, {}, diverged=diverged))

    def refine(
        self,
        made: Made,
        config: AarConfig,
        *,
        tail: int = 3,
        kv: KVFormat = FOUR_BITS,
        act_group_size: int = WHOLE_ROW,
    ) -> Made:
        """Stage 3; with no epochs only the search of knees."""
        block = self._quantized(made, config, tail, kv, act_group_size)
        steps = aar_block(
            block,
            self.calls[self.number],
            self.seen[0],
            self.targets[0],
            config,
            cache=training_cache(kv),
            seed=0,
            autocast=contextlib.nullcontext,
        )
        diverged = made.diverged or _finish(steps)
        return _rounded(Made(block, {}, kv, diverged))

    def join(self, made: Made, config: WatConfig, aar: AarConfig, *, kv: KVFormat = FOUR_BITS) -> Made:
        """What the paper found to diverge, stages 2 and 3 in one: latent weights, levels, bitmap, knees and clips learn
        together on quantized activations and KV cache."""
        block = self._quantized(made, aar, 3, kv)
        layers = binary_layers(block)
        steps = distill(
            block,
            self.calls[self.number],
            self.seen[0],
            self.targets[0],
            thaw_layers(layers, made.latents, config),
            config,
            lr_act=aar.lr_act,
            loss_kind=config.loss,
            cache=training_cache(kv),
            seed=0,
            autocast=contextlib.nullcontext,
        )
        diverged = _finish(steps)
        for layer in layers.values():
            layer.freeze()
        return _rounded(Made(block, {}, kv, diverged))

    def _quantized(
        self, made: Made, config: AarConfig, tail: int, kv: KVFormat, act_group_size: int = WHOLE_ROW
    ) -> nn.Module:
        """A copy of the block with searched quantizers of the activations."""
        block, call = self._copy(made, tail, act_group_size), self.calls[self.number]
        sharing = shared_inputs(self.blocks[self.number], self.seen[0][:1], call)
        add_quantizers(block, sharing, call, self.seen[0], config, tail=tail, cache=training_cache(kv), batch=BATCH)
        return block

    def errors(self, made: Made) -> tuple[float, float]:
        """The relative output error, mean over tokens of ||teacher - student||^2 over the larger of both squared norms,
        on the text that was trained on and on the other."""
        outputs = [self._advance(made.block, hidden, self.number, training_cache(made.kv)) for hidden in self.seen]
        trained, other = (float(token_error(*pair)) for pair in zip(outputs, self.targets, strict=True))
        return trained, other


def _finish(steps: Iterable[Step]) -> str:
    """Take all steps; say in words where the loss became NaN, else empty."""
    taken = list(steps)
    return next((f"diverged at step {step.step}" for step in taken if not math.isfinite(step.loss)), "")


def _rounded(made: Made) -> Made:
    """With the parameters as a checkpoint would store them."""
    for layer in binary_layers(made.block).values():
        layer.round_params()
    return made
