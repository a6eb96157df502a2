"""Stages 1 to 3 on the experts of a block, one at a time; ``blockwise`` does what its other layers need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm.events import Event, ExpertDone, LayerDone
from lbllm.models.experts import Experts, expert_layers, experts_of
from lbllm.pipeline.context import RunContext
from lbllm.quant.activations import ActQuantizer
from lbllm.sections import LayerFormat, Origin, Stage
from lbllm.stages.block_state import BlockState, collect, packed_expert, restored_expert, restored_layer
from lbllm.stages.distill import binary_layers
from lbllm.stages.experts import Aim, LayerInputs, add_expert_quantizers, probe_loss, ptq_expert, train_expert
from lbllm.stages.routing import Entered, enter, linear_in_sum, outputs, resumed, summed


@dataclass
class TaughtExperts:
    """What the teacher's experts show on its stream. ``entered``: what they are called with; ``total`` (tokens, out):
    their sum; ``factor``: see ``linear_in_sum``."""

    entered: Entered
    total: Tensor
    factor: float | None

    def keep_for(self, stage: Stage) -> None:
        """Drop what a stage doesn't read."""
        if stage != "ptq":
            self.entered.x = self.entered.x.new_empty(0)
        if stage == "ptq" or self.factor is not None:
            self.total = self.total.new_empty(0)


def outer_formats(run: RunContext, number: int) -> dict[str, LayerFormat]:
    """The formats of a block's layers, without those of experts."""
    inside = expert_layers(run.teacher.blocks[number])
    return {name: fmt for name, fmt in run.formats[number].items() if name not in inside}


def pass_experts(
    run: RunContext, block: nn.Module, number: int, stream: Tensor, cache: Any = None
) -> TaughtExperts | None:
    """Let a stream (n, T, hidden) pass a block up to its experts, and these; None for a block without experts."""
    found = experts_of(block)
    if found is None:
        return None
    call = run.calls[number]
    entered = enter(block, stream, call, run.batch, run.streams, run.autocast, cache)
    total = summed(found[1], entered, run.streams, run.teacher.device, run.autocast, run.check_alone)
    return TaughtExperts(entered, total, None)


def learn_factor(run: RunContext, block: nn.Module, number: int, stream: Tensor, taught: TaughtExperts) -> None:
    """Find out how the block uses the sum of its experts, on a stream that has not passed it yet."""
    taught.factor = linear_in_sum(block, stream[:1], run.calls[number], taught.total, run.autocast)


def binarize_experts(
    run: RunContext, number: int, block: nn.Module, student: nn.Module, inputs: Tensor, taught: TaughtExperts
) -> Iterator[Event]:
    """Stage 1 on the experts of the teacher's block; saves the state of each.

    ``student``: the block with its other layers binarized, whose stream is ``inputs``.
    """
    found = experts_of(block)
    assert found is not None
    path, experts = found
    config, device = run.config, run.teacher.device
    entered = enter(student, inputs, run.calls[number], run.batch, run.streams, run.autocast)
    layer = LayerInputs.of(entered, _matching(entered, taught.entered, experts), device)
    rows = entered.routed(experts.count)
    for expert in range(experts.count):
        full, one = f"{path}.{expert}", rows.get(expert)
        results, before, after = ptq_expert(experts, expert, full, one, layer, run.formats[number], config.ptq, device)
        tensors: dict[str, Tensor] = {}
        for name, (result, frozen) in results.items():
            error = float(result.error.sum() / result.energy.sum().clamp_min(1e-30))
            yield LayerDone(stage="ptq", block=number, layer=name, error=100 * error)
            tensors |= collect({name: frozen}) | {f"{name}.latent": result.latent}
        run.store.save("ptq", number, BlockState(tensors, before, after, False), expert)
        tokens = 0 if one is None else len(one.rows)
        yield _done("ptq", number, full, tokens, before, after)
        run.check()


