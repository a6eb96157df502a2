"""What llama.cpp knows of a model: its architecture, settings and the form of its tensors.

llama.cpp has code for each architecture, so only those are written whose logits were compared with those of
transformers; a model with a setting that this code does not have is refused.
"""

from __future__ import annotations

from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lbllm.errors import ModelError

# transformers' model types by llama.cpp's architectures.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
OTHERWISE = "export the dense copy instead, and give that folder to llama.cpp's own convert_hf_to_gguf.py"
_GEMMA = ("gemma2", "gemma3_text")
_INTERLEAVED = ("llama", "mistral")
# Of how many layers one attends to the whole text, and the number of layers with which llama.cpp takes another scale of
# attention than that of the head.
_PERIOD = {"gemma2": 2, "gemma3_text": 6}
_LARGEST = {"gemma2": 46, "gemma3_text": 62}


def check_model(config: Any) -> None:
    """Raise ModelError, with a way out, if the model of this transformers config can't be written as GGUF."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(f"GGUF of {kind} models is not written here, only of {', '.join(ARCHITECTURES)}; {OTHERWISE}")
    for what, there in (_gemma_faults(config) if kind in _GEMMA else _faults(config)).items():
        if there:
            raise ModelError(f"this {kind} model has {what}, which is not written as GGUF here; {OTHERWISE}")


def _faults(config: Any) -> dict[str, Any]:
    kind, rope = config.model_type, config.rope_parameters["rope_type"]
    window = getattr(config, "sliding_window", None)
    return {
        f"hidden_act {config.hidden_act!r} instead of 'silu'": config.hidden_act != "silu",
        f"a sliding window of {window} tokens": kind.startswith("qwen") and window,
        f"rotary embeddings of type {rope!r}": rope not in (("default", "llama3") if kind == "llama" else ("default",)),
        "biases on its attention": kind == "qwen3" and config.attention_bias,
    }


def _gemma_faults(config: Any) -> dict[str, Any]:
    kind, period = config.model_type, _PERIOD[config.model_type]
    sliding = [name == "sliding_attention" for name in config.layer_types]
    ropes = _gemma_ropes(config)
    types = [rope["rope_type"] for rope in ropes.values()]
    act = config.hidden_activation
    faults = {
        f"hidden_activation {act!r} instead of 'gelu_pytorch_tanh'": act != "gelu_pytorch_tanh",
        f"another order of sliding windows than one full layer of {period}": sliding
        != [(number + 1) % period != 0 for number in range(len(sliding))],
        f"rotary embeddings of types {', '.join(types)}": types[0] not in ("default", "linear")
        or types[1:] not in ([], ["default"])
        or (kind == "gemma2" and types != ["default"]),
        f"attention scaled by query_pre_attn_scalar {config.query_pre_attn_scalar}": config.query_pre_attn_scalar
        != _attention_scalar(config),
        "biases on its attention": config.attention_bias,
        "an output head of its own": not config.tie_word_embeddings,
        "attention in both directions": getattr(config, "use_bidirectional_attention", False),
    }
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if kind == "gemma2":
        return faults | {"no soft cap of its logits": not all(caps)}
    return faults | {
        "a soft cap of its logits": any(caps),
        f"a rotary base of {ropes['sliding_attention']['rope_theta']} in its sliding windows": ropes[
            "sliding_attention"
        ]["rope_theta"]
        != 10_000,
    }


def _gemma_ropes(config: Any) -> dict[str, dict[str, Any]]:
    """The rotary embeddings by kind of layer; Gemma 2 has the same in all."""
    given = config.rope_parameters
    if "rope_type" in given:
        return {"full_attention": given}
    return {kind: given[kind] for kind in ("full_attention", "sliding_attention")}


def _attention_scalar(config: Any) -> float:
    """The square of what llama.cpp divides attention by."""
    if config.num_hidden_layers == _LARGEST[config.model_type]:
        return float(config.hidden_size // config.num_attention_heads)
    return float(config.head_dim)


def context_length(config: Any) -> int:
    """The longest text in tokens. Of Mistral's and Phi 3's a sliding window of every layer: llama.cpp attends to the
    whole text, which is the same as long as the window holds it."""
    window = None if config.model_type in _GEMMA else getattr(config, "sliding_window", None)
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what llama.cpp must know to compute with the tensors."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type in _GEMMA:
        rope = _gemma_ropes(config)["full_attention"]
        writer.add_sliding_window(config.sliding_window)
        if config.model_type == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    else:
        rope = config.rope_parameters
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    writer.add_rope_freq_base(rope["rope_theta"])


def frequency_factors(config: Any) -> Tensor | None:
    """The divisor of each frequency of the rotary embedding (d / 2,), float32; None if they are not scaled."""
    if config.rope_parameters.get("rope_type", "default") in ("default", "linear"):
        return None
    used, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(used)).float() / len(used))
    return plain / used


def as_in_llama_cpp(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor as llama.cpp has it: with its rows in another order, or the weights of Gemma's norms, to which
    transformers adds one."""
    if config.model_type in _INTERLEAVED and ".q_proj." in name:
        return _interleaved(tensor, config.num_attention_heads)
    if config.model_type in _INTERLEAVED and ".k_proj." in name:
        return _interleaved(tensor, config.num_key_value_heads)
    if config.model_type in _GEMMA and tensor.ndim == 1:
        return tensor.float() + 1
    return tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads * d, ...) in llama.cpp's order: it rotates neighbouring values of a head, while
    transformers rotates value i with value i + d / 2."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
