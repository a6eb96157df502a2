"""A packed checkpoint beside its teacher, read from their files: nothing is loaded as a whole.

    microscope = Microscope.open("shipped")
    layer = microscope.layer("14/mlp.up_proj")
    layer.group(211, 7).signs[0]                  one bit, with its place in the file

Opening checks the checkpoint's seal, that is, reads each file once. Later a file that has changed or is gone is an
error that names it.
"""

from __future__ import annotations

from torch import Tensor

from lbllm.checkpoints.hf import LbllmConfig
from lbllm.microscope.address import Address
from lbllm.microscope.layer import LayerView
from lbllm.microscope.overview import MetricName, Overview
from lbllm.runs.store import RunStore
from lbllm.sections import LayerFormat


class Microscope:
    """A packed checkpoint beside its teacher. Threads may share one.

    ``name``: by which it was opened; ``title``: to show; ``teacher_name``, ``teacher_title``; ``precision``: what the
    teacher's weights were stored as; ``fingerprint``: hash of the packed weights, hex; ``config``: format and
    provenance; ``blocks``: their number; ``path``: the full name of block b's layer l is f"{path}.{b}.{l}"; ``layers``:
    names within a block, in order; ``shapes[block][layer]``: (out, in); ``formats[block][layer]``: None where the layer
    is dense; ``before_words``, ``latent_words``: what "before training" and "latent" are here (latent_words is empty
    where no latent weights were kept).
    """

    name: str
    title: str
    teacher_name: str
    teacher_title: str
    precision: str
    fingerprint: str
    config: LbllmConfig
    path: str
    blocks: int
    layers: list[str]
    shapes: list[dict[str, tuple[int, int]]]
    formats: list[dict[str, LayerFormat | None]]
    before_words: str
    latent_words: str

    @classmethod
    def open(cls, name: str, teacher: str | None = None, store: RunStore | None = None) -> Microscope:
        """Open the checkpoint that ``find_checkpoint`` finds by ``name``. ``teacher``: by default ``teacher_of``.

        Raises LbllmError: the checkpoint or the teacher is not found or damaged, or it was not made from this teacher.
        """
        raise NotImplementedError

    def check(self, address: Address | str) -> Address:
        """Return the address. Raises ConfigError if it is not one of this checkpoint, with what there is instead."""
        raise NotImplementedError

    def layer(self, address: Address | str) -> LayerView:
        """The layer at an address; its row and group are left out. The last few are kept.

        Raises ConfigError if the address is not one of this checkpoint or has no layer, ModelError if the layer is
        dense or the teacher's file has changed, CheckpointError if the checkpoint's file has changed or is gone.
        """
        raise NotImplementedError

    def original(self, address: Address | str) -> Tensor:
        """The teacher's weight of a layer, float32 (out, in); of a dense one, too. Raises as ``layer``."""
        raise NotImplementedError

    def overview(self, metric: MetricName) -> Overview:
        """The map of a metric; nothing is computed before it is read. Raises ConfigError if there is no such metric."""
        raise NotImplementedError
