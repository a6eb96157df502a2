"""The map of blocks and layers: one figure of each binarized layer, computed from the files.

overview = microscope.overview("error")
for block, row in overview: ...       one block after the other, so that a page can show the map growing
overview.values                       all of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lbllm.labels import BINARIZED_BITS
from lbllm.microscope.layer import SAMPLED_ROWS, LayerView

MetricName = Literal["error", "signs", "bitmap", "bits"]
Row = tuple[float | None, ...]


@dataclass(frozen=True)
class Metric:
    """What a map shows. ``unit``: "share" (of 1, to be shown in percent) or "bits"; ``function``: the dotted name of
    the engine function that computes a value; ``about``: what it is; ``before``: whether it compares with before
    training; ``value``: of a layer."""

    label: str
    unit: Literal["share", "bits"]
    function: str
    about: str
    before: bool
    value: Callable[[LayerView], float | None]


METRICS: dict[MetricName, Metric] = {
    "error": Metric(
        "Weight error",
        "share",
        "lbllm.microscope.layer.relative_error",
        "squared error of the weights, divided by the sum of their squares",
        False,
        lambda layer: layer.error,
    ),
    "signs": Metric(
        "Signs flipped",
        "share",
        "lbllm.microscope.layer.flipped",
        "share of the weights whose sign bit differs from before training",
        True,
        lambda layer: layer.sign_flips,
    ),
    "bitmap": Metric(
        "Bitmap flipped",
        "share",
        "lbllm.microscope.layer.flipped",
        "share of the weights whose bitmap bit differs from before training",
        True,
        lambda layer: layer.bitmap_flips,
    ),
    "bits": Metric(
        "Bits per weight", "bits", "lbllm.quant.plan.layer_bits", BINARIZED_BITS, False, lambda layer: layer.bits
    ),
}


class Overview:
    """The values of one metric. Iterating yields (block, row): one value for each of ``Microscope.layers``, None where
    the layer is dense or has no bitmap; what was computed before comes at once. Raises as ``Microscope.layer``."""

    def __init__(self, name: MetricName, row: Callable[[int], Row], blocks: int, before: str, sampled: bool) -> None:
        self.name, self.metric, self._row, self._blocks = name, METRICS[name], row, blocks
        self.about = self.metric.about
        if self.metric.before:
            rows = f", in {SAMPLED_ROWS} rows of each layer" if sampled else ""
            self.about += f" ({before}){rows}"

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for block in range(self._blocks):
            yield block, self.row(block)

    def row(self, block: int) -> Row:
        """The values of one block."""
        return self._row(block)

    @property
    def values(self) -> list[Row]:
        """All rows, (blocks, layers)."""
        return [row for _, row in self]
