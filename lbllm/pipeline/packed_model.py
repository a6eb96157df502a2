"""The packed model after a stage, and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lbllm.checkpoints.hf import LbllmConfig, LbllmQuantizer, attach_kv_cache, save_packed
from lbllm.checkpoints.record import RunRecord, write_record
from lbllm.config import RunConfig
from lbllm.files import new_folder
from lbllm.models.blocks import decoder_blocks, share_copy
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.pipeline.block_store import BlockStore
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.plan import block_formats
from lbllm.sections import Origin, QuantConfig
from lbllm.stages.block_state import restore
from lbllm.stages.distill import binary_layers


def restored_blocks(
    model: PreTrainedModel, store: BlockStore, stage: Origin, quant: QuantConfig
) -> Iterator[nn.Module]:
    """The blocks of a teacher as they were after a stage, one by one. Raises CheckpointError where one is missing."""
    _, blocks, formats = block_formats(model, quant)
    for number, block in enumerate(blocks):
        yield restore(block, formats[number], store.finished(stage, number).tensors, quant.tail_steps)


def stage_model(config: RunConfig, folder: Path, stage: Origin, teacher: Teacher | None = None) -> PreTrainedModel:
    """The model as it was after a stage of the run in ``folder``, packed as it would be deployed, computing in float32.

    Weights alone are binarized after stages 1 and 2; from stage 3 on activations and KV cache have their bits too.
    Raises CheckpointError where the run has not finished that stage.
    """
    teacher = teacher or load_teacher(config.model)
    return packed_model(config, folder, stage, teacher, torch.float32)[0]


def packed_model(
    config: RunConfig, folder: Path, stage: Origin, teacher: Teacher, dtype: torch.dtype
) -> tuple[PreTrainedModel, QuantConfig]:
    """The packed model after a stage and its format; what stays dense is rounded to bfloat16 and then held in
    ``dtype``."""
    quant = config.precision(stage)
    student: PreTrainedModel = share_copy(teacher.model)
    attach_kv_cache(student, quant.kv_bits)
    _, student_blocks = decoder_blocks(student)
    for number, restored in enumerate(restored_blocks(teacher.model, BlockStore(folder, None), stage, quant)):
        for name, layer in binary_layers(restored).items():
            packed = PackedLinear.pack(layer, quant.tail_steps, dtype)
            student_blocks[number].set_submodule(name, packed)
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(module, ActQuantizer):
                # New parameters, since the teacher shares the old ones.
                stored = parameter.detach().bfloat16().to(dtype)
                setattr(module, name, nn.Parameter(stored, requires_grad=False))
    student.tie_weights()
    return student.eval(), quant


def save_checkpoint(config: RunConfig, folder: Path, teacher: Teacher, target: Path, record: RunRecord) -> None:
    """Write the packed checkpoint of a run's last stage atomically: model.safetensors, config.json, tokenizer, and the
    record of the run."""
    model, quant = packed_model(config, folder, config.stages[-1], teacher, torch.bfloat16)
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
        save_packed(model, checkpoint)  # after the tokenizer, since the seal covers it too
        write_record(checkpoint, record)
