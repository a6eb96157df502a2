"""The state of a block after a stage: the tensors that its binarized layers consist of."""

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
    """The tensors of a block after a stage, and what its BlockDone event said of it."""

    tensors: dict[str, Tensor]
    loss_before: float
    loss_after: float
    diverged: bool


def grid_tensors(name: str, grid: ParamGrid | None) -> dict[str, Tensor]:
    """A layer's grid as ``restore`` reads it. Copies: the layers of a block can share their ranges."""
    return {} if grid is None else {f"{name}.{key}": tensor.clone() for key, tensor in grid._asdict().items()}


def collect(layers: dict[str, BinaryLinear]) -> dict[str, Tensor]:
    """The tensors that a block's frozen layers consist of."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.params"] = layer.params.detach().float()
        tensors[f"{name}.index"] = layer.index
        tensors |= grid_tensors(name, layer.grid)
        if layer.quantizer is not None:
            # A copy: layers that read one input share their quantizer, a file shares nothing.
            tensors[f"{name}.act"] = layer.quantizer.act.detach().clone()
    return tensors


def restore(teacher: nn.Module, formats: dict[str, LayerFormat], tensors: dict[str, Tensor], tail: int) -> nn.Module:
    """A copy of a teacher's block, sharing what stays dense, with frozen ``BinaryLinear`` layers from a saved state."""
    student: nn.Module = share_copy(teacher)
    device = next(teacher.parameters()).device
    for name, fmt in formats.items():
        # A copy, since training changes it in place and a block that diverges goes back to the saved state.
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
