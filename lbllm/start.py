"""Where a run goes on from a packed checkpoint: that checkpoint's layers, in the form in which stage 4 trains them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm.blocks import decoder_blocks
from lbllm.config import FROM_CHECKPOINT, SHIPPED, QuantConfig, RunConfig
from lbllm.errors import CheckpointError, ConfigError
from lbllm.hf import LbllmConfig, is_checkpoint, load
from lbllm.layers import PackedLinear
from lbllm.models import Teacher
from lbllm.run_record import RunRecord, read_record
from lbllm.shipped import shipped_checkpoint


def checkpoint_folder(start: str) -> Path:
    """The folder of the checkpoint that ``RunConfig.start`` names."""
    return shipped_checkpoint() if start == SHIPPED else Path(start)


def checkpoint_record(start: str) -> RunRecord:
    """What is known of how that checkpoint was made. Raises CheckpointError."""
    return read_record(checkpoint_folder(start))


def checkpoint_blocks(config: RunConfig, teacher: Teacher) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block's layers, as ``checkpoint.collect`` gives them, of the checkpoint ``config`` starts
    from. Raises CheckpointError, and ConfigError where it has another format or is not of this teacher."""
    assert config.start is not None
    model, _ = load(checkpoint_folder(config.start), dtype=torch.bfloat16)
    stated: LbllmConfig = model.config.quantization_config
    different = _differences(stated.format, config.quant)
    if different:
        raise ConfigError(f"start: {config.start} was made with {different}; a run keeps its checkpoint's format")
    kept = teacher.model.state_dict()
    for name, tensor in model.state_dict().items():
        # What stays dense must be the teacher's own; a packed layer's weight has another shape.
        if name in kept and tensor.is_floating_point() and not _stored_as(kept[name], tensor):
            made_from = stated.provenance.get("model", "another model")
            raise ConfigError(
                f"start: {config.start} was not made from {config.model} ({name} differs), but from {made_from}; "
                "choose that as the model"
            )
    path, _ = decoder_blocks(teacher.model)
    for block in model.get_submodule(path).children():
        tensors: dict[str, Tensor] = {}
        for name, layer in block.named_modules():
            if isinstance(layer, PackedLinear):
                tensors[f"{name}.index"], tensors[f"{name}.params"] = layer.unpack()
                if layer.quantizer is not None:
                    tensors[f"{name}.act"] = layer.quantizer.act.detach().clone()
        yield tensors


def _differences(found: QuantConfig, wanted: QuantConfig) -> str:
    """The settings of a format that are not the wanted ones, with their values."""
    values, others = found.model_dump(mode="json"), wanted.model_dump(mode="json")
    return ", ".join(f"quant.{key}={value}" for key, value in values.items() if value != others[key])


def _stored_as(tensor: Tensor, stored: Tensor) -> bool:
    return tensor.shape == stored.shape and torch.equal(tensor.bfloat16(), stored.bfloat16())


def settings_to_go_on(start: str) -> dict[str, Any]:
    """The settings document of a run that goes on from a checkpoint: stage 4 alone, its model, its format. Raises
    CheckpointError where it is none."""
    folder = checkpoint_folder(start)
    if not is_checkpoint(folder):
        raise CheckpointError(f"{folder} is no packed checkpoint; give the folder that `quantize --out` wrote")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    document = {"start": start, "stages": list(FROM_CHECKPOINT), "quant": stated["quant"]}
    model = stated.get("provenance", {}).get("model")
    return document if model is None else document | {"model": model}
