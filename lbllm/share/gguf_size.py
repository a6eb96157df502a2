"""The size of a checkpoint's GGUF file in each type, from the headers of its weights alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lbllm.checkpoints.weights import weights_files
from lbllm.errors import CheckpointError
from lbllm.models.loading import FileFault
from lbllm.share.gguf_names import INSTEAD, SHAPES, GgufType

Sizes = dict[str, tuple[tuple[int, ...], str]]


def gguf_sizes(folder: Path) -> dict[GgufType, int]:
    """The bytes of the tensors in a GGUF file of a packed checkpoint, by type; types that its rows don't allow are
    left out. Raises CheckpointError if the checkpoint can't be read."""
    try:
        tensors = _headers(folder)
        columns = int(json.loads((folder / "config.json").read_bytes())["hidden_size"])
    except (FileFault, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint in {folder} can't be read: {error}") from None
    layers = {name.removesuffix(".params") for name in tensors if name.endswith(".params")}
    found: dict[GgufType, int] = {}
    for kind in SHAPES:
        total, own = 0.0, 0
        for name, (shape, dtype) in tensors.items():
            layer = name.removesuffix(".weight")
            if layer in layers and layer != name:
                rows, used = shape[0], _type_of(8 * shape[2], kind)
                if used is None:
                    break
                own += used == kind
                total += rows * 8 * shape[2] * SHAPES[used].bits / 8
            elif name.rpartition(".")[0] in layers or name.endswith((".column_scale", ".quantizer.act")):
                continue
            elif len(shape) == 2:
                weights = shape[0] * (columns if dtype == "U8" else shape[1])
                eight = kind != "bf16" or (dtype == "U8" and shape[1] == columns // 32 * 34)
                total += weights * SHAPES["q8_0" if eight else "bf16"].bits / 8
            else:
                total += 4 * math.prod(shape)
        else:
            if own:
                found[kind] = int(total)
    return found


def _headers(folder: Path) -> Sizes:
    """Shape and dtype of each tensor by name."""
    found: Sizes = {}
    for file in weights_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return found


def _type_of(columns: int, kind: GgufType) -> GgufType | None:
    """The type that a file of type ``kind`` has for rows of this length; None if there is none."""
    while columns % SHAPES[kind].weights:
        if kind not in INSTEAD:
            return None
        kind = INSTEAD[kind]
    return kind
