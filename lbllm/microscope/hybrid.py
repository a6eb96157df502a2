"""Hybrids: one model whose blocks and layers are partly the teacher's and partly the student's.

    model = hybrid(pair, Dense(14))                         the student, block 14 dense again
    model = hybrid(pair, Only(14, "mlp.down_proj"))         the teacher, one layer binarized
    model = hybrid(pair, FirstBlocks(10))                   blocks 0 to 9 the student's, the rest the teacher's
    model = hybrid(pair, Edited(address, levels))           the student, the levels of one group changed
    model = hybrid(pair, Bits(14, "mlp.down_proj", 3))      the student, one layer quantized anew

No weight is copied. The modules that contain others are new; linear layers, norms and embeddings are the very modules
of the two loaded models, which other sessions use at the same time and which stay as they are.

What is whose, besides the linear layers with their biases and the quantizers of their inputs:

                    norms of a block        embeddings, last norm, head     keys and values of a block are quantized
    Dense           the student's           the student's                   unless the whole block is dense
    Only            the teacher's           the teacher's                   if the whole block is binarized
    FirstBlocks     as the block            the teacher's, except with      as the block
                                            all blocks: the student's
    Edited, Bits    the student's           the student's                   as in the student
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lbllm.microscope.pair import Pair
from lbllm.sections import LayerFormat


@dataclass(frozen=True)
class Dense:
    """The student with these layers dense again, as in the teacher. ``block`` None: in all blocks; ``layer`` None: all
    layers."""

    block: int | None = None
    layer: str | None = None


@dataclass(frozen=True)
class Only:
    """The teacher with only these layers binarized. ``block`` None: in all blocks; ``layer`` None: all layers."""

    block: int | None = None
    layer: str | None = None


@dataclass(frozen=True)
class FirstBlocks:
    """Blocks 0 to ``count`` - 1 are the student's; 0: the teacher itself, all blocks: the student itself."""

    count: int


@dataclass(frozen=True)
class Edited:
    """The student with the levels of one group changed. ``address``: "14/mlp.up_proj/211/7"; ``levels``: 4 (W1: 2)
    values in the order of ``params_to_levels``, the lowest first."""

    address: str
    levels: tuple[float, ...]


@dataclass(frozen=True)
class Bits:
    """The student with one layer's weight made anew from the teacher's, without training.

    ``format``: a number of bits, 1 to 8, for round-to-nearest in the groups of the student's layer; or a LayerFormat,
    whose levels are fitted to the weights (``fit_levels``). The inputs are quantized as in the student, with a
    LayerFormat only if its act_bits is less than 16.
    """

    block: int
    layer: str
    format: int | LayerFormat


Choice = Dense | Only | FirstBlocks | Edited | Bits


def hybrid(pair: Pair, choice: Choice) -> PreTrainedModel:
    """Return the model of a choice, in eval mode; it shares all weights with the pair, so don't change it.

    ``FirstBlocks`` of none and of all blocks are the loaded models themselves. Raises ConfigError for a block, layer,
    row, group, number of levels or bits that can't be.
    """
    raise NotImplementedError
