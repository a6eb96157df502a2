"""The training of one block as the course shows it: a few steps of stage 2, and what they change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm.config import make_config
from lbllm.course.data import CourseData
from lbllm.course.lesson import dotted
from lbllm.measure.preview import initialize, take_block
from lbllm.microscope.address import Address
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight, share_copy
from lbllm.models.teacher import Teacher
from lbllm.quant.levels import assign, from_groups, group_length, to_groups
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import LayerFormat
from lbllm.stages.block_state import restore
from lbllm.stages.distill import binary_layers, block_error
from lbllm.stages.wat import wat_block

STEPS = 12
BATCH_TOKENS = 512
ROWS = 8  # of one layer, of which a group is shown


@dataclass(frozen=True)
class Snapshot:
    """A block after ``step`` steps of training; step 0 is what stage 1 gives.

    ``loss``: of the step's own text, None at step 0. ``error``: ``block_error`` on text that the training does not see.
    ``changed``: the share of the weights with another level than at step 0. ``latent`` float32 (r, in), ``levels``
    float32 (r, n, K) ascending, ``index`` uint8 (r, in): the first rows of one layer.
    """

    step: int
    loss: float | None
    error: float
    changed: float
    latent: Tensor
    levels: Tensor
    index: Tensor


def binarized_weights(blocks: Iterable[dict[str, int]]) -> int:
    """The number of binarized weights of blocks, each given by the sizes of its binarized layers."""
    return sum(sum(block.values()) for block in blocks)


def share_changed(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """The share of the weights whose level index differs, over layers with indices of one shape each."""
    pairs = list(zip(before, after, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@torch.no_grad()
def nearest(layer: BinaryLinear, latent: Tensor) -> tuple[Tensor, Tensor]:
    """The index uint8 (out, in) of the level nearest to each latent weight (out, in) of a layer, and its levels
    (out, n, K), ascending."""
    levels = layer.levels().sort(-1).values
    return from_groups(assign(to_groups(latent, layer.length), levels), layer.in_features), levels


class Training:
    """A few steps of stage 2 on a block of the checkpoint's teacher, in the checkpoint's format.

    ``read`` takes the block with its inputs, ``begin`` binarizes it, ``run`` does the steps. ``snapshots`` has one from
    ``begin`` and one after each of ``steps`` steps, ``tokens`` is the length of the text that they learn from, and
    ``formats`` has the block's binarized layers.
    """

    ERROR, CHANGED = dotted(block_error), dotted(share_changed)

    def __init__(self, data: CourseData, number: int) -> None:
        self._data, self.number = data, number
        quant = data.quant.weights_only()
        changes: dict[str, Any] = {"model": data.teacher_name, "quant": quant.model_dump(), "device": "cpu"}
        self.config = make_config("quick", changes)
        _, blocks = decoder_blocks(data.teacher.model)
        sizes = [{name: linear_weight(layer).numel() for name, layer in linear_layers(one).items()} for one in blocks]
        self.all_blocks = [{name: s[name] for name in names} for s, names in zip(sizes, data.blocks, strict=True)]
        self.block = self.all_blocks[number]
        self._layer = max(self.block, key=lambda name: self.block[name])
        self.steps = self.tokens = 0
        self.formats: dict[str, LayerFormat] = {}
        self.snapshots: list[Snapshot] = []

    @property
    def usual_steps(self) -> int:
        """The steps of a block in stage 2 of a run with the settings that this training has."""
        wat = self.config.wat
        return wat.epochs * -(-wat.tokens // wat.batch_tokens)

    def read(self) -> None:
        """Run the teacher on a text as far as the block. Raises LbllmError."""
        loaded, config = self._data.teacher, self.config
        # A copy that shares all weights: the modules of the loaded model get no hooks, others use them.
        copied = share_copy(loaded.model)
        self._sample = take_block(config, self.number, Teacher(config.model, copied, loaded.tokenizer, "", ""))

    def begin(self) -> None:
        """Give the block levels and bits (stage 1), and keep the first snapshot. Raises LbllmError."""
        config, sample = self.config, self._sample
        start = initialize(sample, config, config.quant.format, config.quant.group_size)
        length = sample.inputs.shape[1]
        batch = max(1, BATCH_TOKENS // length)
        per_epoch = -(-len(sample.inputs) // batch)
        epochs = max(1, round(STEPS / per_epoch))
        self._settings = config.wat.model_copy(update={"epochs": epochs, "batch_tokens": batch * length})
        self.steps, self.tokens, self.formats = epochs * per_epoch, len(sample.inputs) * length, start.formats
        self._block = restore(sample.block, start.formats, start.tensors, config.quant.tail_steps)
        self._layers = binary_layers(self._block)
        self._latents = {name: start.tensors[f"{name}.latent"] for name in self._layers}
        self._before = {name: nearest(layer, self._latents[name])[0] for name, layer in self._layers.items()}
        self.snapshots = [self._look(0, None, self._latents)]

    def _look(self, step: int, loss: float | None, latents: dict[str, Tensor]) -> Snapshot:
        sample = self._sample
        probe = sample.probe_inputs, sample.probe_targets
        error = block_error(self._block, *probe, sample.call, len(sample.probe_inputs))
        found = {name: nearest(layer, latents[name]) for name, layer in self._layers.items()}
        changed = share_changed(self._before.values(), (found[name][0] for name in self._before))
        index, levels = found[self._layer]
        rows = (latents[self._layer][:ROWS].float().clone(), levels[:ROWS].float().clone(), index[:ROWS].clone())
        return Snapshot(step, loss, error, changed, *rows)

    def run(self) -> Iterator[Snapshot]:
        """Train, and yield a snapshot after each step; afterwards only the snapshots are kept. Raises LbllmError."""
        sample = self._sample
        training = wat_block(
            self._block,
            sample.call,
            sample.inputs,
            sample.targets,
            self._latents,
            self._settings,
            seed=self.config.seed,
            autocast=contextlib.nullcontext,
        )
        for step in training:
            now = {name: layer.latent.detach() for name, layer in self._layers.items() if layer.latent is not None}
            self.snapshots.append(self._look(step.step, step.loss, now))
            yield self.snapshots[-1]
        del self._sample, self._block, self._layers, self._latents, self._before

    @property
    def address(self) -> Address:
        """The group that is shown: of the full groups in the rows that were kept, the one in which most weights have
        another level now than at step 0."""
        length = self._length
        full = self.snapshots[0].index.shape[1] // length
        first, last = (to_groups(one.index, length)[:, :full] for one in (self.snapshots[0], self.snapshots[-1]))
        place = int((first != last).sum(-1).flatten().argmax())
        return Address(self.number, self._layer, *divmod(place, full))

    @property
    def _length(self) -> int:
        return group_length(self.formats[self._layer].group_size, self.snapshots[0].index.shape[1])

    def group(self, snapshot: Snapshot, at: Address) -> tuple[Tensor, Tensor, Tensor]:
        """The latent weights (g,) of a group in the rows that were kept, its levels (K,) and the index (g,) of each
        weight's."""
        assert at.row is not None
        assert at.group is not None
        part = slice(at.group * self._length, (at.group + 1) * self._length)
        return snapshot.latent[at.row, part], snapshot.levels[at.row, at.group], snapshot.index[at.row, part]

    def group_ends(self, at: Address) -> tuple[float, float]:
        """The ends of an axis for the group in all snapshots."""
        values = torch.cat([torch.cat(self.group(one, at)[:2]) for one in self.snapshots])
        low, high = float(values.min()), float(values.max())
        return low - 0.05 * (high - low), high + 0.05 * (high - low)