def _matching(entered: Entered, teacher: Entered, experts: Experts) -> Tensor:
    """The teacher's inputs (rows, in) for the rows of the student. Where experts get sorted tokens, and the teacher has
    not routed a token to the same expert, it is the student's own input."""
    if not experts.form.sorted_tokens:
        return teacher.x
    keys, known = (one.token * experts.count + one.chosen[:, 0] for one in (entered, teacher))
    order = known.argsort()
    place = torch.searchsorted(known[order], keys).clamp_max(len(known) - 1)
    place = order[place]
    return torch.where((known[place] == keys)[:, None], teacher.x[place], entered.x)


def search_experts(
    run: RunContext, number: int, origin: Origin, student: nn.Module, inputs: Tensor, cache: Any
) -> dict[str, Tensor]:
    """Stage 3: give the packed experts of the student quantizers with searched knees; returns their knees and clips by
    name, as ``collect`` has them."""
    path, experts = _own(student)
    config, device = run.config, run.teacher.device
    entered = enter(student, inputs, run.calls[number], run.batch, run.streams, run.autocast, cache)
    rows = entered.routed(experts.count)
    searched: dict[str, Tensor] = {}
    dense, tail = _own(run.teacher.block(number))[1], config.quant.tail_steps
    for one in range(experts.count):
        expert = _trainable(run, number, origin, dense, path, one, {})
        add_expert_quantizers(experts, expert, rows.get(one), entered, config.aar, tail, device)
        for name, layer in binary_layers(expert).items():
            if layer.quantizer is not None:
                searched[f"{path}.{one}.{name}.act"] = layer.quantizer.act.detach().clone()
        experts.put(one, packed_expert(expert, tail))
        run.check()
    return searched


def train_experts(
    run: RunContext,
    stage: Stage,
    number: int,
    origin: Origin,
    student: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    taught: TaughtExperts,
    searched: dict[str, Tensor],
    cache: Any,
    seed: int,
) -> Iterator[Event]:
    """Stage 2 or 3 on the packed experts of a student's block, whose other layers are finished; saves the state of
    each, and the student then has it. ``searched``: of ``search_experts``."""
    path, experts = _own(student)
    config, device, call = run.config, run.teacher.device, run.calls[number]
    entered = enter(student, inputs, call, run.batch, run.streams, run.autocast, cache)
    total = summed(experts, entered, run.streams, device, run.autocast, run.check_alone)
    aim = _aim(run, student, number, inputs, targets, total, taught, cache)
    rows = entered.routed(experts.count)
    dense = _own(run.teacher.block(number))[1]
    for one_expert in range(experts.count):
        full, one = f"{path}.{one_expert}", rows.get(one_expert)
        expert = _trainable(run, number, origin, dense, path, one_expert, searched)
        kept = _earlier(run, number, origin, one_expert, full, searched)
        before = after = 0.0
        if one is not None and binary_layers(expert):
            own = outputs(experts, experts.expert(one_expert), entered, one, device, run.autocast)
            wanted, scale = aim.of_expert(entered, one, own), aim.scale[entered.token[one.rows]]
            before = after = probe_loss(own, wanted, scale)
            latents = None
            if stage == "wat":
                earlier = run.store.finished(origin, number, one_expert).tensors
                latents = {name: earlier[f"{full}.{name}.latent"] for name in binary_layers(expert)}
            for _ in train_expert(
                experts,
                expert,
                one,
                entered,
                aim,
                own,
                config.wat if stage == "wat" else config.aar,
                latents,
                sequences=len(inputs),
                seed=seed,
                device=device,
                autocast=run.autocast,
            ):
                run.check()
            packed = packed_expert(expert, config.quant.tail_steps)
            new = outputs(experts, packed, entered, one, device, run.autocast)
            found = probe_loss(new, wanted, scale)
            if found < before:
                after = found
                aim.replace(entered, one, own, new)
                experts.put(one_expert, packed)
                kept = collect({f"{full}.{name}": layer for name, layer in binary_layers(expert).items()})
        run.store.save(stage, number, BlockState(kept, before, after, False), one_expert)
        yield _done(stage, number, full, 0 if one is None else len(one.rows), before, after)
        run.check()


