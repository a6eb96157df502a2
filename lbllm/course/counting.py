"""Counting the bits of a whole checkpoint, part by part, for any group size and bits of group parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbllm.checkpoints.weights import weights_bytes
from lbllm.config import make_config
from lbllm.course.data import CourseData
from lbllm.measure.estimate import Estimate, estimate
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.models.teacher import skeleton
from lbllm.quant.levels import LEVELS, assign, fit_levels, group_length, index_to_planes, levels_to_params, to_groups
from lbllm.quant.packing import encode_params, fit_grid
from lbllm.quant.plan import block_formats
from lbllm.sections import PAPER_STAGES, WHOLE_ROW, LayerFormat, QuantConfig

PLANES = ("bits", "bitmap")  # parts of ``Estimate.parts``
PARAMETERS = ("parameters",)
SYMBOLS = ("α₀", "μ₀", "α₁", "μ₁")  # of a group's parameters
EM_STEPS = 3
RATE, TOKENS = 1.0, 8  # of matrix products, and of a sequence: times and memory are not asked for


class Counter:
    """Counts files in the checkpoint's format, and in the same with other groups."""

    def __init__(self, data: CourseData) -> None:
        self._data = data
        self._model = skeleton(data.teacher_name)
        self.file_bytes = weights_bytes(data.found.folder)
        path, blocks = decoder_blocks(self._model)
        rows = {
            linear_weight(layer).shape[1]
            for number, block in enumerate(blocks)
            for name, layer in linear_layers(block).items()
            if data.quant.layer(f"{path}.{number}.{name}") is not None
        }
        self.shortest_row = min(rows)

    def sizes(self, usual: Iterable[int]) -> list[int]:
        """The group sizes of ``usual`` that fit into each row, the checkpoint's own, and the whole row, ascending."""
        own = self._data.quant.group_size
        fitting = {size for size in (*usual, own) if 0 < size <= self.shortest_row}
        return [*sorted(fitting), WHOLE_ROW]

    def quant(self, group_size: int, param_bits: int) -> QuantConfig:
        """The checkpoint's own format if it has these groups; otherwise the same with these groups in all layers."""
        own = self._data.quant
        if (group_size, param_bits) == (own.group_size, own.param_bits):
            return own
        return own.model_copy(update={"group_size": group_size, "param_bits": param_bits, "overrides": {}})

    def formats(self, group_size: int, param_bits: int) -> tuple[nn.ModuleList, list[dict[str, LayerFormat]]]:
        """The blocks, and the formats of the binarized layers of each, as ``bits_per_weight`` takes them."""
        _, blocks, formats = block_formats(self._model, self.quant(group_size, param_bits))
        return blocks, formats

    def count(self, group_size: int, param_bits: int) -> Estimate:
        """The file of a checkpoint with these groups. Raises ConfigError."""
        quant = self.quant(group_size, param_bits).model_dump()
        changes = {"model": self._data.teacher_name, "quant": quant, "stages": PAPER_STAGES, "seq_len": TOKENS}
        return estimate(make_config("quick", changes), model=self._model, rate=RATE)


@dataclass(frozen=True)
class StoredGroup:
    """A group of g weights as a file holds it: ``signs`` and ``bitmap`` bool (g,), None for two levels, and its
    parameters: for each its symbol, and its bits, the highest first."""

    signs: Tensor
    bitmap: Tensor | None
    params: tuple[tuple[str, str], ...]

    @property
    def bits(self) -> int:
        """All bits of the group, without its share of the scales."""
        planes = len(self.signs) * (1 if self.bitmap is None else 2)
        return planes + sum(len(code) for _, code in self.params)


def store_group(rows: Tensor, quant: QuantConfig, column: int) -> StoredGroup:
    """The group with ``column`` of the first of some rows (r, in) of weights, with levels fitted to them
    (``fit_levels``) and parameters stored as ``quant`` says."""
    length = group_length(quant.group_size, rows.shape[1])
    groups, importance = to_groups(rows, length), to_groups(torch.ones_like(rows), length)
    levels = fit_levels(groups, importance, LEVELS[quant.format], EM_STEPS)
    params = levels_to_params(levels)
    if quant.param_bits == 16:
        codes = params.half().view(torch.int16).int() & 0xFFFF
    else:
        codes = (fit_grid(params).codes(params) if quant.param_bits == 4 else encode_params(params)[0]).int()
    at = column // length
    here = slice(0, min(length, rows.shape[1] - at * length))
    sign, bitmap = index_to_planes(assign(groups, levels)[0, at, here], levels.shape[-1])
    names = zip(SYMBOLS, codes[0, at].tolist(), strict=False)
    return StoredGroup(sign, bitmap, tuple((name, f"{code:0{quant.param_bits}b}") for name, code in names))


def part_bits(count: Estimate, parts: Iterable[str]) -> float:
    """The bits of some parts of a file for each binarized weight."""
    return 8 * sum(count.parts[part] for part in parts) / count.weights


def file_bits(count: Estimate) -> float:
    """The bits of a whole file for each weight of the model, embeddings and all others included."""
    return 8 * count.disk_bytes / count.parameters


def file_bits_with(count: Estimate, times: int) -> float:
    """The same of a file with ``times`` as many binarized weights, and all others as they are."""
    binarized = sum(count.parts[part] for part in (*PLANES, *PARAMETERS))
    return 8 * (count.disk_bytes + (times - 1) * binarized) / (count.parameters + (times - 1) * count.weights)


def dense_bits(count: Estimate) -> float:
    """The bits of all other parts of a file for each weight that is not binarized."""
    others = sum(size for part, size in count.parts.items() if part not in (*PLANES, *PARAMETERS))
    return 8 * others / count.dense_weights


def share_of_file(count: Estimate, part: str) -> float:
    """The share of a part of a file."""
    return count.parts[part] / count.disk_bytes


def code_bits(quant: QuantConfig) -> int:
    """The bits that name one of a group's levels: 2 for four levels, 1 for two."""
    return LEVELS[quant.format] // 2
