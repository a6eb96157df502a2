"""The state of a block after a stage: the tensors of its binarized layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbllm.errors import CheckpointError
from lbllm.models.blocks import device_of, linear_weight, share_copy
from lbllm.models.experts import Experts, expert_layers, experts_of
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.levels import LEVELS, PARAMS, group_length
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.packing import ParamGrid
from lbllm.quant.table import TABLE, TABLE_FAULT, has_table, is_table
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import LayerFormat


@dataclass
class BlockState:
    """The tensors of a block after a stage, and the losses and ``diverged`` of its BlockDone event."""

    tensors: dict[str, Tensor]
    loss_before: float
    loss_after: float
    diverged: bool


def grid_tensors(name: str, grid: ParamGrid | None) -> dict[str, Tensor]:
    """Return copies of a layer's grid, under the names that ``restore`` reads: a block's layers can share ranges."""
    return {} if grid is None else {f"{name}.{key}": tensor.clone() for key, tensor in grid._asdict().items()}


def collect(layers: dict[str, BinaryLinear]) -> dict[str, Tensor]:
    """Return the tensors of a block's frozen layers, as ``restore`` reads them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.params"] = layer.params.detach().float()
        tensors[f"{name}.index"] = layer.index
        if layer.table is not None:
            tensors[f"{name}.table"] = layer.table.detach().float()
        tensors |= grid_tensors(name, layer.grid)
        if layer.quantizer is not None:
            # A copy: layers that read the same input share a quantizer, but a file can't store shared tensors.
            tensors[f"{name}.act"] = layer.quantizer.act.detach().clone()
    return tensors


def restore(
    teacher: nn.Module,
    formats: dict[str, LayerFormat],
    tensors: dict[str, Tensor],
    tail: int,
    experts: Callable[[int], dict[str, Tensor]] | None = None,
    *,
    packed: bool = False,
) -> nn.Module:
    """Return a copy of a teacher's block with frozen ``BinaryLinear`` layers from a saved state.

    The copy shares the dense layers with the teacher. ``experts`` gives the tensors of each expert; these are packed
    as soon as they are made if ``packed``. Raises CheckpointError for tensors of other layers.
    """
    student: nn.Module = share_copy(teacher)
    device, inside = device_of(teacher), expert_layers(teacher)
    for name, fmt in formats.items():
        if name not in inside:
            student.set_submodule(name, restored_layer(teacher.get_submodule(name), name, fmt, tensors, tail, device))
    found = experts_of(student)
    if found is not None:
        assert experts is not None
        path, own = found
        for number in range(own.count):
            expert = restored_expert(own, f"{path}.{number}", number, formats, experts(number), tail, device)
            own.put(number, packed_expert(expert, tail) if packed else expert)
        own.source = None
    return student


def restored_expert(
    experts: Experts,
    path: str,
    number: int,
    formats: dict[str, LayerFormat],
    tensors: dict[str, Tensor],
    tail: int,
    device: torch.device,
) -> nn.Module:
    """Return an expert with frozen ``BinaryLinear`` layers from its saved state, whose names begin with its ``path``.

    Layers that have no format are those of the teacher.
    """
    shapes = experts.get_submodule(str(number))
    names = [name for name, _ in shapes.named_children()]
    whole = all(f"{path}.{name}" in formats and shapes.get_submodule(name).bias is None for name in names)
    source = shapes if whole else experts.expert(number)  # which reads it
    expert: nn.Module = share_copy(source)
    for name in names:
        full = f"{path}.{name}"
        if full in formats:
            layer = restored_layer(source.get_submodule(name), full, formats[full], tensors, tail, device)
            expert.set_submodule(name, layer)
    return expert


def packed_expert(expert: nn.Module, tail: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return an expert whose frozen ``BinaryLinear`` layers are packed, without quantizers where they have none yet."""
    result: nn.Module = share_copy(expert)
    for name, layer in expert.named_children():
        if isinstance(layer, BinaryLinear):
            stated = layer.fmt
            if layer.quantizer is None:
                layer.fmt = stated.model_copy(update={"act_bits": 16})
            result.set_submodule(name, PackedLinear.pack(layer, tail, dtype))
            layer.fmt = stated
    return result


def restored_layer(
    source: nn.Module, name: str, fmt: LayerFormat, tensors: dict[str, Tensor], tail: int, device: torch.device
) -> BinaryLinear:
    """Return a frozen layer from the saved tensors of that name, in the place of the dense layer ``source``."""
    _check(name, fmt, linear_weight(source), tensors)
    # A copy: training changes it in place, and a block that diverges is restored from the saved state.
    params, index = tensors[f"{name}.params"].to(device, copy=True), tensors[f"{name}.index"].to(device)
    grid = None
    if fmt.param_bits == 4 and f"{name}.scale" in tensors:
        grid = ParamGrid(tensors[f"{name}.scale"].to(device), tensors[f"{name}.ranges"].to(device))
    table = tensors[f"{name}.table"] if has_table(fmt.format) else None
    layer = BinaryLinear(source, fmt, params, index, grid, table)
    if f"{name}.act" in tensors:
        layer.quantizer = ActQuantizer(fmt.act_bits, tail, group_size=fmt.act_group_size).to(device)
        layer.quantizer.act.data.copy_(tensors[f"{name}.act"])
    return layer


def _check(name: str, fmt: LayerFormat, weight: Tensor, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless a layer's tensors have the shapes and types that its format gives them."""
    levels, count = LEVELS[fmt.format], PARAMS[fmt.format]
    groups = -(-weight.shape[1] // group_length(fmt.group_size, weight.shape[1]))
    shapes = {
        "params": (weight.shape[0], groups, count),
        "index": tuple(weight.shape),
        "latent": tuple(weight.shape),
        "act": (3,),
        "scale": (weight.shape[0],),
        "ranges": (count, 2),
        "table": (TABLE,),
    }
    always = {"params", "index"} | ({"table"} if has_table(fmt.format) else set())
    for key, shape in shapes.items():
        tensor = tensors.get(f"{name}.{key}")
        other = {"scale": "ranges", "ranges": "scale"}.get(key)
        needed = key in always or (other is not None and f"{name}.{other}" in tensors)
        if tensor is None and not needed:
            continue
        if tensor is None or tuple(tensor.shape) != shape or tensor.is_floating_point() != (key != "index"):
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} and type {tensor.dtype}"
            raise CheckpointError(
                f"the state of {name}: {key} {found}, needed is shape {shape}; delete the file and resume"
            )
        if key == "index" and (tensor.dtype != torch.uint8 or int(tensor.max()) >= levels):
            raise CheckpointError(
                f"the state of {name}: {key} has other values than 0 to {levels - 1}; delete the file and resume"
            )
        if key == "table" and not is_table(tensor):
            raise CheckpointError(f"the state of {name}: {key} has {TABLE_FAULT}; delete the file and resume")
