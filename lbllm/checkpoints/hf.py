"""LBLLM checkpoints in transformers: a registered quantizer, so that from_pretrained and save_pretrained just work.

A checkpoint is a usual folder: config.json with a ``quantization_config``, model.safetensors or several such files with
an index (weights.py), tokenizer. Importing ``lbllm`` registers the method. Without it transformers would only warn of
an unknown method and load wrong weights, so two things stop it: the packed tensors carry the name ``weight`` with a
shape that no dense layer has, and config.json names a weights file that does not exist and whose name says what to do.
If lbllm is registered, it removes that name before transformers looks for files.

config.json also holds a hash of the format, and the seal of all files that decide the output (seal.py). ``load`` and
transformers' own from_pretrained refuse files that were not saved together.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lbllm import memory
from lbllm.checkpoints.decode import computing_dtype, speed_up
from lbllm.checkpoints.seal import (
    CORRUPT,
    add_seal,
    already_checked,
    check_folder,
    check_loaded,
    format_sha256,
    other_format,
    seal_tokenizer,
)
from lbllm.checkpoints.weights import LARGEST, remove_old, save_parts
from lbllm.errors import CheckpointError, ConfigError
from lbllm.files import write_file
from lbllm.json_input import shortened
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight, share_copy
from lbllm.models.experts import split_experts
from lbllm.models.loading import INDEX, FileFault, load_model, quiet, settle_tied_weights
from lbllm.quant.kv_attention import attend_in_groups
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.model_cache import KeepBits, kv_maker, leave_no_cache
from lbllm.quant.packed_embedding import leave_file, replace_tables
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import QuantConfig

METHOD = "lbllm"
VERSION = 1
# Whether a checkpoint that is being loaded quantizes activations and KV cache as it states.
_activations: ContextVar[bool] = ContextVar("activations", default=True)
GUARD = "PACKED BY LBLLM: install lbllm and run `import lbllm` before from_pretrained"


@register_quantization_config(METHOD)
class LbllmConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json: the method, the layout's version, the format, and the hashes of format
    and tensors."""

    def __init__(self, version: int = VERSION, quant: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.quant = quant or {}
        self.format_sha256 = format_sha256(self.quant)
        self.tensors_sha256: str | None = kwargs.get("tensors_sha256")
        self.bpw: float | None = kwargs.get("bpw")
        self.provenance: dict[str, Any] = kwargs.get("provenance") or {}
        if version != VERSION:
            raise CheckpointError(_other_version("this checkpoint", version))
        # With other bits or groups the same tensors would silently compute something else.
        if kwargs.get("format_sha256") not in (None, self.format_sha256):
            raise CheckpointError(other_format("this checkpoint's config.json"))

    @property
    def format(self) -> QuantConfig:
        """The format of the weights, activations and KV cache."""
        return QuantConfig.model_validate(self.quant)


@register_quantizer(METHOD)
class LbllmQuantizer(HfQuantizer):
    """Replaces dense layers by packed ones before weights are loaded, and gives the model the packed KV cache."""

    requires_calibration = True
    quantization_config: LbllmConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before files are looked for: remove the guard against loading without lbllm."""
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_loaded(kwargs.get("checkpoint_files") or ())
        quant = self.quantization_config.format
        attach_kv_cache(model, KVFormat.of(quant if _activations.get() else quant.weights_only()))
        split_experts(model)
        with torch.device("meta"):
            replace_layers(model, self.quantization_config.format)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Called before weights are loaded: the packed layers of experts are in the files one by one, so what would
        join them is left out."""
        names = [*model.state_dict()]
        joins = [entry for entry in weight_conversions if isinstance(entry, WeightConverter)]
        unused = [entry for entry in joins if not any(t in name for t in entry.target_patterns for name in names)]
        return [entry for entry in weight_conversions if not any(entry is other for other in unused)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers would not write the guard and the new hash, and has no hook after its writing.
        model.save_pretrained = partial(save_packed, model)  # type: ignore[method-assign]
        settle_tied_weights(model)
        alone = not _activations.get()
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.check(name)
                if alone:
                    module.quantizer = None
        if alone:
            stated = self.quantization_config
            weights = stated.format.weights_only().model_dump(mode="json")
            left = LbllmConfig(quant=weights, bpw=stated.bpw, provenance=stated.provenance)
            self.quantization_config = model.config.quantization_config = left
        leave_file(model)
        speed_up(model)
        return model

    def is_serializable(self) -> bool:
        """The loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it: gradients pass through packed layers. Their own weights have none."""
        return True


def replace_layers(model: PreTrainedModel, quant: QuantConfig) -> None:
    """Replace every linear layer of the decoder blocks that ``quant`` binarizes by an empty packed one, and embeddings
    and output head, if it packs them, too."""
    path, blocks = decoder_blocks(model)
    for number, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            fmt = quant.layer(f"{path}.{number}.{name}")
            if fmt is None:
                continue
            weight = linear_weight(layer)
            packed = PackedLinear(
                weight.shape[1],
                weight.shape[0],
                fmt,
                bias=layer.bias is not None,
                tail=quant.tail_steps,
                dtype=weight.dtype,
            )
            block.set_submodule(name, packed)
    replace_tables(model, quant)


def attach_kv_cache(model: PreTrainedModel, kv: KVFormat, *, training: bool = False) -> None:
    """Make the model keep its KV cache in this format, no matter who creates the cache: generate(), a caller, or a
    plain forward call of the model or of its decoder without the head. Call it before the layers are replaced.

    ``training``: the cache keeps nothing, and its rounding has gradients. A model without a KV cache stays as it is.
    Raises ConfigError for a cache or an attention that can't keep the format.
    """
    decoder = _cache_holder(model) if kv.bits < 16 else None
    if decoder is not None:
        keep_bits(model, decoder, kv, training=training)


def keep_bits(model: PreTrainedModel, decoder: nn.Module, kv: KVFormat, *, training: bool = False) -> None:
    """``attach_kv_cache`` for the module of a model that every pass with a cache goes through; ``kv`` has less than 16
    bits."""
    if kv.in_groups:
        attend_in_groups(model)
    names = list(inspect.signature(decoder.forward).parameters)
    hook = KeepBits(kv_maker(kv, training=training), names, model.config)
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
    decoder.register_forward_hook(leave_no_cache, with_kwargs=True)


def _cache_holder(model: nn.Module) -> nn.Module | None:
    """The innermost module around the decoder blocks that takes a KV cache: every pass with a cache goes through it.
    None if the model has no KV cache."""
    path, _ = decoder_blocks(model)
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return module
    return None


def _other_version(place: str, version: object) -> str:
    return (
        f"{place} has layout version {version!r}; this program reads version {VERSION}. Install the lbllm that wrote "
        "it, or make the checkpoint again"
    )


def save_packed(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    """``model.save_pretrained(folder)`` of a packed model, with the seal and the guard in config.json. The seal covers
    what lies in the folder then, also a tokenizer that was saved before.

    Every model that is loaded with its quantizer saves itself this way. With an adapter by ``add_adapter`` it saves the
    adapter alone, as other models of transformers do.
    """
    if options.pop("push_to_hub", False):
        raise ConfigError("a packed model is pushed by model.push_to_hub(name), which finishes the files first")
    if options.pop("variant", None) is not None:
        raise ConfigError("a packed model has no variants: its parameters keep their precision; leave out variant")
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(model, folder, **options)
        return
    folder, writes = Path(folder), options.get("is_main_process", True)
    if writes:
        (folder / INDEX).unlink(missing_ok=True)  # of an earlier save
    with quiet():
        type(model).save_pretrained(model, folder, **options)
    if writes:
        remove_old(folder)
        _seal(folder, computing_dtype(model))


def save_packed_parts(
    model: PreTrainedModel, tensors: Iterator[tuple[str, Tensor]], folder: Path, *, largest: int = LARGEST
) -> None:
    """Write the folder that ``save_packed`` writes, from packed tensors that come one after the other: in memory are
    those of one file, of at most ``largest`` bytes, and of one block.

    ``model``: the structure, dense or already packed, whose config has the ``quantization_config``; its parameters may
    be on the meta device, but must be shared where weights are tied. ``tensors``: all entries of the packed model's
    state dict in the order of the model. Raises ValueError for a tensor that the packed model does not have and for a
    missing one, OSError, SafetensorError.
    """
    structure: PreTrainedModel = share_copy(model)
    if not any(isinstance(module, PackedLinear) for module in structure.modules()):
        with torch.device("meta"):
            replace_layers(structure, structure.config.quantization_config.format)
    _seal(folder, save_parts(structure, tensors, folder, largest=largest))


def _seal(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["dtype"] = str(dtype).removeprefix("torch.")
    document["transformers_weights"] = GUARD
    add_seal(document, folder)
    write_file(path, (json.dumps(document, indent=2) + "\n").encode())


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, *args: Any, **options: Any) -> Any:
    """``tokenizer.save_pretrained(folder)``; where a checkpoint lies there, its seal is brought up to date."""
    files = type(tokenizer).save_pretrained(tokenizer, str(folder), *args, **options)
    seal_tokenizer(Path(folder))
    return files


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder's config.json says that LBLLM packed it."""
    try:
        document = json.loads((Path(folder) / "config.json").read_text())
        return bool(document.get("quantization_config", {}).get("quant_method") == METHOD)
    except (OSError, ValueError, AttributeError):
        return False


def load(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, activations: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a packed checkpoint folder and its tokenizer; fails closed.

    Without ``activations`` the inputs of its layers and its KV cache are left alone, in 16 bits, whatever bits it
    states for them.

    Raises CheckpointError if the folder is not an LBLLM checkpoint, has another version, or if any tensor is
    missing or has another shape, or if a file that decides the output differs from what was saved.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    token = _activations.set(activations)
    try:
        with already_checked(folder):
            model = load_model(folder, guard=GUARD, dtype=dtype)
    except CheckpointError:
        raise
    except FileFault as fault:
        raise CheckpointError(f"{folder}: {shortened(str(fault))}; {CORRUPT}") from None
    except Exception as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{folder}: can't be loaded ({reason}); {CORRUPT}") from error
    finally:
        _activations.reset(token)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = shortened(str(error).partition("\n")[0])
        raise CheckpointError(
            f"{folder}: its tokenizer can't be loaded ({reason}); put the teacher's there by tokenizer.save_pretrained"
        ) from error
    tokenizer.save_pretrained = partial(_save_tokenizer, tokenizer)  # type: ignore[method-assign]
    placed: Any = model  # its own method is typed for no arguments
    placed = placed.to(device).eval()
    memory.trim()
    return placed, tokenizer


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless config.json has our method and version and its hashes match the folder; reads each
    file once."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{config} does not exist; give the folder of a packed checkpoint")
    try:
        json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} can't be read ({error}); {CORRUPT}") from error
    if not is_checkpoint(folder):
        raise CheckpointError(
            f"{folder} was not packed by LBLLM (quant_method in its config.json is not {METHOD!r}); give the folder of "
            "a packed checkpoint"
        )
    document = json.loads(config.read_text())
    stated = document["quantization_config"]
    # transformers would read another file than the one whose hash is checked.
    if document.get("transformers_weights", GUARD) != GUARD:
        raise CheckpointError(f"{config} names another weights file than the one that was saved; {CORRUPT}")
    if stated.get("version") != VERSION:
        raise CheckpointError(_other_version(str(config), stated.get("version")))
    if stated.get("format_sha256") != format_sha256(stated.get("quant", {})):
        raise CheckpointError(other_format(str(config)))
    check_folder(folder)
    _refuse_paths(folder)


def _refuse_paths(folder: Path) -> None:
    """Raise CheckpointError if the tokenizer's settings name a file: transformers would open some of them."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return  # loading the tokenizer says what is wrong
    for key, value in document.items() if isinstance(document, dict) else ():
        names = value if isinstance(value, list) else [value]
        if key.endswith(("_file", "_files")) or key in ("vocab", "merges"):
            for name in names:
                if isinstance(name, str) and ("/" in name or "\\" in name or key in ("vocab", "merges", "gguf_file")):
                    raise CheckpointError(f"{path}: {key} names the file {name!r}; no path in a checkpoint is followed")
