"""What each layer costs on a text: the divergence of the teacher with only this layer binarized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lbllm.microscope.pair import Pair


@dataclass(frozen=True)
class LayerCost:
    """``kl``: mean KL(teacher || teacher with only this layer binarized), nats per token. ``output_error``:
    ||X W - X_q W_q||^2 / ||X W||^2 for the layer's inputs X in the teacher."""

    block: int
    layer: str
    kl: float
    output_error: float


def costs(
    pair: Pair, text: str | Sequence[int] | Tensor, *, blocks: Sequence[int] | None = None
) -> Iterator[LayerCost]:
    """Yield the cost of each binarized layer on a text, block by block; ``blocks``: only these.

    The teacher's hidden states are kept, so a layer costs only the blocks after it. Raises as ``effect``.
    """
    raise NotImplementedError
