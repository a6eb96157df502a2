"""Give a finished checkpoint embeddings and an output head of other bits, without training.

    repack(find_checkpoint("shipped"), 6, Path("small"))

They are packed from the teacher's weights, which were not rounded before. All else stays as it is, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from lbllm.checkpoints.dense import dense_structure
from lbllm.checkpoints.find import FoundCheckpoint, teacher_of
from lbllm.checkpoints.hf import LbllmConfig, LbllmQuantizer, load, save_packed
from lbllm.checkpoints.record import RECORD, write_record
from lbllm.checkpoints.weights import LARGEST, weights_bytes
from lbllm.errors import CheckpointError, ConfigError
from lbllm.files import new_folder, refuse_links, write_errors
from lbllm.models.teacher import stream_teacher
from lbllm.models.weights import row_parts
from lbllm.quant.embedding_code import is_rounding_of
from lbllm.quant.packed_embedding import PackedTable, replace_tables, tables
from lbllm.sections import EmbeddingBits

Read = Callable[[str, slice], Tensor]  # some rows of the embeddings or the output head of that name, float32


@dataclass(frozen=True)
class Repacked:
    """What was written; ``disk_bytes``: the files with the weights."""

    path: Path
    embedding_bits: EmbeddingBits
    disk_bytes: int


def repack(
    found: FoundCheckpoint, bits: EmbeddingBits, out: Path, *, teacher: str | None = None, own: bool = False
) -> Repacked:
    """Write the checkpoint with other ``bits`` of embeddings and output head to the new or empty folder ``out``.

    ``teacher``: by default ``teacher_of``. ``own``: pack the checkpoint's own, rounded weights instead. Raises
    ConfigError if ``out`` is not empty, CheckpointError for a damaged checkpoint and for one of another teacher,
    ModelError, ResourceError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another name or remove it")
    refuse_links(found.folder)
    model, _ = load(found.folder, dtype=torch.bfloat16)
    read = _own_rows(model) if own else _teachers_rows(found, model, teacher)
    _exchange(model, bits, read)
    with write_errors(out), new_folder(out) as folder:
        for path in found.folder.iterdir():
            if path.is_file() and not path.name.startswith("model") and path.name not in (RECORD, "README.md"):
                shutil.copyfile(path, folder / path.name)
        if (found.folder / CHAT_TEMPLATE_DIR).is_dir():
            shutil.copytree(found.folder / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)
        record = found.record
        # The student's figures are those of the embeddings that it had.
        kept = tuple(one for one in record.evaluations if one.what == "teacher")
        write_record(folder, record.model_copy(update={"evaluations": kept}))
        save_packed(model, folder, max_shard_size=LARGEST)
        size = weights_bytes(folder)
    return Repacked(out, bits, size)


def _own_rows(model: PreTrainedModel) -> Read:
    """The rows of a packed model's own embeddings and output head."""
    parts = tables(model)

    def read(name: str, rows: slice) -> Tensor:
        module: Any = parts[name]
        found: Tensor = module.unpack(rows) if isinstance(module, PackedTable) else module.weight.detach()[rows].float()
        return found

    return read


def _teachers_rows(found: FoundCheckpoint, model: PreTrainedModel, teacher: str | None) -> Read:
    """The rows of the teacher's embeddings and output head. Raises CheckpointError if the model's are not these."""
    name = teacher or teacher_of(found)
    blocks = stream_teacher(name, torch.device("cpu")).model

    def read(place: str, rows: slice) -> Tensor:
        full = f"{place}.weight"
        return blocks.rows(full, rows) if full in blocks.matrices else blocks.model.get_parameter(full).detach()[rows]

    theirs = tables(blocks.model)
    for place, module in tables(model).items():
        stored: Any = module.weight
        rows = module.rows if isinstance(module, PackedTable) else len(stored)
        columns = module.columns if isinstance(module, PackedTable) else stored.shape[1]
        other: Any = getattr(theirs.get(place), "weight", None)
        fits = other is not None and tuple(other.shape) == (rows, columns)
        for part in row_parts((rows, columns)) if fits else ():
            wanted = read(place, part)
            if isinstance(module, PackedTable):
                fits = is_rounding_of(stored[part], wanted, module.bits, module.scale)
            else:
                fits = torch.equal(wanted.bfloat16(), stored[part].bfloat16())
            if not fits:
                break
        if not fits:
            raise CheckpointError(
                f"{found.name}: {place} is not that of {name}; give the model that it was made from with --teacher, or "
                "--own to pack what the checkpoint has"
            )
    return read


def _exchange(model: PreTrainedModel, bits: EmbeddingBits, read: Read) -> None:
    """Give a packed model embeddings and an output head of so many bits; what shared weights shares the new ones."""
    stated: LbllmConfig = model.config.quantization_config
    quant = stated.format.model_copy(update={"embedding_bits": bits})
    structure = dense_structure(model)
    with torch.device("meta"):
        replace_tables(structure, quant)
    before = tables(model)
    made: dict[int, nn.Module] = {}
    for name, module in tables(structure).items():
        empty: Any = module.weight
        first: Any = made.setdefault(id(empty), module)
        if isinstance(module, PackedTable):
            module.to_empty(device="cpu")
            if first is module:
                module.pack(partial(read, name))
            else:
                module.column_scale = None if first.column_scale is None else first.column_scale.clone()
        elif first is module:
            module.weight = nn.Parameter(torch.empty_like(empty, device="cpu"), requires_grad=False)
            for part in row_parts(tuple(empty.shape)):
                module.weight.data[part] = read(name, part).bfloat16()
        module.weight = first.weight
        if getattr(module, "bias", None) is not None:
            module.bias = before[name].bias
        model.set_submodule(name, module)
    config = LbllmConfig(quant=quant.model_dump(mode="json"), bpw=stated.bpw, provenance=stated.provenance)
    model.config.quantization_config = config
    model.hf_quantizer = LbllmQuantizer(config)  # type: ignore[assignment]
