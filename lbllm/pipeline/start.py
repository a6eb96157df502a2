"""Where a run goes on from a packed checkpoint: that checkpoint's layers, in the form in which later stages train
them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from lbllm.checkpoints.find import find_checkpoint, teacher_of
from lbllm.checkpoints.hf import LbllmConfig, load
from lbllm.config import CONTINUATIONS, FROM_CHECKPOINT, RunConfig, setting_name
from lbllm.errors import CheckpointError, ConfigError, ModelError
from lbllm.json_input import decode_object, shortened, shown
from lbllm.models.experts import expert_count, read_parameters
from lbllm.models.streamed import BlockModel
from lbllm.models.weights import row_parts
from lbllm.quant.embedding_code import PackedRows, is_rounding_of
from lbllm.quant.levels import group_length
from lbllm.quant.packed_embedding import PackedTable, tables
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.packing import ParamGrid, fit_grid, stored_params
from lbllm.sections import ACT_GROUP_SIZE, KV_GROUP_SIZE, LayerFormat, QuantConfig
from lbllm.stages.block_state import grid_tensors
from lbllm.stages.block_store import BlockStore

# What every run from a checkpoint may change of the format. Stage 3 lowers the bits of activations that have 16.
FREE = {*CONTINUATIONS[FROM_CHECKPOINT]}
_LARGEST_CONFIG = 50_000_000  # bytes


def open_start(config: RunConfig, teacher: BlockModel) -> PreTrainedModel:
    """The packed model that ``config`` starts from. Raises CheckpointError, and ConfigError where its format is not one
    that the run can go on from, or it is not of this teacher."""
    assert config.start is not None
    model, _ = load(find_checkpoint(config.start).folder, dtype=torch.bfloat16)
    stated: LbllmConfig = model.config.quantization_config
    different = _differences(stated.format, config.precision("start"))
    if different:
        if "aar" in config.stages:
            way = "stage aar needs weights of this run's format, with 16-bit activations and KV cache"
        else:
            changed = ", ".join(setting_name(f"quant.{key}") for key in FREE)
            way = f"a run from a checkpoint can change only these settings of its format: {changed}"
        raise ConfigError(f"{setting_name('start')}: {config.start} was made with {different}; {way}")
    foreign = _first_difference(model, teacher)
    if foreign is not None:
        made_from = stated.provenance.get("model", "another model")
        raise ConfigError(
            f"{setting_name('start')}: {config.start} was not made from {config.model} ({foreign} differs), but "
            f"from {made_from}; choose that as the model"
        )
    return model


def start_tables(config: RunConfig, model: PreTrainedModel) -> dict[str, PackedRows]:
    """The embeddings and output head of the model that ``config`` starts from, by name, where their scales may have
    been trained and the run keeps their bits; what is tied counts once."""
    found: dict[int, tuple[str, PackedRows]] = {}
    for name, table in tables(model).items():
        if isinstance(table, PackedTable) and table.scale is not None and table.bits == config.quant.embedding_bits:
            found.setdefault(id(table.weight), (f"{name}.weight", PackedRows(table.weight.detach(), table.scale)))
    return dict(found.values())


def start_blocks(config: RunConfig, model: PreTrainedModel, path: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block's layers, as ``checkpoint.collect`` gives them, of the ``model`` that ``config`` starts
    from, with the latent weights that its run ended with where the checkpoint lies in that run's folder. Groups are cut
    into those of ``config``, and their parameters get its bits. Raises ConfigError for groups that can't be cut so.
    ``path``: where the blocks are in the model."""
    assert config.start is not None
    folder = find_checkpoint(config.start).folder
    for number, block in enumerate(model.get_submodule(path).children()):
        tensors = _latents(folder.parent, number, expert_count(block)) if config.e2e.lr_weight > 0 else {}
        for name, layer in block.named_modules():
            if isinstance(layer, PackedLinear):
                fmt = config.quant.layer(f"{path}.{number}.{name}")
                assert fmt is not None
                place = f"{setting_name('start')}: {config.start}: {path}.{number}.{name}"
                tensors[f"{name}.index"], tensors[f"{name}.params"], grid = _in_format(layer, fmt, place)
                tensors |= grid_tensors(name, grid)
                if layer.table is not None:
                    tensors[f"{name}.table"] = layer.table.float()
                if layer.quantizer is not None:
                    tensors[f"{name}.act"] = layer.quantizer.act.detach().clone()
        yield tensors


def _latents(run: Path, block: int, experts: int) -> dict[str, Tensor]:
    """A block's latent weights as stage 4 of the run in a folder left them, or else stage 1, if that is a run."""
    if (run / "blocks").is_dir():
        for stage in ("e2e", "ptq"):
            store = BlockStore(run, None)
            tensors = store.whole(stage, block, experts) if store.has(stage, block) else {}
            latents = {name: tensor for name, tensor in tensors.items() if name.endswith(".latent")}
            if latents:
                return latents
    return {}


