"""The real data that lessons compute from: a packed checkpoint, its teacher, and a text. Each is read when needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod

from torch import Tensor

from lbllm.chat.pool import Loaded, ModelPool
from lbllm.checkpoints.find import FoundCheckpoint, find_checkpoint, teacher_of
from lbllm.errors import CheckpointError
from lbllm.labels import FORMAT_NAMES
from lbllm.microscope.address import Address
from lbllm.microscope.layer import LayerView
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.pair import Pair
from lbllm.models.blocks import context_length
from lbllm.models.catalogue import model_title
from lbllm.quant.levels import to_groups
from lbllm.sections import QuantConfig
from lbllm.texts.corpus import load_corpus
from lbllm.texts.prompts import example_prompts

SHOWN = 16  # weights in a picture of single weights
ROWS = 64  # of a layer, for an error that is computed in a moment
CORPUS, SEQ_LEN = "embedded", 256


def layer_words(address: Address) -> str:
    """A layer as texts name it: "layer mlp.up_proj of block 14"."""
    assert address.block is not None
    return f"layer {address.layer} of block {address.block + 1}"


class CourseData:
    """A checkpoint and its teacher, as the lessons use them. ``load`` gives the loaded models by name; by default they
    are loaded into this process when a lesson first needs one."""

    def __init__(self, found: FoundCheckpoint, teacher: str, load: Callable[[str], Loaded] | None = None) -> None:
        self.found = found
        self.teacher_name = teacher
        self._load = load or _load

    @classmethod
    def open(
        cls, checkpoint: str, teacher: str | None = None, load: Callable[[str], Loaded] | None = None
    ) -> CourseData:
        """Find a checkpoint and its teacher by their names. Raises CheckpointError, ModelError, RunError."""
        found = find_checkpoint(checkpoint)
        return cls(found, teacher or teacher_of(found), load)

    @cached_property
    def microscope(self) -> Microscope:
        """Both, read from their files. Raises LbllmError."""
        return Microscope.open(self.found.name, self.teacher_name)

    @property
    def quant(self) -> QuantConfig:
        """The checkpoint's format."""
        return self.microscope.config.format

    @property
    def teacher_title(self) -> str:
        """The teacher's name in texts."""
        return model_title(self.teacher_name)

    @property
    def title(self) -> str:
        """The checkpoint's name in texts: its teacher's, and the format."""
        quant = self.quant
        return f"{self.teacher_title}, {FORMAT_NAMES[quant.format]}A{quant.act_bits}KV{quant.kv_bits}"

    @property
    def fingerprint(self) -> str:
        """The hash of the packed weights."""
        return self.microscope.fingerprint

    @cached_property
    def teacher(self) -> Loaded:
        """The teacher, loaded. Raises LbllmError."""
        return self._load(self.teacher_name)

    @cached_property
    def student(self) -> Loaded:
        """The binarized model, loaded. Raises LbllmError."""
        return self._load(self.found.name)

    @cached_property
    def pair(self) -> Pair:
        """Both, loaded and compared. Raises LbllmError."""
        return Pair(self.teacher, self.student)

    @cached_property
    def question(self) -> str:
        """The question that the lessons give to the models: the first of the example prompts."""
        return example_prompts()[0].prompts[0]

    @cached_property
    def blocks(self) -> list[list[str]]:
        """The names of the binarized layers of each block."""
        return [[name for name, fmt in layers.items() if fmt is not None] for layers in self.microscope.formats]

    @cached_property
    def example(self) -> LayerView:
        """The layer that lessons on single weights show: in the middle block, or the next with binarized layers, the
        first of those with the most weights."""
        middle = len(self.blocks) // 2
        number = next((n for n in (*range(middle, len(self.blocks)), *range(middle)) if self.blocks[n]), None)
        if number is None:
            raise CheckpointError(f"{self.found.name} has no binarized layer; choose another checkpoint")
        shapes = self.microscope.shapes[number]
        return self.microscope.layer(Address(number, max(self.blocks[number], key=lambda name: prod(shapes[name]))))

    @cached_property
    def example_group(self) -> Address:
        """The group that lessons show: of the full groups of ``example`` the one whose relative error is the median."""
        layer = self.example
        full = layer.original.shape[1] // layer.length
        original, rebuilt = (to_groups(one, layer.length)[:, :full] for one in (layer.original, layer.rebuilt))
        error = (original - rebuilt).square().sum(-1) / original.square().sum(-1).clamp_min(1e-30)
        place = int(error.flatten().argsort(stable=True)[error.numel() // 2])
        return Address(layer.address.block, layer.address.layer, *divmod(place, full))

    @property
    def example_weights(self) -> Tensor:
        """The teacher's weights, float32, of ``example_group``: its first ``SHOWN`` ones, or all of a shorter group."""
        at, length = self.example_group, self.example.length
        assert at.group is not None
        start = at.group * length
        return self.example_row[start : start + min(length, SHOWN)]

    @property
    def example_row(self) -> Tensor:
        """The teacher's weights (in,), float32, of the row that ``example_group`` lies in."""
        at = self.example_group
        assert at.row is not None
        return self.example.original[at.row]

    @property
    def example_rows(self) -> Tensor:
        """The teacher's weights (n, in), float32, of the first ``ROWS`` rows of ``example``."""
        return self.example.original[:ROWS]

    def sequences(self, tokens: int) -> Tensor:
        """Token ids (n, T) of the text that lessons calibrate on, for the teacher. Raises LbllmError."""
        length = min(SEQ_LEN, context_length(self.teacher.model) or SEQ_LEN)
        return load_corpus(CORPUS, self.teacher.tokenizer, seq_len=length, tokens=tokens).sequences


def _load(name: str) -> Loaded:
    slot = ModelPool().get(name)
    slot.wait()
    return slot.loaded
