"""Open a model of any size from its safetensors files: its structure at once, its blocks one by one.

transformers itself says which stored tensor becomes which parameter: it loads placeholders of the stored tensors' names
and shapes, which take no memory, and each placeholder is then found in the model. So its renames, its tied weights and
its report of missing tensors hold here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lbllm import memory
from lbllm.errors import ModelError
from lbllm.models.blocks import decoder_blocks, share_copy
from lbllm.models.expert_files import FusedParameter, fused_parameters
from lbllm.models.experts import Expert, Experts, Form, experts_of, split_experts
from lbllm.models.loading import FileFault, check_files, load_model
from lbllm.models.streamed import BlockModel, Rows
from lbllm.models.weights import StoredWeights

# Freed memory goes back to the system after so many bytes of blocks. What outlives a block lies between its temporary
# tensors, so the allocator alone would keep several times as much.
TRIM_BYTES = 2**26


class ConvertedWeights(Exception):
    """The model's parameters are not the stored tensors one to one; it has to be loaded as a whole."""


def open_blocks(place: str, offline: bool, config: PretrainedConfig, device: torch.device) -> BlockModel:
    """Open the model of a folder or of a hub repository; its weights are float32 on ``device``.

    Raises FileFault as ``load_model`` does, ConvertedWeights, and the errors of transformers and of the system. Where a
    file is lost or changed later, the model raises ModelError.
    """
    check_files(place, offline)
    weights = StoredWeights.find(place, offline)
    fused = fused_parameters(config, weights)
    joined = {key for parameter in fused.values() for names in parameter.names.values() for key in names}
    cells = _cells(weights, getattr(config.get_text_config(), "vocab_size", None))
    shapes = {name: stored.shape for name, stored in weights.tensors.items() if name not in joined}
    # Experts have placeholders of their own, since transformers would join those of the stored tensors.
    shapes |= {name: parameter.shape for name, parameter in fused.items()}
    cells |= {name: torch.full((1,), float(len(cells) + number)) for number, name in enumerate(fused)}
    placeholders = {name: cells[name].expand(shape) if shape else cells[name][0] for name, shape in shapes.items()}
    model = load_model(place, offline=offline, config=config, dtype=torch.float32, placeholders=placeholders)
    known = {cells[name].data_ptr(): name for name in shapes}
    return _Opened(model.eval().requires_grad_(False), weights, fused, known, device).blocks()


def _cells(weights: StoredWeights, vocabulary: Any) -> dict[str, Tensor]:
    """The single number behind each placeholder. transformers shares embeddings and output head if both are stored and
    equal; so these have equal numbers if their values are, and all others differ."""
    cells = {}
    for number, (name, stored) in enumerate(weights.tensors.items()):
        floats = stored.dtype.is_floating_point
        cells[name] = torch.full((1,), number if floats else 0, dtype=torch.float32 if floats else stored.dtype)
    shapes = {name: stored.shape for name, stored in weights.tensors.items()}
    large = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == vocabulary]
    for number, name in enumerate(large):
        for other in large[:number]:
            if weights.same_values(name, other):
                cells[name].copy_(cells[other])
    return cells


