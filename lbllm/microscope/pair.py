"""A teacher and the student made from it, side by side: what both must have in common, and texts as their tokens.

pair = Pair(pool.get("smollm2-135m-instruct").loaded, pool.get("shipped").loaded)
pair.blocks, pair.layers, pair.binarized[0]
ids, left_out = pair.ids("The capital of France is")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lbllm.chat.lens import TOKENS, same_vocabulary
from lbllm.chat.pool import Loaded
from lbllm.chat.stream import prompt_ids, room_for
from lbllm.errors import ConfigError, ModelError
from lbllm.microscope.passes import Memo, Passes, States, view
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.models.tokens import check_ids, embedding_rows
from lbllm.quant.packed_embedding import PackedTable
from lbllm.quant.packed_layer import PackedLinear

Side = Literal["teacher", "student"]
Text = str | Sequence[int] | Tensor
# Embeddings of a student are the teacher's, rounded to bfloat16. A teacher in another precision differs a little.
_SAMPLE, _APART = 64, 0.2
_ADVICE = "choose a student and the teacher it was made from"


class Pair:
    """Two loaded models of one structure; nothing of them is copied or changed. Threads may share a pair.

    ``path``: the name of the list of decoder blocks in both. ``blocks``: their number. ``layers``: the names of the
    linear layers within a block, in order. ``binarized``: for each block the names of those that the student has
    packed.

    Raises ModelError if the vocabularies, the embeddings, the blocks or the layers' shapes differ, or if the student
    has no packed layer.
    """

    def __init__(self, teacher: Loaded, student: Loaded) -> None:
        self.teacher, self.student = teacher, student
        if any(isinstance(module, PackedLinear) for module in teacher.model.modules()):
            raise ModelError(f"the teacher is a packed checkpoint; {_ADVICE}")
        if not any(isinstance(module, PackedLinear) for module in student.model.modules()):
            raise ModelError(f"the student has no binarized layer; {_ADVICE}")
        _check_vocabularies(teacher, student)
        self.path, blocks = decoder_blocks(teacher.model)
        self.blocks = len(blocks)
        self.layers = list(dict.fromkeys(name for block in blocks for name in linear_layers(block)))
        self.binarized: list[tuple[str, ...]] = []
        for number, block in enumerate(blocks):
            kinds = {name: self._same_shape(number, name, layer) for name, layer in linear_layers(block).items()}
            self.binarized.append(tuple(name for name, packed in kinds.items() if packed))
        if _find(student.model, f"{self.path}.{self.blocks}") is not None:
            raise ModelError(f"the student has more blocks than the teacher, which has {self.blocks}; {_ADVICE}")
        self.memo = Memo()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both."""
        return self.student.tokenizer

    def model(self, side: Side) -> Any:
        """The loaded model of a side; not to be changed."""
        return (self.teacher if side == "teacher" else self.student).model

    def ids(self, text: Text, limit: int = TOKENS) -> tuple[Tensor, int]:
        """Return the token ids (1, T), int64, of a text, as a chat without template reads it, and how many were left
        out at its end: T is at most ``limit`` and at most the models' context.

        Ids are taken as they are. Raises ModelError if there are fewer than two tokens: nothing precedes the first.
        """
        if isinstance(text, str):
            found = prompt_ids(self.tokenizer, [{"role": "user", "content": text}], template=False)
        else:
            found = torch.as_tensor(text, dtype=torch.long).reshape(1, -1)
            if found.numel() and int(found.min()) < 0:
                raise ModelError(f"{int(found.min())} is not the id of a token; ids are 0 and more")
        if found.shape[1] < 2:
            raise ModelError(
                f"the text has {found.shape[1]} token; a token's probability follows from those before it, so write at "
                "least two words"
            )
        check_ids(self.teacher.model, self.tokenizer, found)
        room = min(limit, *(room_for(loaded.model, 0) for loaded in (self.teacher, self.student)))
        return found[:, :room], max(0, found.shape[1] - room)

    def check(self, block: int, layer: str | None = None) -> None:
        """Raise ConfigError, which names what there is, unless the models have this block and this layer in it."""
        if not 0 <= block < self.blocks:
            raise ConfigError(f"there is no block {block}; the blocks are 0 to {self.blocks - 1}")
        inside = linear_layers(self._teacher_block(block))
        if layer is not None and layer not in inside:
            raise ConfigError(f"block {block} has no layer {layer!r}; its layers are {', '.join(inside)}")

    def places(self, block: int | None, layer: str | None) -> list[tuple[int, str]]:
        """Return block and name of the student's binarized layers: of one block or of all, all or those of one name.

        Raises ConfigError if there is no such block or layer, or if it is dense in the student.
        """
        if block is not None:
            self.check(block, layer)
        elif layer is not None and layer not in self.layers:
            raise ConfigError(f"no block has a layer {layer!r}; layers are {', '.join(self.layers)}")
        numbers = range(self.blocks) if block is None else (block,)
        found = [
            (number, name) for number in numbers for name in self.binarized[number] if layer is None or name == layer
        ]
        if not found:
            place = "/".join(str(part) for part in (block, layer) if part is not None)
            raise ConfigError(
                f"{place} is dense in the student as in the teacher: it has no bits to change. Choose a binarized layer"
            )
        return found

    def packed(self, block: int, layer: str) -> PackedLinear:
        """The student's layer. Raises ConfigError as ``places``."""
        self.places(block, layer)
        found = self.layer("student", block, layer)
        assert isinstance(found, PackedLinear)
        return found

    def layer(self, side: Side, block: int, layer: str) -> nn.Module:
        """A linear layer of the teacher or of the student; both have it (``check``)."""
        found: nn.Module = self.model(side).get_submodule(f"{self.path}.{block}.{layer}")
        return found

    def weight(self, block: int, layer: str) -> Tensor:
        """The teacher's weight (out, in), float32."""
        return linear_weight(self.layer("teacher", block, layer)).detach().float()

    def states(self, side: Side, ids: Tensor) -> States:
        """Return the hidden states of a model for token ids (1, T). Those of the latest short texts are kept."""
        return self.memo.get(
            (side, *ids[0].tolist()),
            lambda: Passes(view(self.model(side)), self.path).states(ids),
            lambda states: states.nbytes,
        )

    def _teacher_block(self, number: int) -> nn.Module:
        return self.teacher.model.get_submodule(f"{self.path}.{number}")

    def _same_shape(self, number: int, name: str, layer: nn.Module) -> bool:
        """Whether the student's layer is packed. Raises ModelError if it has another shape than the teacher's."""
        other = _find(self.student.model, f"{self.path}.{number}.{name}")
        shape = tuple(linear_weight(layer).shape)
        packed = isinstance(other, PackedLinear)
        if isinstance(other, PackedLinear):
            own: tuple[int, ...] = other.out_features, other.in_features
        else:
            own = () if other is None else tuple(linear_weight(other).shape)
        if own != shape:
            there = f"of shape {own}" if own else "missing"
            raise ModelError(
                f"the layer {number}/{name} of shape {shape} in the teacher is {there} in the student; {_ADVICE}"
            )
        return packed


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _check_vocabularies(teacher: Loaded, student: Loaded) -> None:
    sizes = [embedding_rows(loaded.model) for loaded in (teacher, student)]
    if sizes[0] != sizes[1] or not same_vocabulary(teacher.tokenizer, student.tokenizer):
        words = f" ({sizes[0]} and {sizes[1]} tokens)" if sizes[0] != sizes[1] else ""
        raise ModelError(f"teacher and student have different vocabularies{words}; {_ADVICE}")
    embeddings: list[Any] = [loaded.model.get_input_embeddings() for loaded in (teacher, student)]
    left, right = (_first_rows(embedding) for embedding in embeddings)
    if left.shape != right.shape or float((left - right).norm()) > _APART * float(left.norm()):
        raise ModelError(f"the student was made from another teacher: its embeddings are not those; {_ADVICE}")


def _first_rows(embedding: Any) -> Tensor:
    """The rows of the first tokens, float32; a few of them tell models apart."""
    if isinstance(embedding, PackedTable):
        return embedding.unpack(slice(0, min(_SAMPLE, embedding.rows)))
    rows: Tensor = embedding.weight.detach()[:_SAMPLE].float()
    return rows
