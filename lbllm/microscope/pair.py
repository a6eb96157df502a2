"""A teacher and the student made from it, side by side: what both must have in common, and texts as their tokens.

    pair = Pair(pool.get("smollm2-135m-instruct").loaded, pool.get("shipped").loaded)
    pair.blocks, pair.layers, pair.binarized[0]
    pair.ids("The capital of France is")
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lbllm.chat.lens import TOKENS
from lbllm.chat.pool import Loaded


class Pair:
    """Two loaded models of one structure; nothing of them is copied or changed. Threads may share a pair.

    ``path``: the name of the list of decoder blocks in both. ``blocks``: their number. ``layers``: the names of the
    linear layers within a block, in order. ``binarized``: for each block the names of those that the student has
    packed.

    Raises ModelError if the vocabularies, the blocks or the layers' shapes differ, or if the student has no packed
    layer.
    """

    path: str
    blocks: int
    layers: list[str]
    binarized: list[tuple[str, ...]]

    def __init__(self, teacher: Loaded, student: Loaded) -> None:
        self.teacher, self.student = teacher, student

    def ids(self, text: str | Sequence[int] | Tensor, limit: int = TOKENS) -> tuple[Tensor, int]:
        """Return the token ids (1, T), int64, of a text, as a chat without template reads it, and how many were left
        out at its end: T is at most ``limit`` and at most the models' context.

        Ids are taken as they are. Raises ModelError if there are fewer than two tokens: nothing precedes the first.
        """
        raise NotImplementedError

    def check(self, block: int | None, layer: str | None = None) -> None:
        """Raise ConfigError, which names what there is, unless the models have this block and this layer in it."""
        raise NotImplementedError
