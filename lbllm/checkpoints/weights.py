"""The weights in a model's folder: one safetensors file, or several with an index, as transformers names them.

    write_weights(folder, tensors, largest=10**9)     tensors that come one after the other, a shard in memory at a time
    save_parts(model, tensors, folder)                a whole folder, as ``model.save_pretrained`` writes it
    weights_files(folder), weights_bytes(folder)      the files, and their size

Several files are ``model-00001-of-00003.safetensors`` and so on, and ``model.safetensors.index.json`` says which tensor
is in which file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lbllm.models.loading import INDEX, FileFault, indexed_files, quiet

WEIGHTS = "model.safetensors"
LARGEST = 10**9  # bytes of a file's tensors; a writer holds that much
_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_BLOCK = re.compile(r".*?\.\d+(?=\.)")


def weights_files(folder: Path) -> list[Path]:
    """The files with the weights in ``folder``, sorted, as transformers finds them: model.safetensors, or else the
    files that the index names.

    Raises FileFault if there are none, or if the index is damaged or names a file that is not in the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileFault(f"{WEIGHTS} does not exist")
    return [folder / name for name in indexed_files(str(folder))]


def weights_bytes(folder: Path) -> int:
    """The size in bytes of all files with the weights in ``folder``. Raises FileFault, OSError."""
    return sum(file.stat().st_size for file in weights_files(folder))


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, largest: int = LARGEST, parameters: int | None = None
) -> list[Path]:
    """Write tensors that come one after the other, and return their files, without the index.

    A file is full where the next tensor would make its tensors larger than ``largest`` bytes; a tensor that is larger
    than that has a file of its own. This is the rule of ``save_pretrained``, so the files are those that it writes.
    The tensors of one file, and one more, are in memory at a time. Weights that lie in ``folder`` are replaced.
    ``parameters``: what the index states as their number. Raises OSError, SafetensorError.
    """
    drafts: list[Path] = []
    places: dict[str, int] = {}
    total = filled = 0
    held: dict[str, Tensor] = {}

    def write(part: dict[str, Tensor]) -> None:
        drafts.append(folder / f".model-{len(drafts) + 1:05d}.safetensors")
        save_file(part, drafts[-1], metadata={"format": "pt"})
        places.update(dict.fromkeys(part, len(drafts) - 1))
        part.clear()

    try:
        for name, tensor in tensors:
            stored = tensor.detach().cpu().contiguous()
            total += stored.nbytes
            if stored.nbytes > largest:
                write({name: stored})
                continue
            if filled + stored.nbytes > largest:
                write(held)
                filled = 0
            held[name] = stored
            filled += stored.nbytes
        if held:
            write(held)
        count = len(drafts)
        numbered = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        files = [folder / name for name in (numbered if count > 1 else [WEIGHTS])]
        for draft, file in zip(drafts, files, strict=True):
            draft.replace(file)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    if count > 1:
        stated = {"total_size": total} | ({} if parameters is None else {"total_parameters": parameters})
        index = {"metadata": stated, "weight_map": {name: files[part].name for name, part in places.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    remove_old(folder)
    return files


def remove_old(folder: Path) -> None:
    """Remove the weights of an earlier write from ``folder``: files that its index does not name, or without an index
    all but model.safetensors. transformers leaves some of them, and would load these."""
    kept = set(indexed_files(str(folder)) if (folder / INDEX).is_file() else [WEIGHTS])
    for file in folder.iterdir():
        if file.name not in kept and (file.name == WEIGHTS or _PART.fullmatch(file.name)):
            file.unlink()


def save_parts(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, *, largest: int = LARGEST
) -> torch.dtype:
    """Write what ``model.save_pretrained(folder)`` writes: settings and weights, but the weights from ``tensors``.

    ``model`` is only the structure; its parameters may be on the meta device, but must be shared where weights are
    tied. ``tensors``: all entries of its state dict in the order of the model; of tied ones, the one that is stored is
    enough. In memory are those of one file and of one block. Returns the model's dtype. Raises ValueError for a tensor
    that the model does not have and for a missing one, OSError, SafetensorError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = model.state_dict()
    missing = set(remove_tied_weights_from_state_dict(dict(entries), model)) - set(model._keys_to_ignore_on_save or ())
    parameters = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    dtype: torch.dtype | None = None

    def stored() -> Iterator[tuple[str, Tensor]]:
        nonlocal dtype
        for name, tensor in tensors:
            if name not in entries:
                raise ValueError(f"{type(model).__name__} has no tensor {name}")
            if dtype is None and name in parameters:
                dtype = tensor.dtype
            if name in missing:
                missing.remove(name)
                yield name, tensor
        if missing:
            raise ValueError(f"{len(missing)} tensors of {type(model).__name__} are missing, e.g. {min(missing)}")

    write_weights(folder, _as_in_files(model, stored()), largest=largest, parameters=model.num_parameters())
    assert dtype is not None
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with quiet():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    return dtype


def _as_in_files(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names, and in the form, that the architecture's files have. transformers converts a whole state
    dict; no conversion goes beyond a block, so this one converts block by block."""
    for _, part in groupby(tensors, key=lambda entry: _block(entry[0])):
        yield from revert_weight_conversion(model, dict(part)).items()


def _block(name: str) -> str | None:
    """The path of the module in a list that a tensor belongs to; None if it belongs to none."""
    found = _BLOCK.match(name)
    return found and found[0]
