"""The packed model after a stage, and its checkpoint."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.checkpoints.hf import LbllmConfig, LbllmQuantizer, attach_kv_cache, save_packed_parts
from lbllm.checkpoints.record import RunRecord, write_record
from lbllm.config import RunConfig
from lbllm.files import new_folder
from lbllm.models.blocks import share_copy
from lbllm.models.streamed import BlockModel, Rows
from lbllm.models.teacher import BlockTeacher, Teacher, load_teacher
from lbllm.models.weights import row_parts
from lbllm.pipeline.packed_tables import PackedTables
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.kv_attention import attend_in_groups
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.packed_embedding import tables
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.plan import block_formats
from lbllm.sections import Origin, QuantConfig
from lbllm.stages.block_state import restore
from lbllm.stages.block_store import BlockStore
from lbllm.stages.distill import binary_layers


def restored_blocks(
    teacher: BlockModel, store: BlockStore, stage: Origin, quant: QuantConfig, *, packed: bool = False
) -> Iterator[nn.Module]:
    """The blocks of a teacher as they were after a stage, one by one; their experts are ``packed``. Raises
    CheckpointError where one is missing."""
    formats = block_formats(teacher.model, quant)[2]
    for number, of_block in enumerate(formats):
        # No name holds the state while the block is used.
        yield restore(
            teacher.block(number),
            of_block,
            store.finished(stage, number).tensors,
            quant.tail_steps,
            store.experts(stage, number),
            packed=packed,
        )


def stage_model(config: RunConfig, folder: Path, stage: Origin, teacher: Teacher | None = None) -> PreTrainedModel:
    """The model as it was after a stage of the run in ``folder``, packed as it would be deployed, computing in float32.

    Weights alone are binarized after stages 1 and 2; from stage 3 on activations and KV cache have their bits too.
    Raises CheckpointError where the run has not finished that stage.
    """
    whole = (teacher or load_teacher(config.model)).model
    student = stage_blocks(config, folder, stage, BlockModel.of(whole))
    for number in range(len(student.blocks)):
        student.blocks[number] = student.block(number)
    return student.model.eval()


def stage_blocks(config: RunConfig, folder: Path, stage: Origin, teacher: BlockModel) -> BlockModel:
    """``stage_model``, computed one block at a time."""
    quant, store = config.precision(stage), BlockStore(folder, None)
    model: PreTrainedModel = share_copy(teacher.model)
    attach_kv_cache(model, KVFormat.of(quant))
    inside, outside, bits = f"{teacher.path}.", tables(model), quant.embedding_bits
    packed = PackedTables(teacher, bits, store, stage)
    for name, module in model.named_modules():
        if not name.startswith(inside):
            own = {f"{name}.weight"} if name in outside and bits < 16 else set()
            _round_dense(module, torch.float32, skip=teacher.matrices.keys() | own, prefix=name)
            if own and not own & teacher.matrices.keys():
                module.weight = nn.Parameter(packed.unpacked(f"{name}.weight"), requires_grad=False)
    model.tie_weights()
    formats = block_formats(teacher.model, quant)[2]

    def make(number: int) -> nn.Module:
        state = store.finished(stage, number)
        experts = store.experts(stage, number)
        block = restore(teacher.block(number), formats[number], state.tensors, quant.tail_steps, experts, packed=True)
        del state
        if KVFormat.of(quant).in_groups:
            attend_in_groups(block)
        return packed_block(block, quant.tail_steps, torch.float32).eval()

    def read(name: str, rows: Rows) -> Tensor:
        return teacher.rows(name, rows).bfloat16().float() if bits == 16 else packed.unpacked(name, rows)

    return BlockModel(model, make, device=teacher.device, matrices=teacher.matrices, read=read)


def packed_block(block: nn.Module, tail: int, dtype: torch.dtype) -> nn.Module:
    """Pack the layers of a restored block; what stays dense is rounded to bfloat16 and then held in ``dtype``."""
    for name, layer in binary_layers(block).items():
        block.set_submodule(name, PackedLinear.pack(layer, tail, dtype))
    for module in block.modules():
        _round_dense(module, dtype)
    return block


def _round_dense(
    module: nn.Module,
    dtype: torch.dtype,
    skip: Container[str] = (),
    prefix: str = "",
) -> None:
    """Round a module's own parameters as a checkpoint stores them, to bfloat16."""
    if isinstance(module, ActQuantizer):
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        if f"{prefix}.{name}".removeprefix(".") not in skip:
            # New parameters, since the teacher shares the old ones.
            stored = parameter.detach().bfloat16().to(dtype)
            setattr(module, name, nn.Parameter(stored, requires_grad=False))


def save_checkpoint(config: RunConfig, folder: Path, teacher: BlockTeacher, target: Path, record: RunRecord) -> None:
    """Write the packed checkpoint of a run's last stage atomically: weights, config.json, tokenizer, and the record of
    the run. One block at a time is in memory."""
    stage = config.stages[-1]
    quant = config.precision(stage)
    model: PreTrainedModel = share_copy(teacher.model.model)
    model.config.dtype = torch.bfloat16
    provenance = {"model": config.model, "precision": teacher.precision, "licence": teacher.licence}
    model.config.quantization_config = LbllmConfig(
        quant=quant.model_dump(mode="json"),
        bpw=record.bpw,
        provenance=provenance | {"run": config.model_dump(mode="json", exclude={"device"})},
    )
    model.hf_quantizer = LbllmQuantizer(model.config.quantization_config)  # type: ignore[assignment]
    with new_folder(target, replace=True) as checkpoint:
        teacher.tokenizer.save_pretrained(checkpoint)
        # After the tokenizer, since the seal covers it too.
        save_packed_parts(model, _tensors(teacher.model, BlockStore(folder, None), stage, quant), checkpoint)
        write_record(checkpoint, record)


def _tensors(teacher: BlockModel, store: BlockStore, stage: Origin, quant: QuantConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed model in the order of its blocks, each by its name in the model's state_dict."""
    inside, parameters = f"{teacher.path}.", dict(teacher.model.named_parameters())
    buffers = dict(teacher.model.named_buffers())
    blocks = restored_blocks(teacher, store, stage, quant, packed=True)
    rows = {f"{name}.weight" for name in tables(teacher.model)} if quant.embedding_bits < 16 else set()
    made = PackedTables(teacher, quant.embedding_bits, store, stage)
    begun = -1
    for name, tensor in teacher.model.state_dict().items():
        if name.startswith(inside):
            number = int(name.removeprefix(inside).partition(".")[0])
            if number != begun:
                packed = packed_block(next(blocks), quant.tail_steps, torch.bfloat16)
                yield from ((f"{inside}{number}.{key}", value) for key, value in packed.state_dict().items())
            begun = number
        elif name in rows:
            yield name, made.packed(name).weight
            scale = made.packed(name).column_scale
            if scale is not None:
                yield (
                    f"{name.removesuffix('weight')}column_scale",
                    scale.clone(),
                )  # a file may not hold one tensor twice
        elif name in teacher.matrices and name in parameters:
            yield name, _matrix(teacher, name)
        elif name in parameters or name in buffers:
            yield name, tensor.bfloat16() if name in parameters else tensor


def _matrix(teacher: BlockModel, name: str) -> Tensor:
    """A matrix that is not in memory, rounded to bfloat16: read in parts, so it never exists twice."""
    matrix = torch.empty(teacher.matrices[name], dtype=torch.bfloat16)
    for part in row_parts(teacher.matrices[name]):
        matrix[part] = teacher.rows(name, part).bfloat16()
    return matrix
