"""Whether transformers reads all of a GGUF file: its reader leaves out tensors and settings that it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.reader import GgufHeader
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lbllm.errors import ModelError

_OTHERWISE = "use the model's safetensors files instead"
_FREQUENCIES = "rope_freqs.weight"
# Settings that change nothing of what the model computes: names, sizes that its tensors show, or for other programs.
_SHOWN = ("vocab_size", "tensor_data_layout", "attention.causal", "rope.scaling.original_context_length")
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def complete_config(config: PretrainedConfig, metadata: dict[str, Any], file: Path) -> None:
    """Put into a config what transformers does not read of a GGUF file, or raise ModelError, with the name of the
    setting or tensor, if that is not possible."""
    architecture = str(metadata["general.architecture"])
    if is_gguf_arch_supported(architecture):
        return  # transformers reads all settings of these
    config_any: Any = config
    tensors = {tensor.name: tensor for tensor in GgufHeader.from_file(str(file)).tensors}
    for setting, layer in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if hasattr(config, setting) and f"blk.0.{layer}.bias" in tensors:
            setattr(config, setting, True)
    _complete_rotation(config_any, tensors, file)
    mapping: Any = GGUF_CONFIG_MAPPING
    known = mapping.get(architecture) or mapping.get(str(config_any.model_type)) or {}
    for key, value in metadata.items():
        prefix, _, name = key.partition(".")
        if prefix == architecture and known.get(name) is None and not _is_kept(config_any, name, value):
            raise ModelError(f"{file.name}: its setting {key} = {value!r} is not supported here; {_OTHERWISE}")


def _is_kept(config: Any, name: str, value: Any) -> bool:
    """Whether a setting that transformers does not read says what the config says; a head's size is put into it."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name in ("attention.key_length", "attention.value_length"):
        if name == "attention.key_length" and hasattr(config, "head_dim"):
            config.head_dim = head = value
        return bool(value == head)
    if name == "rope.dimension_count":
        rotary = getattr(config, "rope_parameters", None) or {}
        share = rotary.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        return bool(value == int(head * share))
    if name in ("attention.sliding_window", "sliding_window"):
        if hasattr(config, "sliding_window") and not hasattr(config, "use_sliding_window"):
            config.sliding_window = value
            return True
        return bool(value >= config.max_position_embeddings)
    same = {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "use_parallel_residual": "use_parallel_residual",
        "feed_forward_length": "n_inner",
        "attention.head_count_kv": "num_attention_heads",
    }
    if name in same:
        stated = getattr(config, same[name], None)
        return bool(value == (4 * config.hidden_size if stated is None and name == "feed_forward_length" else stated))
    # 0, 1 or "none" is how a file says that it has no experts, no scaling and so on.
    return name in _SHOWN or value in (0, 1, 1.0, "none", "")


def _complete_rotation(config: Any, tensors: dict[str, Any], file: Path) -> None:
    """Set the scaling of the rotary embedding that a file states as a tensor: the divisor of each frequency (d / 2,),
    float32. Raises ModelError if it is not Llama 3's."""
    if _FREQUENCIES not in tensors:
        return
    header = GgufHeader.from_file(str(file))
    tensor = tensors[_FREQUENCIES]
    with file.open("rb") as stream:
        stream.seek(header.data_start + tensor.offset)
        factors = torch.frombuffer(bytearray(stream.read(tensor.nbytes)), dtype=torch.float32)
    plain: dict[str, Any] = dict(config.rope_parameters)
    for length in (8192, *(1 << power for power in range(5, 20))):
        scaled = _LLAMA_3 | {"original_max_position_embeddings": length, "factor": float(factors.max())}
        config.rope_parameters = plain | scaled | {"rope_type": "llama3"}
        used, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        unscaled = plain["rope_theta"] ** (-torch.arange(len(used)).float() / len(used))
        if used.shape == factors.shape and torch.allclose(unscaled / used, factors, rtol=1e-4):
            return
    raise ModelError(
        f"{file.name}: its rotary frequencies ({_FREQUENCIES}) are not scaled as Llama 3 scales them; {_OTHERWISE}"
    )


def check_tensors(file: Path, config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Raise ModelError, with the name, if ``model`` (shapes are enough) has no place for a tensor of the file."""
    header = GgufHeader.from_file(str(file))
    names = [tensor.name for tensor in header.tensors]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ModelError(f"{file.name} has the tensor {sorted(twice)[0]} twice; give another copy of the model")
    if is_gguf_arch_supported(header.architecture):
        return  # transformers' report of the loading names what is left over
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    known = {*get_gguf_hf_weights_map(model, processor), _FREQUENCIES, "output.weight"}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(
            f"{file.name}: {len(unknown)} of its {len(names)} tensors have no place in a {config.model_type} model, "
            f"e.g. {', '.join(unknown[:3])}; {_OTHERWISE}"
        )
