"""Read single tensors, or some rows of them, from the safetensors files of a model that is larger than memory.

    weights = StoredWeights.find("models/my-llama")
    weights.read("model.layers.0.mlp.up_proj.weight")            in the dtype of the file
    weights.read("model.embed_tokens.weight", slice(0, 1024))    the first rows

Nothing is mapped into memory: a mapping of the whole file counts as data of the process where that is limited. A file
that is short, or that has changed since its header was read, is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm.json_input import decode_object, shortened
from lbllm.models.loading import INDEX, FileFault, find_file, indexed_files, read_object

_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Rows of a matrix that are read, compared or hashed at once, in numbers.
PART = 2**22


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, dtype, shape, and first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one entry of the first dimension."""
        return self.dtype.itemsize * prod(self.shape[1:])


def row_parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield ranges of the rows of a tensor, each of about 4 million numbers."""
    step = max(1, PART // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


class StoredWeights:
    """The tensors of a model's safetensors files by their names in the files."""

    def __init__(self, files: list[Path]) -> None:
        """Read the headers of ``files``. Raises FileFault, OSError."""
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}  # of all files
        self._states = {file: _state(file) for file in files}
        for file in files:
            metadata, tensors = _read_header(file)
            self.metadata |= metadata
            for name, tensor in tensors.items():
                if name in self.tensors:
                    raise FileFault(f"{file.name} and {self.tensors[name].file.name} both have the tensor {name}")
                self.tensors[name] = tensor

    @classmethod
    def find(cls, place: str, offline: bool = True) -> StoredWeights:
        """Open the safetensors files of a folder or of a hub repository, which are downloaded if need be.

        Raises FileFault if a file is missing or damaged, OSError.
        """
        stated = read_object(place, "config.json", offline).get("transformers_weights")
        single = stated if isinstance(stated, str) and not stated.endswith(".index.json") else "model.safetensors"
        file = None if isinstance(stated, str) and stated != single else find_file(place, single, offline)
        if file is not None:
            return cls([file])
        index = stated if isinstance(stated, str) and stated != single else INDEX
        found = [find_file(place, name, offline) for name in indexed_files(place, index, offline)]
        return cls([file for file in found if file is not None])

    def read(self, name: str, rows: slice | Tensor | None = None) -> Tensor:
        """Return a tensor, or some of its rows (a slice without step, or ascending int64 indices), in its own dtype.

        Raises FileFault if its file has changed since the headers were read, IndexError for rows that it does not have,
        OSError.
        """
        tensor = self.tensors[name]
        with self._open(tensor.file) as file:
            if isinstance(rows, Tensor):
                return torch.cat([_read(file, tensor, int(row), 1) for row in rows])
            if rows is None:
                return _read(file, tensor, 0, tensor.shape[0] if tensor.shape else 1).view(tensor.shape)
            return _read(file, tensor, rows.start, rows.stop - rows.start)

    def same_values(self, name: str, other: str) -> bool:
        """Whether two tensors have the same values; reads them in parts and stops at the first difference."""
        first, second = self.tensors[name], self.tensors[other]
        if first.shape != second.shape:
            return False
        return all(torch.equal(self.read(name, part), self.read(other, part)) for part in row_parts(first.shape))

    def check(self) -> None:
        """Raise FileFault if a file is missing, or has changed since the headers were read."""
        for path in self._states:
            self._check(path)

    def _check(self, path: Path) -> None:
        if not path.exists():
            raise FileFault(f"{path.name} is missing; it was there before")
        if _state(path) != self._states[path]:
            raise FileFault(f"{path.name} has changed since it was opened")

    @contextmanager
    def _open(self, path: Path) -> Iterator[int]:
        self._check(path)
        file = os.open(path, os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)


def _state(file: Path) -> tuple[int, int]:
    """What changes when a file is written: its size and time."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _read(file: int, tensor: StoredTensor, first: int, rows: int) -> Tensor:
    if tensor.shape and not 0 <= first <= first + rows <= tensor.shape[0]:  # other tensors' bytes lie there
        raise IndexError(f"rows {first} to {first + rows - 1} of a tensor of {tensor.shape[0]} rows")
    data = torch.empty(rows * tensor.row_bytes, dtype=torch.uint8)
    buffer: Any = data.numpy()
    view, done = memoryview(buffer), 0
    while done < len(view):
        count = os.preadv(file, [view[done : done + 2**30]], tensor.start + first * tensor.row_bytes + done)
        if count == 0:
            raise FileFault(f"{tensor.file.name} ends before its last tensor")
        done += count
    return data.view(tensor.dtype).view(rows, *tensor.shape[1:])


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """A file's metadata and tensors. The format: a length in 8 bytes, so many bytes of JSON, the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise FileFault(f"{path.name} is damaged: its header does not fit into it")
        try:
            table = decode_object(stream.read(length), largest=_LARGEST_HEADER)
        except ValueError as error:
            raise FileFault(f"{path.name} is damaged: its header {shortened(str(error))}") from None
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFault(f"{path.name} is damaged: its metadata are not texts")
    tensors, end = {}, 0
    for name, entry in table.items():
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            start, stop = map(int, entry["data_offsets"])
            if not 0 <= start <= stop or stop - start != dtype.itemsize * prod(shape) or min(shape, default=1) < 0:
                raise ValueError(f"{shape} of {dtype} does not take the bytes {start} to {stop}")
        except (KeyError, TypeError, ValueError) as error:
            raise FileFault(f"{path.name} is damaged: tensor {shortened(name)}: {shortened(str(error))}") from None
        end = max(end, stop)
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + start)
    if 8 + length + end > size:
        raise FileFault(f"{path.name} is too short: {size:,} bytes, its header needs {8 + length + end:,}")
    return metadata, tensors
