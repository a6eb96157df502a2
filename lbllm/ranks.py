"""One run on several processes, its ranks: what the engine needs of ``torch.distributed``.

    accelerate launch --multi_gpu --num_processes 2 -m lbllm.worker RUN_DIR

starts the processes; ``machine.make_accelerator`` joins them. Rank 0, the first, alone writes the run's files and
events. With one process every function here returns what it was given, and nothing is sent.

The functions that send something wait for all ranks, which must call them in the same order: ``sum_``, ``mean``,
``gather_``, ``same``, ``barrier``. If a rank dies, the others get an exception that ``is_loss`` knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lbllm.machine import PATIENCE

T = TypeVar("T")
# Tensors with fewer elements travel together, up to this many.
_BUCKET = 1 << 22
# Gloo raises RuntimeErrors that only their text tells from others.
_SIGNS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


def count() -> int:
    """The number of ranks that work on the run; 1 before they have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is rank 0, which writes the run's files and events."""
    return rank() == 0


@dataclass(frozen=True)
class Share:
    """Which of ``total`` sequences belong to which rank: ``unit`` neighbours together, the ranks in turn.

    What a stage computes of a batch of ``unit`` sequences is then the same on any number of ranks. A text of too few
    batches is divided into smaller units.
    """

    total: int
    unit: int = 1

    @property
    def _size(self) -> int:
        return max(1, min(self.unit, self.total // count()))

    def of(self, sequences: Tensor) -> Tensor:
        """This rank's part (m, ...) of ``total`` sequences (n, ...)."""
        if count() == 1:
            return sequences
        owner = torch.arange(len(sequences)) // self._size % count()
        return sequences[owner == rank()]

    def mine(self, rows: Tensor) -> Tensor:
        """Of sequence numbers (n,), those of this rank, as numbers in its part; their order is kept."""
        size = self._size
        rows = rows[rows // size % count() == rank()]
        return rows // (size * count()) * size + rows % size

    def of_first(self, number: int) -> int:
        """How many of the first ``number`` sequences are this rank's; they are the first of its part."""
        return len(self.mine(torch.arange(min(number, self.total))))


def part(total: int, of: int | None = None) -> slice:
    """The part of a range that rank ``of`` (None: this one) has; the parts of the first ranks may be longer by one."""
    number = rank() if of is None else of
    base, extra = divmod(total, count())
    begin = number * base + min(number, extra)
    return slice(begin, begin + base + (number < extra))


@cache
def _control() -> Any:
    """The group for values in main memory: a GPU's own group can't send them."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)  # it does not take that of the first group


def _group(tensor: Tensor) -> Any:
    return _control() if tensor.device.type == "cpu" else None


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor, of any shape, by its sum over the ranks. All ranks have the same shapes and dtypes."""
    if count() == 1:
        return
    small: dict[tuple[torch.dtype, str], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= _BUCKET and tensor.is_contiguous():
            dist.all_reduce(tensor, group=_group(tensor))
        else:
            small.setdefault((tensor.dtype, tensor.device.type), []).append(tensor)
    for bucket in (bucket for alike in small.values() for bucket in _buckets(alike)):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=_group(flat))
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def mean(value: float, weight: float) -> float:
    """The mean of the ranks' values, each by its weight; the value of a rank of weight 0 may be NaN."""
    if count() == 1:
        return value
    pair = torch.tensor([value * weight if weight else 0.0, weight], dtype=torch.float64)
    sum_(pair)
    return float(pair[0] / pair[1])


def gather_(*tensors: Tensor) -> None:
    """Fill contiguous tensors (rows, ...), of whose rows each rank has computed its ``part``, with those of all."""
    if count() == 1:
        return
    for tensor in tensors:
        for source in range(count()):
            rows = tensor[part(len(tensor), source)]
            if rows.numel():
                dist.broadcast(rows, src=source, group=_group(tensor))


def same(value: T) -> T:
    """Rank 0's value, for all ranks: something small that can be pickled."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control())
    return box[0]


def barrier() -> None:
    """Wait until all ranks are here."""
    if count() > 1:
        dist.barrier(group=_control())


def leave() -> None:
    """End the connection of the ranks."""
    if count() > 1:
        barrier()
        dist.destroy_process_group()
        _control.cache_clear()


def is_loss(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return count() > 1 and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' gradients, to be summed; a rank without work of its own has zeros. Empty with one process."""
    if count() == 1:
        return []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
