"""A packed checkpoint beside its teacher, read from their files: nothing is loaded as a whole.

    microscope = Microscope.open("shipped")
    layer = microscope.layer("14/mlp.up_proj")
    layer.group(211, 7).signs[0]                  one bit, with its place in the file

Opening checks the checkpoint's seal, that is, reads each file once. Later a file that has changed or is gone is an
error that names it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lbllm.checkpoints.find import FoundCheckpoint, find_checkpoint, teacher_of
from lbllm.checkpoints.hf import LbllmConfig, check_checkpoint
from lbllm.checkpoints.record import checkpoint_name
from lbllm.checkpoints.seal import CORRUPT, packed_weights, read_document, stated_weights
from lbllm.errors import CheckpointError, ConfigError, ModelError
from lbllm.microscope.address import EXAMPLE, Address
from lbllm.microscope.before import Before
from lbllm.microscope.layer import LayerView
from lbllm.microscope.origin import check_origin, stored_name
from lbllm.microscope.overview import METRICS, MetricName, Overview, Row
from lbllm.models.blocks import linear_layers, linear_weight
from lbllm.models.catalogue import model_title
from lbllm.models.experts import layer_of
from lbllm.models.loading import FileFault
from lbllm.models.teacher import BlockTeacher, stream_teacher
from lbllm.models.weights import StoredWeights
from lbllm.quant.levels import group_length
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.store import RunStore
from lbllm.sections import LayerFormat

KEPT = 4  # layers whose tensors stay in memory


class Microscope:
    """A packed checkpoint beside its teacher; ``open`` makes one. Threads may share it.

    ``name``: by which it is found; ``title``: to show; ``teacher_name``, ``teacher_title``; ``precision``: what the
    teacher's weights were stored as; ``fingerprint``: hash of the packed weights, hex; ``config``: format and
    provenance; ``blocks``: their number; ``path``: the full name of block b's layer l is f"{path}.{b}.{l}"; ``layers``:
    names within a block, in order; ``shapes[block][layer]``: (out, in); ``formats[block][layer]``: None where the layer
    is dense; ``before_words``, ``latent_words``: what "before training" and "latent" are here (``latent_words`` is
    empty where no latent weights were kept).
    """

    def __init__(
        self, found: FoundCheckpoint, config: LbllmConfig, stored: StoredWeights, teacher: BlockTeacher, before: Before
    ) -> None:
        self.name, self.config, self.title = found.name, config, found.run or checkpoint_name(found.name)
        self.teacher_name, self.teacher_title = teacher.name, model_title(teacher.name)
        self.precision = teacher.precision
        self.fingerprint = _fingerprint(stated_weights(found.stated))
        self._stored, self._teacher, self._before = stored, teacher.model, before
        self.path, self.blocks = teacher.model.path, len(teacher.model.blocks)
        structure = [linear_layers(block) for block in teacher.model.blocks]
        quant = config.format
        self.shapes = [{name: _shape(layer) for name, layer in of_block.items()} for of_block in structure]
        self.layers = list(dict.fromkeys(name for of_block in structure for name in of_block))
        self.formats: list[dict[str, LayerFormat | None]] = [
            {name: quant.layer(f"{self.path}.{number}.{name}") for name in of_block}
            for number, of_block in enumerate(structure)
        ]
        self.before_words, self.latent_words = before.words, before.latent_words
        self._expected = self._packed_tensors()
        model = teacher.model.model
        self._names = {name: stored_name(model, name, tensor, stored) for name, tensor in self._expected.items()}
        self._kept: OrderedDict[Address, LayerView] = OrderedDict()
        self._rows: dict[tuple[MetricName, int], Row] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, name: str, teacher: str | None = None, store: RunStore | None = None) -> Self:
        """Open the checkpoint that ``find_checkpoint`` finds by ``name``. ``teacher``: by default ``teacher_of``.

        Raises LbllmError: the checkpoint or the teacher is not found or damaged, or it was not made from this teacher.
        """
        found = find_checkpoint(name, store)
        folder = found.folder
        check_checkpoint(folder)
        config = _config(folder)
        try:
            stored = StoredWeights(packed_weights(folder))
        except (FileFault, OSError) as fault:
            raise CheckpointError(f"{folder}: {fault}; {CORRUPT}") from None
        opened = stream_teacher(teacher or teacher_of(found, store), torch.device("cpu"))
        before = Before()
        if not found.shipped and found.stated.name == "checkpoint":
            before = Before.find(found.stated.parent, len(opened.model.blocks))
        made = cls(found, config, stored, opened, before)
        with made._reading():
            check_origin(made.title, opened, stored, made._expected, made._names, config.format.embedding_bits)
        return made

    def check(self, address: Address | str) -> Address:
        """Return the address. Raises ConfigError if it is not one of this checkpoint, with what there is instead, and
        ModelError for a group of a dense layer."""
        found = Address.parse(address) if isinstance(address, str) else address
        if found.block is None:
            return found
        if not 0 <= found.block < self.blocks:
            raise ConfigError(
                f"there is no block {found.block} in {self.title}: addresses count its blocks from 0 to "
                f"{self.blocks - 1}"
            )
        if found.layer is None:
            return found
        shapes = self.shapes[found.block]
        if found.layer not in shapes:
            raise ConfigError(
                f"block {found.block} of {self.title} has no layer {found.layer}; its layers are {', '.join(shapes)}"
            )
        rows, columns = shapes[found.layer]
        if found.row is not None and not 0 <= found.row < rows:
            raise ConfigError(f"{found.of_layer} has the rows 0 to {rows - 1}; there is no row {found.row}")
        if found.group is not None:
            groups = -(-columns // group_length(self._format(found).group_size, columns))
            if not 0 <= found.group < groups:
                raise ConfigError(
                    f"a row of {found.of_layer} has the groups 0 to {groups - 1}; there is no group {found.group}"
                )
        return found

    def layer(self, address: Address | str) -> LayerView:
        """The layer at an address; its row and group are left out. The last few are kept.

        Raises ConfigError if the address is not one of this checkpoint or has no layer, ModelError if the layer is
        dense, CheckpointError if the checkpoint's file has changed or is gone. A view raises ModelError where the
        teacher's file has.
        """
        place = self._layer(address)
        with self._lock:
            view = self._kept.get(place)
            if view is None:
                view = self._view(place, partial(self.original, place))
                self._kept[place] = view
            self._kept.move_to_end(place)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        with self._reading():
            self._stored.check()
        return view

    def original(self, address: Address | str) -> Tensor:
        """The teacher's weight of a layer, float32 (out, in); of a dense one, too. Raises as ``layer``, and ModelError
        if the teacher's file has changed."""
        place = self._layer(address)
        assert place.block is not None
        assert place.layer is not None
        return _weight(self._teacher.part(place.block, place.layer), place)

    def overview(self, metric: MetricName) -> Overview:
        """The map of a metric; nothing is computed before it is read. Raises ConfigError if there is no such metric."""
        if metric not in METRICS:
            raise ConfigError(f"there is no map of {metric}; choose one of {', '.join(METRICS)}")
        sampled = self._before.stage is None
        return Overview(metric, partial(self._row, metric), self.blocks, self.before_words, sampled)

    def _row(self, metric: MetricName, number: int) -> Row:
        """The values of a block's layers; the block of the teacher is read once."""
        known = self._rows.get((metric, number))
        if known is None:
            block = cache(partial(self._teacher.block, number))
            known = tuple(self._value(metric, Address(number, name), block) for name in self.layers)
            self._rows[metric, number] = known
        return known

    def _value(self, metric: MetricName, place: Address, block: Callable[[], nn.Module]) -> float | None:
        """The value of one layer; None if it is dense, or not in the block. ``block`` gives the teacher's."""
        assert place.block is not None
        assert place.layer is not None
        if self.formats[place.block].get(place.layer) is None:
            return None
        return METRICS[metric].value(self._view(place, lambda: _weight(block(), place)))

    def _layer(self, address: Address | str) -> Address:
        found = self.check(address)
        if found.layer is None:
            raise ConfigError(f"{str(found) or 'this address'} has no layer; add one, for example {EXAMPLE}")
        return found.of_layer

    def _full(self, place: Address) -> str:
        return f"{self.path}.{place.block}.{place.layer}"

    def _format(self, place: Address) -> LayerFormat:
        assert place.block is not None
        assert place.layer is not None
        fmt = self.formats[place.block][place.layer]
        if fmt is None:
            binarized = [name for name, other in self.formats[place.block].items() if other is not None]
            raise ModelError(
                f"{self._full(place)} is dense in {self.title}: it has the teacher's weights and no bits; choose "
                f"another layer{f', for example {place.block}/{binarized[0]}' if binarized else ''}"
            )
        return fmt

    def _empty(self, place: Address) -> PackedLinear:
        """A packed layer without values, on the meta device."""
        assert place.block is not None
        assert place.layer is not None
        rows, columns = self.shapes[place.block][place.layer]
        with torch.device("meta"):
            return PackedLinear(
                columns,
                rows,
                self._format(place),
                bias=False,
                tail=self.config.format.tail_steps,
                dtype=torch.float32,
            )

    def _packed_tensors(self) -> dict[str, Tensor]:
        """The tensors, on the meta device, that a checkpoint of this format and of this teacher has for its layers."""
        places = [
            Address(number, name)
            for number, of_block in enumerate(self.formats)
            for name, fmt in of_block.items()
            if fmt is not None
        ]
        return {
            f"{self._full(place)}.{name}": tensor
            for place in places
            for name, tensor in self._empty(place).state_dict().items()
        }

    def _view(self, place: Address, original: Callable[[], Tensor]) -> LayerView:
        full, packed = self._full(place), self._empty(place)
        with self._reading():
            names = {name: self._names[f"{full}.{name}"] for name in packed.state_dict()}
            tensors = {name: self._stored.read(stored) for name, stored in names.items()}
        packed.load_state_dict(tensors, assign=True)
        return LayerView(place, full, packed, self._stored, names, original, self._before)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (FileFault, OSError) as fault:
            raise CheckpointError(f"{self.title}: {fault}; put the file back, and open the checkpoint again") from None


def _weight(block: nn.Module, place: Address) -> Tensor:
    """The weight of a layer of a block, (out, in), without a gradient."""
    assert place.layer is not None
    return linear_weight(layer_of(block, place.layer)).detach().contiguous()


def _shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = linear_weight(layer).shape
    return rows, columns


def _config(folder: Path) -> LbllmConfig:
    """What a checkpoint's config.json says of its format. Raises CheckpointError for one that can't be read."""
    stated = read_document(folder)["quantization_config"]
    config = LbllmConfig(**{key: value for key, value in stated.items() if key != "quant_method"})
    try:
        _ = config.format
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{folder}: setting quant.{place} can't be read; {CORRUPT}") from None
    return config


def _fingerprint(hashes: dict[str, str]) -> str:
    """One hash of the weights: that of a single file, or of the hashes of several."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