def keep_experts(run: RunContext, stage: Stage, number: int, origin: Origin, searched: dict[str, Tensor]) -> None:
    """Give the experts of a block the state that they had before a stage, with the knees that were searched."""
    path, experts = _own(run.teacher.blocks[number])
    for expert in range(experts.count):
        tensors = _earlier(run, number, origin, expert, f"{path}.{expert}", searched)
        run.store.save(stage, number, BlockState(tensors, 0.0, 0.0, False), expert)


def put_back(run: RunContext, number: int, student: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the layers of a student's block another state; its experts stay."""
    teacher, tail = run.teacher.block(number), run.config.quant.tail_steps
    for name, fmt in outer_formats(run, number).items():
        source = teacher.get_submodule(name)
        student.set_submodule(name, restored_layer(source, name, fmt, tensors, tail, run.teacher.device))


def _own(block: nn.Module) -> tuple[str, Experts]:
    found = experts_of(block)
    assert found is not None
    return found


def _done(stage: Stage, block: int, expert: str, tokens: int, before: float, after: float) -> ExpertDone:
    return ExpertDone(stage=stage, block=block, expert=expert, tokens=tokens, loss_before=before, loss_after=after)


def _earlier(
    run: RunContext, number: int, origin: Origin, expert: int, path: str, searched: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that an expert had before a stage, without latent weights, and the knees that were searched."""
    tensors = run.store.finished(origin, number, expert).tensors
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".latent")}
    return kept | {name: tensor for name, tensor in searched.items() if name.startswith(f"{path}.")}


def _trainable(
    run: RunContext,
    number: int,
    origin: Origin,
    dense: Experts,
    path: str,
    expert: int,
    searched: dict[str, Tensor],
) -> nn.Module:
    """An expert of frozen ``BinaryLinear`` layers as it was after a stage; those with one input share a quantizer."""
    full = f"{path}.{expert}"
    tensors = _earlier(run, number, origin, expert, full, searched)
    tail, device = run.config.quant.tail_steps, run.teacher.device
    made = restored_expert(dense, full, expert, run.formats[number], tensors, tail, device)
    share_quantizers(made)
    return made


def share_quantizers(expert: nn.Module) -> None:
    """Make the layers of an expert that read its input share a quantizer, where they have the same bits."""
    first: dict[int, ActQuantizer] = {}
    for name, layer in binary_layers(expert).items():
        if layer.quantizer is not None and name != "down_proj":
            layer.quantizer = first.setdefault(layer.quantizer.bits, layer.quantizer)


@torch.no_grad()
def _aim(
    run: RunContext,
    student: nn.Module,
    number: int,
    inputs: Tensor,
    targets: Tensor,
    total: Tensor,
    taught: TaughtExperts,
    cache: Any,
) -> Aim:
    """What the student's experts train for, see ``lbllm.stages.experts``."""
    scale = torch.empty(len(total))
    if taught.factor is None:
        wanted = taught.total
        scale.copy_(torch.maximum(wanted.square().sum(-1), total.square().sum(-1)))
        return Aim(total, wanted, scale.clamp_min_(1e-12))
    wanted = run.streams.empty(*total.shape, dtype=torch.float32)
    done = 0
    results = resumed(student, inputs, run.calls[number], run.batch, total, run.autocast, cache)
    for output, target in zip(results, targets.split(run.batch), strict=True):
        own, meant = output.float().cpu().flatten(0, -2), target.float().flatten(0, -2)
        part = slice(done, done + len(own))
        wanted[part] = total[part] + (meant - own) / taught.factor
        scale[part] = torch.maximum(meant.square().sum(-1), own.square().sum(-1)) / taught.factor**2
        done += len(own)
    return Aim(total, wanted, scale.clamp_min_(1e-12))
