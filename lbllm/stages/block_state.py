"""The state of a block after a stage: the tensors of its binarized layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lbllm.models.blocks import share_copy
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.packing import ParamGrid
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
        tensors |= grid_tensors(name, layer.grid)
        if layer.quantizer is not None:
            # A copy: layers that read the same input share a quantizer, but a file can't store shared tensors.
            tensors[f"{name}.act"] = layer.quantizer.act.detach().clone()
    return tensors


def restore(teacher: nn.Module, formats: dict[str, LayerFormat], tensors: dict[str, Tensor], tail: int) -> nn.Module:
    """Return a copy of a teacher's block with frozen ``BinaryLinear`` layers from a saved state.

    The copy shares the dense layers with the teacher.
    """
    student: nn.Module = share_copy(teacher)
    device = next(teacher.parameters()).device
    for name, fmt in formats.items():
        # A copy: training changes it in place, and a block that diverges is restored from the saved state.
        params, index = tensors[f"{name}.params"].to(device, copy=True), tensors[f"{name}.index"].to(device)
        grid = None
        if fmt.param_bits == 4 and f"{name}.scale" in tensors:
            grid = ParamGrid(tensors[f"{name}.scale"].to(device), tensors[f"{name}.ranges"].to(device))
        layer = BinaryLinear(teacher.get_submodule(name), fmt, params, index, grid)
        if f"{name}.act" in tensors:
            layer.quantizer = ActQuantizer(fmt.act_bits, tail, group_size=fmt.act_group_size).to(device)
            layer.quantizer.act.data.copy_(tensors[f"{name}.act"])
        student.set_submodule(name, layer)
    return student
