"""Whether a packed checkpoint was made from a teacher, seen from what binarization leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lbllm.checkpoints.seal import CORRUPT
from lbllm.errors import CheckpointError, ModelError
from lbllm.models.blocks import linear_layers
from lbllm.models.teacher import BlockTeacher
from lbllm.models.weights import StoredWeights
from lbllm.quant.embedding_code import is_rounding_of
from lbllm.quant.packed_embedding import tables
from lbllm.sections import EmbeddingBits

ROWS = 8  # of embeddings and output head that are compared
_ROUNDING = 2.0**-7  # relative: a checkpoint keeps dense parameters in bfloat16
_DIFFERING = 0.01  # share of a tensor's numbers


def stored_name(model: PreTrainedModel, name: str, tensor: Tensor, stored: StoredWeights) -> str:
    """The name in a checkpoint's files of a tensor of a model, or of the packed form of one of its layers. Some
    architectures have other names in files, and transformers knows them."""
    return name if name in stored.tensors else next(iter(revert_weight_conversion(model, {name: tensor})))


def check_origin(
    title: str,
    teacher: BlockTeacher,
    stored: StoredWeights,
    expected: dict[str, Tensor],
    names: dict[str, str],
    bits: EmbeddingBits,
) -> None:
    """Raise ModelError unless the checkpoint in the files ``stored`` can have been made from a teacher, CheckpointError
    if it has tensors of another type than its format.

    ``expected``: the packed tensors that it then has, by name; ``names``: their names in the files. Their shapes and
    types are compared, and the values of some parameters that are not binarized: norms, and a few rows of embeddings
    and output head, which have so many ``bits``.
    """
    for name, tensor in expected.items():
        found = stored.tensors.get(names[name])
        wanted = f"would have the shape {tuple(tensor.shape)}"
        if found is None:
            raise _other(title, teacher, f"{name} {wanted}, but there is no such tensor")
        if found.shape != tensor.shape:
            raise _other(title, teacher, f"{name} {wanted}, but has {found.shape}")
        if found.dtype != tensor.dtype and not name.endswith(".act"):
            raise CheckpointError(f"{title}: {name} is of type {found.dtype}, not {tensor.dtype}; {CORRUPT}")
    more = {name for name in stored.tensors if name.endswith(".params")} - set(names.values())
    if more:
        raise _other(title, teacher, f"the model has no layer for {min(more)}")
    packed = {f"{name}.weight" for name in tables(teacher.model.model)} if bits < 16 else set()
    for name, tensor in _dense(teacher):
        own = stored_name(teacher.model.model, name, tensor, stored)
        place = stored.tensors.get(own)
        if place is None:
            continue  # tied to another one
        rows = slice(0, len(tensor)) if place.shape else None
        if name in packed:
            scale = None if bits == 8 else stored.read(f"{own.removesuffix('weight')}column_scale").view(torch.float16)
            if not is_rounding_of(stored.read(own, rows), tensor, bits, None if scale is None else scale[:, 0]):
                raise _other(title, teacher, f"{name} differs")
            continue
        if place.shape[1:] != tensor.shape[1:] or _differ(stored.read(own, rows), tensor):
            raise _other(title, teacher, f"{name} differs")


def _dense(teacher: BlockTeacher) -> Iterator[tuple[str, Tensor]]:
    """Some parameters that stay dense, with their names in a checkpoint; the first rows of matrices."""
    model = teacher.model
    for name, parameter in model.model.named_parameters():
        if name in model.matrices:
            yield name, model.rows(name, slice(0, min(ROWS, parameter.shape[0])))
        elif not name.startswith(f"{model.path}."):
            yield name, parameter[:ROWS] if parameter.ndim > 1 else parameter
    block = model.block(0)
    linear = {id(parameter) for layer in linear_layers(block).values() for parameter in layer.parameters()}
    for name, parameter in block.named_parameters():
        if id(parameter) not in linear and parameter.ndim < 2:
            yield f"{model.path}.0.{name}", parameter


def _differ(stored: Tensor, own: Tensor) -> bool:
    """Whether more numbers differ than rounding explains."""
    if stored.shape != own.shape:
        return True
    close = torch.isclose(stored.float(), own.float(), rtol=_ROUNDING, atol=1e-6, equal_nan=True)
    return int((~close).count_nonzero()) > _DIFFERING * own.numel()


def _other(title: str, teacher: BlockTeacher, difference: str) -> ModelError:
    return ModelError(
        f"{title} was not made from {teacher.name}: {difference}; give the model that it was made from as its teacher"
    )
