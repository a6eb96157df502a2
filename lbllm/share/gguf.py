"""Write a dense model as one GGUF file, as llama.cpp reads it: matrices in bfloat16, vectors in float32.

    write_gguf(model, tokenizer, Path("model.gguf"), name="My model", licence="Apache-2.0")

llama.cpp has code for each architecture, so only those are written whose answers were compared with those of
transformers; others are refused by name. Other tokenizers are refused, too: a GGUF file doesn't contain the rule that
splits a text before the merges, only the name of one of llama.cpp's rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lbllm.errors import ModelError

# transformers' model types by llama.cpp's architectures.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_OTHERWISE = "export the dense copy instead, and give that folder to llama.cpp's own convert_hf_to_gguf.py"
_SPLITS = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("llama-bpe", "qwen2", "tekken")}


def check_exportable(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError, with a way out, if the model of this transformers config can't be written as GGUF."""
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"GGUF of {kind} models is not written here, only of {', '.join(_ARCHITECTURES)}; {_OTHERWISE}"
        )
    rope = config.rope_parameters["rope_type"]
    faults: dict[str, Any] = {
        f"hidden_act {config.hidden_act!r} instead of 'silu'": config.hidden_act != "silu",
        f"a sliding window of {getattr(config, 'sliding_window', None)} tokens": getattr(
            config, "sliding_window", None
        ),
        f"rotary embeddings of type {rope!r}": rope not in (("default", "llama3") if kind == "llama" else ("default",)),
        "biases on its attention": kind == "qwen3" and config.attention_bias,
    }
    for what, there in faults.items():
        if there:
            raise ModelError(f"this {kind} model has {what}, which is not written as GGUF here; {_OTHERWISE}")
    _pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    name: str,
    licence: str | None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    q8_0: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model with bfloat16 weights and its tokenizer to ``file``.

    ``q8_0``: the blocks, uint8 (rows, bytes), of matrices that the file has in Q8_0 instead, by name.

    ``tensors``: the entries of its state dict, one after the other in its order, where ``model`` is only the structure,
    on the meta device; one of them at a time is then in memory. Raises ModelError if the model can't be written as
    GGUF, OSError if writing to disk fails.
    """
    config: Any = model.config
    check_exportable(config, tokenizer)
    arch = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    try:
        writer.add_name(name)
        if licence is not None:
            writer.add_license(licence)
        _add_settings(writer, config)
        _add_tokenizer(writer, tokenizer, rows=config.vocab_size)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        shapes, blocks = _shapes(model), q8_0 or {}
        for key, shape in shapes.items():
            renamed = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if renamed is None:
                raise ModelError(f"llama.cpp's {config.model_type} models have no tensor like {key}; {_OTHERWISE}")
            _add_info(writer, renamed, shape, blocks.get(key))
        factors = _frequency_factors(config)
        if factors is not None:
            _add_info(writer, "rope_freqs.weight", factors.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        left = list(shapes)
        for key, tensor in model.state_dict().items() if tensors is None else tensors:
            if left[:1] == [key]:  # the file has them in this order
                del left[0]
                values = _values(_as_in_llama_cpp(key, tensor.detach(), config))
                writer.write_tensor_data(blocks[key].detach().numpy() if key in blocks else values)
        if left:
            raise ValueError(f"{left[0]} is missing among the tensors, or has another place than in the model")
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    finally:
        writer.close()


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shapes of the model's tensors by name; a tied head is the same tensor as the embeddings, which llama.cpp
    knows."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _add_info(writer: gguf.GGUFWriter, name: str, shape: torch.Size, blocks: Tensor | None = None) -> None:
    if blocks is not None:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor_info(name, tuple(blocks.shape), np.dtype(np.uint8), blocks.nbytes, raw_dtype=kind)
        return
    if len(shape) == 1:  # llama.cpp adds and multiplies by vectors only in float32
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape.numel())
        return
    size, kind = 2 * shape.numel(), gguf.GGMLQuantizationType.BF16
    writer.add_tensor_info(name, (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8), size, raw_dtype=kind)


def _values(tensor: Tensor) -> NDArray[Any]:
    if tensor.ndim == 1:
        return tensor.float().numpy()
    values: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return values


def _as_in_llama_cpp(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor with its rows in llama.cpp's order."""
    if config.model_type == "llama" and ".q_proj." in name:
        return _interleaved(tensor, config.num_attention_heads)
    if config.model_type == "llama" and ".k_proj." in name:
        return _interleaved(tensor, config.num_key_value_heads)
    return tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads * d, ...) in llama.cpp's order: it rotates neighbouring values of a head, while
    transformers rotates value i with value i + d / 2."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _frequency_factors(config: Any) -> Tensor | None:
    """The divisor of each frequency of the rotary embedding (d / 2,), float32; None if they are not scaled."""
    if config.rope_parameters["rope_type"] == "default":
        return None
    used, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(used)).float() / len(used))
    return plain / used


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(document))
    tokens = [f"[PAD{number}]" for number in range(rows)]  # rows that no token uses
    types = [gguf.TokenType.UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        if number < rows:
            tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in document["added_tokens"]:
        if added["id"] < rows:
            types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in document["model"]["merges"]])
    for kind, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None and number < rows:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, of which llama.cpp uses the default one
        template = template.get("default")
    if template is not None:
        writer.add_chat_template(template)


def _pre_tokenizer(document: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits texts. Raises ModelError if it is not known here."""
    normalizer, model = document["normalizer"], document["model"]
    steps = document["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    bytes_only = model["type"] == "BPE" and kinds[-1:] == ["ByteLevel"] and not steps[-1]["add_prefix_space"]
    if bytes_only and (normalizer is None or normalizer["type"] == "NFC"):
        by_pattern = steps[-1]["use_regex"]
        if kinds == ["ByteLevel"] and by_pattern:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_pattern and steps[0]["individual_digits"]:
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex")
        isolated = kinds == ["Split", "ByteLevel"] and not by_pattern and steps[0]["behavior"] == "Isolated"
        if isolated and not steps[0]["invert"] and pattern in _SPLITS:
            return _SPLITS[pattern]
    made_of = ", ".join(filter(None, [model["type"], normalizer and normalizer["type"], *kinds]))
    raise ModelError(f"this model's tokenizer ({made_of}) is not written as GGUF here; {_OTHERWISE}")
