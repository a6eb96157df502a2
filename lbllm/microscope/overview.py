"""The map of blocks and layers: one figure of each binarized layer, computed from the files.

overview = microscope.overview("error")
for block, row in overview: ...       one block after the other, so that a page can show the map growing
overview.values                       all of them
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

MetricName = Literal["error", "signs", "bitmap", "bits"]


@dataclass(frozen=True)
class Metric:
    """What a map shows. ``unit``: "share" (0 to 1, shown in percent) or "bits"; ``function``: the dotted name of the
    engine function that computes a value; ``about``: one sentence."""

    label: str
    unit: Literal["share", "bits"]
    function: str
    about: str


METRICS: dict[MetricName, Metric] = {
    "error": Metric("Weight error", "share", "lbllm.microscope.layer.relative_error", "||W - W_q||^2 / ||W||^2"),
    "signs": Metric("Signs flipped", "share", "lbllm.microscope.layer.flipped", "Sign bits that training changed"),
    "bitmap": Metric("Bitmap flipped", "share", "lbllm.microscope.layer.flipped", "Bitmap bits that training changed"),
    "bits": Metric("Bits a weight", "bits", "lbllm.quant.plan.layer_bits", "Stored bits a weight"),
}


class Overview:
    """The values of one metric. Iterating yields (block, row): one value for each of ``Microscope.layers``, None where
    the layer is dense or has none; what was computed before comes at once."""

    name: MetricName
    metric: Metric

    def __iter__(self) -> Iterator[tuple[int, tuple[float | None, ...]]]:
        raise NotImplementedError

    @property
    def about(self) -> str:
        """What the values are, in one sentence, with what "before training" is here and how many rows were read."""
        raise NotImplementedError

    @property
    def values(self) -> list[tuple[float | None, ...]]:
        """All rows, (blocks, layers)."""
        raise NotImplementedError
