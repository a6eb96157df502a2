"""A device in name only: its tensors say that they lie on a device of their own, and compute truly, on the CPU.

    with named_device() as host:
        model = model.to(DEVICE)        # every operation of a tensor there with one of the CPU raises MixedDevices
        model(ids.to(DEVICE))
    host.copies                         # what was copied to the host meanwhile, by operator

It finds, without a GPU, what would fail or wait on one. PyTorch's rules for CUDA hold, a bit stricter: a CPU tensor
without dimensions may stand beside tensors of the device in arithmetic; any other one raises, indices included.
Autograd works. The name is ``lazy``, a device for which this PyTorch has no kernels of its own, so that nothing
is computed there by accident; and unlike ``meta``, no skeleton of a model lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy")
_CPU = torch.device("cpu")
_aten: Any = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.to.device, _aten.to.dtype_layout}  # the last two in inference mode alone
# These take tensors of several devices.
_COPIES = {_aten.copy_.default, *_MOVES}
# A GPU has to wait until the host knows a value or a size.
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.bincount.default,
    _aten.linalg_cholesky_ex.default,  # the error of each of these is looked at
    _aten._linalg_solve_ex.default,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class MixedDevices(RuntimeError):
    """Tensors of the CPU and of the device in one operation."""


@dataclass
class Host:
    """``copies``: the operators, in order, by which the host got a value from the device and waited for it;
    ``uploads``: those by which the device got values of one dimension or more from the host."""

    copies: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)


_hosts: list[Host] = []


class NamedTensor(torch.Tensor):
    """A tensor of the device. ``held`` has its values, on the CPU."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> NamedTensor:
        """Wrap a CPU tensor."""
        made: NamedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"NamedTensor({self.held!r})"

    @property
    def data(self) -> Tensor:
        """The tensor without its graph."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, NamedTensor), "the values of a tensor of the device replaced by those of another one"
        self.held = value.held
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    # What PyTorch refuses for subclasses, or reads past them.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()


class _Placing(TorchDispatchMode):
    """Makes tensors of the device where an operator is asked for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with every tensor in its lists, tuples and dicts changed; quicker than pytree's."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        changed = [_mapped(change, one) for one in value]
        return changed if isinstance(value, list) else tuple(changed)
    return value


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator's result, on the device where it or an operand is; raises MixedDevices."""
    placed: dict[int, NamedTensor] = {}  # by the tensor that each holds
    others: list[Tensor] = []

    def held(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, NamedTensor):
            others.append(tensor)
            return tensor
        placed[id(tensor.held)] = tensor
        return tensor.held

    inner_args, inner_kwargs = _mapped(held, args), _mapped(held, kwargs)
    wanted = kwargs.get("device") if func is not _aten.to.device else args[1]
    if wanted is not None:
        wanted = torch.device(torch.device(wanted).type)
        if func is _aten.to.device:
            inner_args = (inner_args[0], _CPU, *inner_args[2:])
        else:
            inner_kwargs["device"] = _CPU
    if not placed and wanted != DEVICE:
        return func(*args, **kwargs)
    if func not in _COPIES:
        _check_devices(func, args, [*placed.values()], others)
    result = func(*inner_args, **inner_kwargs)
    if _hosts:
        _count(func, args, wanted)
    if func is _aten.copy_.default:
        return args[0]
    if wanted not in (None, DEVICE):
        return result
    # An operator that writes into tensors returns these themselves.
    return _mapped(lambda tensor: placed[id(tensor)] if id(tensor) in placed else NamedTensor(tensor), result)


def _check_devices(func: Any, args: Any, placed: list[NamedTensor], others: list[Tensor]) -> None:
    """Raise MixedDevices unless all that is not on the device are tensors without dimensions that are only read."""
    if not placed or not others:
        return
    changed = [
        value for value, known in zip(args, func._schema.arguments, strict=False) if known.alias_info is not None
    ]
    for tensor in others:
        if tensor.ndim > 0 or _lists(func) or any(tensor is one for one in changed):
            shapes = [f"{tuple(one.shape)} on {one.device}" for one in (*placed, *others)]
            raise MixedDevices(f"{func} of tensors on several devices: {', '.join(shapes)}")


def _lists(func: Any) -> bool:
    """Whether the operator takes lists of tensors, which must all be on one device."""
    return func in (_aten.cat.default, _aten.stack.default) or func.__name__.startswith(("_foreach", "_fused"))


def _count(func: Any, args: Any, wanted: torch.device | None) -> None:
    """Note a copy to the host or from it."""
    downloads = func in _WAITING
    uploads = False
    if func in _MOVES:
        downloads = isinstance(args[0], NamedTensor) and wanted == _CPU
        uploads = not isinstance(args[0], NamedTensor) and args[0].ndim > 0
    elif func is _aten.copy_.default:
        downloads = not isinstance(args[0], NamedTensor)
        uploads = not isinstance(args[1], NamedTensor) and args[1].ndim > 0
    elif func in _INDEXED:  # a mask becomes indices, whose number the host has to know
        downloads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    for host in _hosts:
        if downloads:
            host.copies.append(str(func))
        if uploads:
            host.uploads.append(str(func))


@contextmanager
def named_device() -> Iterator[Host]:
    """Give the device to this thread; yields what is copied between it and the host."""
    host = Host()
    _hosts.append(host)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=...) makes its values on the CPU and copies them
    try:
        with _Placing():
            yield host
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        _hosts.remove(host)


class bfloat16_autocast(TorchFunctionMode):
    """What ``torch.autocast`` does on a GPU: matrix products of float32 tensors in bfloat16."""

    PRODUCTS = {  # noqa: RUF012
        torch.nn.functional.linear,
        torch.nn.functional.scaled_dot_product_attention,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
    }

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS:
            args, kwargs = _mapped(_half, args), _mapped(_half, kwargs)
        return func(*args, **kwargs)


def _half(value: Tensor) -> Tensor:
    return value.bfloat16() if value.dtype == torch.float32 else value


def accelerator(precision: str, device: torch.device = DEVICE) -> Any:
    """What a run uses of accelerate's Accelerator, for the device or for the CPU."""
    return SimpleNamespace(
        device=device,
        mixed_precision=precision,
        autocast=bfloat16_autocast if precision == "bf16" else nullcontext,
    )


def fuse_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AdamW's fused step run on the device: PyTorch has a list of the devices that have one."""
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "cuda", DEVICE.type])
