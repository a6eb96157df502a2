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

    def kept(self, tensor: Tensor) -> Tensor:
        """Return a tensor where the others of the run lie: itself, or a copy in a file or outside a GPU."""
        if self.folder is None:
            return tensor.cpu()
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
