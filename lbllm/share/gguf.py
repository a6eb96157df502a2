"""Write a dense model as one GGUF file, as llama.cpp reads it.

    write_gguf(model, tokenizer, Path("model.gguf"), name="My model", licence="Apache-2.0")

Vectors are float32. Matrices are bfloat16 or in one of the types of ``lbllm.share.gguf_types``. Models that llama.cpp
computes in another way are refused (``lbllm.share.gguf_models``), and so are tokenizers that it splits texts by in
another way (``lbllm.share.gguf_tokenizer``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.chat.generation import end_ids
from lbllm.errors import ModelError
from lbllm.share.gguf_models import (
    ARCHITECTURES,
    OTHERWISE,
    add_settings,
    as_in_llama_cpp,
    check_model,
    frequency_factors,
)
from lbllm.share.gguf_names import SHAPES, GgufType
from lbllm.share.gguf_tokenizer import add_tokenizer, check_tokenizer
from lbllm.share.gguf_types import Stored

_FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_k": gguf.LlamaFileType.MOSTLY_Q5_K_S,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S,
}


def check_exportable(config: Any, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
    """Raise ModelError, with a way out, if the model of this transformers config can't be written as GGUF. ``name``: of
    the model in the file, by which llama.cpp treats some tokens."""
    check_model(config)
    check_tokenizer(tokenizer, name)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    name: str,
    licence: str | None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    stored: Mapping[str, Stored] | None = None,
) -> None:
    """Write the model and its tokenizer to ``file``.

    ``stored``: its matrices that are not bfloat16 in the file, by name, see ``lbllm.share.gguf_types``.

    ``tensors``: the entries of its state dict, one after the other in its order, where ``model`` is only the structure,
    on the meta device; one of them at a time is then in memory. Raises ModelError if the model can't be written as
    GGUF, OSError if writing to disk fails.
    """
    config: Any = model.config
    check_model(config)
    arch, stored = ARCHITECTURES[config.model_type], stored or {}
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    try:
        writer.add_name(name)
        if licence is not None:
            writer.add_license(licence)
        writer.add_file_type(_FILE_TYPES[_smallest(stored)])
        add_settings(writer, config)
        add_tokenizer(writer, tokenizer, rows=config.vocab_size, ends=end_ids(model, tokenizer), name=name)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        # A tied head is the same parameter as the embeddings, which llama.cpp knows.
        left = {key: parameter.shape for key, parameter in model.named_parameters()}
        for key, shape in left.items():
            renamed = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if renamed is None:
                raise ModelError(f"llama.cpp's {config.model_type} models have no tensor like {key}; {OTHERWISE}")
            _add_info(writer, renamed, shape, stored[key].kind if key in stored else None)
        factors = frequency_factors(config)
        if factors is not None:
            _add_info(writer, "rope_freqs.weight", factors.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        waiting = list(left)
        for key, tensor in model.state_dict().items() if tensors is None else tensors:
            if waiting[:1] == [key]:  # the file has them in this order
                del waiting[0]
                given = stored[key].blocks() if key in stored else tensor.detach()
                writer.write_tensor_data(_values(as_in_llama_cpp(key, given, config)))
        if waiting:
            raise ValueError(f"{waiting[0]} is missing among the tensors, or has another place than in the model")
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    finally:
        writer.close()


def _smallest(stored: Mapping[str, Stored]) -> GgufType:
    """The smallest type in a file, after which it is called."""
    return min((one.kind for one in stored.values()), key=lambda kind: SHAPES[kind].bits, default="bf16")


def _add_info(writer: gguf.GGUFWriter, name: str, shape: torch.Size, kind: GgufType | None = None) -> None:
    """``kind``: the type of a matrix, None for bfloat16. Vectors are float32: only so llama.cpp computes with them."""
    if len(shape) == 1:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape.numel())
        return
    block, size = SHAPES[kind or "bf16"]
    data = torch.Size((*shape[:-1], shape[-1] // block * size))
    number = gguf.GGMLQuantizationType[(kind or "bf16").upper()]
    writer.add_tensor_info(name, data, np.dtype(np.uint8), data.numel(), raw_dtype=number)


def _values(tensor: Tensor) -> NDArray[Any]:
    """The data of a vector, of a matrix, or of the blocks uint8 (rows, bytes) of one."""
    if tensor.ndim == 1:
        return tensor.float().numpy()
    stored = tensor if tensor.dtype == torch.uint8 else tensor.bfloat16()
    values: NDArray[np.uint8] = stored.contiguous().view(torch.uint8).numpy()
    return values
