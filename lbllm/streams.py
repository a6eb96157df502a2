"""Where the hidden states of all tokens of a stage lie: in memory, or in files on disk that are mapped into memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lbllm.errors import ResourceError


class Streams:
    """Makes the tensors of a run that have an entry for each token of a stage.

    ``folder``: the folder for their files, or None to keep them in memory. A file has no name once it is made, so the
    system frees it with its tensor, also when the process is killed.
    """

    def __init__(self, dtype: torch.dtype, folder: Path | None) -> None:
        self.dtype, self.folder = dtype, folder

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor without values on the CPU; ``dtype``: by default that of hidden states.

        Raises ResourceError if the disk has too little space.
        """
        kind = dtype or self.dtype
        count = torch.Size(shape).numel()
        if self.folder is None or count == 0:
            return torch.empty(shape, dtype=kind)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="stream-", dir=self.folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, count * kind.itemsize)  # a full disk would end the process later
            except OSError as error:
                raise ResourceError(
                    f"{self.folder} has no space for the hidden states of all tokens, "
                    f"{count * kind.itemsize / 1e9:.1f} GB ({error.strerror}); free some space there, or use less text"
                ) from None
            tensor = torch.from_file(file.name, shared=True, size=count, dtype=kind)
        return tensor.view(shape)

    def rows(self, capacity: int) -> Rows:
        """Return an empty ``Rows`` that makes its tensors for ``capacity`` rows."""
        return Rows(self, capacity)


class Rows:
    """Keeps tensors (rows, ...) that come one after the other, joined where the others of the run lie.

    Nothing is left between the large allocations that come and go meanwhile: where each batch leaves a small object in
    the place that the one before has freed, glibc takes new memory for the next, and the process grows with the text.
    """

    def __init__(self, streams: Streams, capacity: int) -> None:
        self._streams, self._capacity = streams, capacity
        self._parts: list[Tensor] = []
        self._used = 0  # rows of the last part
        self._places: list[tuple[int, int, int]] = []  # of each batch: part, first row, row after the last

    def append(self, batch: Tensor) -> None:
        """Copy a batch (rows, ...); all batches have the same dtype, and the same shape but for the rows."""
        count = len(batch)
        if not self._parts or self._used + count > len(self._parts[-1]):
            size = max(self._capacity, count)
            self._parts.append(self._streams.empty(size, *batch.shape[1:], dtype=batch.dtype))
            self._used = 0
        self._parts[-1][self._used : self._used + count].copy_(batch)
        self._places.append((len(self._parts) - 1, self._used, self._used + count))
        self._used += count

    def batches(self) -> list[Tensor]:
        """Return the batches, as they came; they share the memory of this object."""
        return [self._parts[part][first:last] for part, first, last in self._places]

    def joined(self) -> Tensor:
        """Return all rows, at least one batch of them, as one tensor; it shares the memory of this object where the
        capacity was enough."""
        return self._parts[0][: self._used] if len(self._parts) == 1 else torch.cat(self.batches())