class _Opened:
    """A model of placeholders, which becomes a BlockModel."""

    def __init__(
        self,
        model: PreTrainedModel,
        weights: StoredWeights,
        fused: dict[str, FusedParameter],
        known: dict[int, str],
        device: torch.device,
    ) -> None:
        self._model, self._weights, self._fused, self._device = model, weights, fused, device
        self._path, blocks = decoder_blocks(model)
        # The stored name of each parameter, and of each buffer that has one.
        self._stored: dict[str, str] = {}
        for name, tensor in _named_tensors(model):
            found = known.get(tensor.data_ptr())
            if found == name and name in fused:
                _set(model, name, nn.Parameter(torch.empty(tensor.shape, device="meta"), requires_grad=False))
            elif found is not None and found in weights.tensors and tensor.shape == weights.tensors[found].shape:
                self._stored[name] = found
            elif isinstance(tensor, nn.Parameter):
                raise ConvertedWeights(name)
        split_experts(model)
        if any(isinstance(module, Experts) for module in model.modules()) and not fused:
            raise ConvertedWeights  # their layers are views of placeholders
        self._matrices = dict(self._find_matrices())
        shared: dict[int, nn.Parameter] = {}
        for name, tensor in _named_tensors(model):
            if name not in self._stored:
                if tensor.device.type != "meta":  # experts are read one by one
                    _set(model, name, tensor.to(device))
                continue
            if tensor.data_ptr() not in shared:
                later = name in self._matrices or name.startswith(f"{self._path}.")
                value = torch.empty(tensor.shape, device="meta") if later else self._read(name)
                shared[tensor.data_ptr()] = nn.Parameter(value, requires_grad=False)
            same = shared[tensor.data_ptr()]
            _set(model, name, same if isinstance(tensor, nn.Parameter) else same.data)
        self._templates = [share_copy(block) for block in blocks]
        self._made = 0  # bytes of blocks since the last trim

    def _find_matrices(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of embeddings and output head, which are read by rows."""
        for module, kind in (
            (self._model.get_input_embeddings(), nn.Embedding),
            (self._model.get_output_embeddings(), nn.Linear),
        ):
            if isinstance(module, kind):
                for name, tensor in self._model.named_parameters(remove_duplicate=False):
                    if tensor is module.weight and name in self._stored:
                        yield name, tuple(tensor.shape)

    def blocks(self) -> BlockModel:
        files = {name: self._weights.tensors[stored].file.name for name, stored in self._stored.items()}
        for number, template in enumerate(self._templates):
            found = experts_of(template)
            if found is not None:
                path, experts = f"{self._path}.{number}.{found[0]}", found[1]
                one = next((one for name, one in self._fused.items() if name.startswith(f"{path}.")), None)
                for expert in range(experts.count if one is not None else 0):
                    assert one is not None
                    file = self._weights.tensors[one.stored(expert)].file.name
                    inside = experts.get_submodule(str(expert)).named_parameters()
                    files |= {f"{path}.{expert}.{name}": file for name, _ in inside}
        return BlockModel(
            self._model,
            self._block,
            device=self._device,
            matrices=self._matrices,
            read=self._read,
            files=files,
            part=self._block,
        )

    def _block(self, number: int, layer: str | None = None) -> nn.Module:
        """A block; if ``layer`` has tensors of its own, these alone are read."""
        if self._made > TRIM_BYTES:
            memory.trim()
            self._made = 0
        block: nn.Module = share_copy(self._templates[number])
        tensors = _named_tensors(block)
        for name, tensor in [one for one in tensors if one[0].startswith(f"{layer}.")] or tensors:
            full = f"{self._path}.{number}.{name}"
            if full in self._stored:
                value = self._read(full)
                _set(
                    block, name, nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                )
        found = experts_of(block)
        if found is not None and any(name.startswith(f"{self._path}.{number}.") for name in self._fused):
            found[1].source = self._source(f"{self._path}.{number}.{found[0]}", found[1].form)
        return block

    def _source(self, path: str, form: Form) -> Callable[[int], Expert]:
        """What makes one of the experts at ``path`` from the files. A function, since a copy of the block shares it."""
        fused = {name.rpartition(".")[2]: one for name, one in self._fused.items() if name.startswith(f"{path}.")}

        def make(number: int) -> Expert:
            try:
                entries = {name: one.read(self._weights, number) for name, one in fused.items()}
            except (FileFault, OSError) as fault:
                raise self._lost(fault) from None
            self._made += sum(4 * entry.numel() for entry in entries.values())
            if self._made > TRIM_BYTES:
                memory.trim()
                self._made = 0
            return Expert.of(form, {name: entry.to(self._device).float() for name, entry in entries.items()})

        return make

    def _lost(self, fault: Exception) -> ModelError:
        return ModelError(
            f"{self._model.name_or_path}: {fault}; put the file back and try again, a run keeps its finished blocks"
        )

    def _read(self, name: str, rows: Rows | None = None) -> Tensor:
        try:
            value = self._weights.read(self._stored[name], rows).to(self._device)
        except (FileFault, OSError) as fault:
            raise self._lost(fault) from None
        return value.float() if value.is_floating_point() else value


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers of a module by name; those that are shared under each of their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    place = module.get_submodule(owner)
    if isinstance(value, nn.Parameter):
        place._parameters[last] = value
    else:
        place._buffers[last] = value