def _in_format(layer: PackedLinear, fmt: LayerFormat, place: str) -> tuple[Tensor, Tensor, ParamGrid | None]:
    """A packed layer's level indices (out, in), its group parameters (out, n, K) for groups that divide its own and
    have their levels, and with 4-bit parameters their grid. Raises ConfigError for others, naming the ``place``."""
    index, params = layer.unpack()
    length = group_length(fmt.group_size, layer.in_features)
    if layer.length % length:
        smaller = [size for size in range(1, layer.length) if layer.length % size == 0]
        raise ConfigError(
            f"{place} has groups of {layer.length}, which can't be cut into groups of {length}; choose for "
            f"{setting_name('quant.group_size')} {layer.length}, or a divisor of it"
            f"{f', for example {smaller[-1]}' if smaller else ''}"
        )
    params = params.repeat_interleave(layer.length // length, 1)[:, : -(-layer.in_features // length)]
    grid = (layer.grid or fit_grid(params)) if fmt.param_bits == 4 else None
    return index, stored_params(params, fmt.param_bits, grid), grid


def _differences(found: QuantConfig, wanted: QuantConfig) -> str:
    """The settings of a format that are not the wanted ones, with their values; groups may be others."""
    values, others = _fixed(found), _fixed(wanted)
    return ", ".join(f"{setting_name(f'quant.{key}')} {value}" for key, value in values.items() if value != others[key])


def _fixed(quant: QuantConfig) -> dict[str, Any]:
    """The settings of a format that no run from a checkpoint changes."""
    if quant.weights_alone:  # then nothing reads the settings of activations
        quant = quant.weights_only()
    document = quant.model_dump(mode="json", exclude=FREE)
    overrides = {name: o.model_dump(exclude=FREE, exclude_none=True) for name, o in quant.overrides.items()}
    return document | {"overrides": {name: kept for name, kept in overrides.items() if kept}}


def _first_difference(packed: PreTrainedModel, teacher: BlockModel) -> str | None:
    """The name of a tensor that stays dense in a packed model and isn't the teacher's own; None if all are."""
    stored = packed.state_dict()
    rows = {f"{name}.weight": table for name, table in tables(packed).items() if isinstance(table, PackedTable)}

    def differs(name: str, tensor: Tensor, part: slice = slice(None)) -> bool:
        if name in rows:
            return not is_rounding_of(rows[name].weight[part], tensor, rows[name].bits, rows[name].scale)
        # A packed layer's weight has another shape.
        return name in stored and stored[name].is_floating_point() and not _stored_as(tensor, stored[name][part])

    inside = f"{teacher.path}."
    for name, tensor in teacher.model.state_dict().items():
        if name in teacher.matrices:
            if any(differs(name, teacher.rows(name, part), part) for part in row_parts(teacher.matrices[name])):
                return name
        elif not name.startswith(inside) and differs(name, tensor):
            return name
    for number in range(len(teacher.blocks)):
        block = teacher.block(number)
        for name, tensor in (*read_parameters(block), *block.named_buffers()):
            if differs(f"{inside}{number}.{name}", tensor):
                return f"{inside}{number}.{name}"
    return None


def _stored_as(tensor: Tensor, stored: Tensor) -> bool:
    return tensor.shape == stored.shape and torch.equal(tensor.bfloat16().to(stored.device), stored.bfloat16())


def settings_to_go_on(start: str) -> dict[str, Any]:
    """The settings document of a run that continues from a checkpoint: stage 4 alone, its model, its format.

    ``start``: any name that ``find_checkpoint`` takes. Raises CheckpointError, ModelError, RunError.
    """
    checkpoint = find_checkpoint(start)
    found = _stated(checkpoint.stated / "config.json")
    quant = found.model_dump(mode="json")  # with what it doesn't state: it is no preset's
    if found.weights_alone:  # how activations are quantized is open still
        quant |= {"act_group_size": ACT_GROUP_SIZE, "kv_group_size": KV_GROUP_SIZE}
    document = {"start": checkpoint.name, "stages": list(FROM_CHECKPOINT), "quant": quant}
    try:
        return document | {"model": teacher_of(checkpoint)}
    except ModelError:  # the user has to name it
        return document


def _stated(path: Path) -> QuantConfig:
    """The format that a checkpoint's config.json states. Raises CheckpointError, also for an origin that can't be
    read."""
    try:
        stated = decode_object(path.read_bytes(), largest=_LARGEST_CONFIG, deepest=20)["quantization_config"]
        model = (stated.get("provenance") or {}).get("model")
        if model is not None and not isinstance(model, str):
            raise TypeError(f"its model is {shown(model)}")
        return QuantConfig.model_validate(stated["quant"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(shortened(str(part)) for part in first['loc'])}: {first['msg']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shortened(str(error))
    raise CheckpointError(
        f"{path}: its quantization_config can't be read ({reason}); copy the checkpoint again, or install the lbllm "
        "that wrote it"
    )
