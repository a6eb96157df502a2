"""Export a finished checkpoint to a folder: packed, as a dense copy, or as GGUF, each with its model card; or as a
Space that shows it.

    source = find_checkpoint("20261122-103041-1d371b")       or a packed folder, or "shipped"
    export(source, "gguf", Path("exports/mine"), gguf_type="q4_1")

The folder is written atomically. An export holds the packed model in memory, and of the dense weights those of one
file (``LARGEST``) or of one tensor.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.checkpoints.dense import dense_structure, dense_tensors
from lbllm.checkpoints.find import FoundCheckpoint, teacher_of
from lbllm.checkpoints.hf import LbllmConfig, load
from lbllm.checkpoints.record import RunRecord, copy_public
from lbllm.checkpoints.weights import save_parts
from lbllm.errors import ConfigError, LbllmError, ResourceError
from lbllm.extras import extra
from lbllm.files import new_folder, refuse_links, write_errors
from lbllm.measure.estimate import estimate
from lbllm.measure.experts_share import experts_sentence
from lbllm.models.catalogue import last_part
from lbllm.models.experts import Experts, split_experts
from lbllm.quant.packed_embedding import PackedTable, weight_count
from lbllm.quant.packed_layer import PackedLinear
from lbllm.share.card import Contents, model_card
from lbllm.share.gguf_names import SHAPES, GgufType
from lbllm.share.gguf_types import Stored, is_q8_0, stored_matrices, told
from lbllm.share.modelfile import modelfile
from lbllm.share.space import write_space

ExportKind = Literal["packed", "dense", "gguf", "space"]
_RATE = 1e11  # FLOPs per second, of any machine: only shares of the time are stated
_SPARE = 32 * 2**20  # tokenizer, config, headers


@dataclass(frozen=True)
class Exported:
    """What was written; ``disk_bytes``: all files of the folder."""

    path: Path
    kind: ExportKind
    disk_bytes: int


def export(
    source: FoundCheckpoint,
    kind: ExportKind,
    out: Path,
    *,
    teacher: str | None = None,
    gguf_type: GgufType | None = None,
) -> Exported:
    """Write the checkpoint to the new or empty folder ``out``. ``teacher``: that of a Space, see ``write_space``;
    ``gguf_type``: of the weights in a GGUF file, bfloat16 if it is None.

    Raises ConfigError if ``out`` is not empty, CheckpointError for a damaged checkpoint, ModelError if the model
    can't be written as GGUF or a Space's teacher is not found, ResourceError if there is too little disk space or the
    checkpoint has links to files outside it.
    """
    if teacher is not None and kind != "space":
        raise ConfigError(f"only a Space has a teacher; leave out the teacher {teacher}, or export to a Space")
    if gguf_type is not None and kind != "gguf":
        raise ConfigError(f"only a GGUF file has a type; leave out the type {gguf_type}, or export to GGUF")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another name or remove it")
    if kind == "space":
        write_space(source.folder, out, teacher=teacher or teacher_of(source))
        return Exported(out, kind, sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))
    refuse_links(source.folder)  # what is loaded is written again: a chat template, for example
    # Load it for every kind: loading checks every tensor, so a damaged checkpoint is not exported.
    model, tokenizer = load(source.folder, dtype=torch.bfloat16)
    stored: dict[str, Stored] = {}
    if kind == "gguf":
        with extra("gguf", "an export to GGUF"):
            from lbllm.share.gguf import check_exportable
        check_exportable(model.config, tokenizer, _name(source.record))
        stored = stored_matrices(model, gguf_type or "bf16")
    contents = _contents(model, source.record, told(model, stored) if gguf_type not in (None, "bf16") else None)
    bits = SHAPES[gguf_type or "bf16"].bits
    needed = contents.packed_bytes if kind == "packed" else int(bits / 8 * contents.binarized) + 2 * contents.dense
    with write_errors(out), new_folder(out) as folder:
        _check_space(out.absolute().parent, needed + _SPARE)
        if kind == "packed":
            copy_public(source.folder, source.record, folder)
        elif kind == "dense":
            dense = dense_structure(model)
            save_parts(dense, dense_tensors(model, dense), folder)
            tokenizer.save_pretrained(folder)
        else:
            file = folder / f"{out.name}-{(gguf_type or 'bf16').upper()}.gguf"
            _write_gguf(source.record, model, tokenizer, file, stored)
        written = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}
        card = model_card(source.record, kind, out.name, files, contents, chat=tokenizer.chat_template is not None)
        (folder / "README.md").write_text(card)
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(out, kind, total)


def _contents(model: PreTrainedModel, record: RunRecord, types: str | None) -> Contents:
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    packed = {id(tensor) for layer in layers for tensor in layer.buffers()}
    quantizers = {id(p) for layer in layers if layer.quantizer is not None for p in layer.quantizer.parameters()}
    quantized = sum(q.numel() for q in model.parameters() if id(q) in packed | quantizers)
    stated: LbllmConfig = model.config.quantization_config
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Contents(
        architecture=type(model).__name__,
        binarized=sum(layer.in_features * layer.out_features for layer in layers),
        dense=weight_count(model) - quantized,
        embedding_bits=stated.format.embedding_bits,
        q8_0=any(isinstance(table, PackedTable) and is_q8_0(table) for table in model.modules()),
        packed_bytes=size,
        experts=_experts(model, record),
        types=types,
    )


def _experts(model: PreTrainedModel, record: RunRecord) -> str:
    """What the experts of a mixture take, as a sentence; empty for other models, and where settings are not known."""
    if record.settings is None or not any(isinstance(module, Experts) for module in model.modules()):
        return ""
    structure = dense_structure(model)
    split_experts(structure)
    settings = record.settings.model_copy(update={"device": "cpu"})
    try:
        return experts_sentence(estimate(settings, model=structure, rate=_RATE), shares_alone=True)
    except LbllmError:  # settings of another model
        return ""


def _write_gguf(
    record: RunRecord,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    stored: dict[str, Stored],
) -> None:
    """Write the model to ``file``, and the Modelfile beside it."""
    from lbllm.share.gguf import write_gguf  # its library is an extra
    from lbllm.share.gguf_models import context_length
    from lbllm.share.gguf_tokenizer import begins_with_start

    dense = dense_structure(model)
    tensors = dense_tensors(model, dense)
    write_gguf(dense, tokenizer, file, name=_name(record), licence=record.licence, tensors=tensors, stored=stored)
    context = context_length(model.config)
    text = modelfile(model, tokenizer, file.name, context=context, start=begins_with_start(tokenizer))
    (file.parent / "Modelfile").write_text(text)


def _name(record: RunRecord) -> str:
    """What a GGUF file calls the model."""
    base = record.base_model or (record.settings.model if record.settings is not None else "")
    return f"{last_part(base)} binarized by LBLLM".strip()


def _check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError if fewer than ``needed`` bytes are free on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"the export needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free; free some "
            "space or choose a folder on another disk"
        )
