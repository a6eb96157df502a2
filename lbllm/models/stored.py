"""What the weights files of a folder hold, read from their headers: a model of shapes alone can't know it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from lbllm.models.loading import settle_tied_weights

_ROWS = 1_024


def untie_stored_head(model: PreTrainedModel, folder: Path) -> None:
    """Give a model on the meta device a head of its own where its config says that the embeddings are the head, but
    the safetensors files in ``folder`` have both, with different values. transformers then loads both."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not pairs:
        return
    try:
        places = _places(folder)
        for target, source in pairs.items():
            first, second = places.get(target), places.get(source) or places.get(source.partition(".")[2])
            if first is not None and second is not None and not _equal(first, target, *_named(second, source)):
                owner, _, last = target.rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, last, nn.Parameter(torch.empty_like(getattr(module, last)), requires_grad=False))
    except (OSError, SafetensorError, ValueError):
        return  # loading says what is wrong with the files
    settle_tied_weights(model)


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    single = folder / "model.safetensors"
    places: dict[str, Path] = {}
    for file in [single] if single.is_file() else sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    return places


def _named(file: Path, name: str) -> tuple[Path, str]:
    with safe_open(file, "pt") as tensors:
        return file, name if name in tensors.keys() else name.partition(".")[2]  # noqa: SIM118 - not a dict


def _equal(first: Path, name: str, second: Path, other: str) -> bool:
    """Whether two tensors have the same values; reads them in parts and stops at the first difference."""
    with safe_open(first, "pt") as one, safe_open(second, "pt") as two:
        left, right = one.get_slice(name), two.get_slice(other)
        if left.get_shape() != right.get_shape():
            return False
        rows = left.get_shape()[0]
        return all(torch.equal(left[at : at + _ROWS], right[at : at + _ROWS]) for at in range(0, rows, _ROWS))
