"""Teachers: the dense models to binarize, loaded from the catalogue, the hub, a folder or a GGUF file.

    load_teacher("smollm2-135m-instruct")          catalogue; this one is the embedded copy and needs no download
    load_teacher("Qwen/Qwen3-0.6B")                hub
    load_teacher("models/my-llama")                folder as written by save_pretrained
    load_teacher("models/tiny.Q8_0.gguf")          GGUF file, converted once into home()/models

Weights are read only from safetensors files, and code from model repositories never runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lbllm.errors import ModelError
from lbllm.models.blocks import check_supported, decoder_blocks, linear_layers, linear_weight, outer_layers
from lbllm.models.catalogue import EMBEDDED_PRECISION
from lbllm.models.experts import expert_count, split_experts
from lbllm.models.gguf import converted_folder, gguf_model_config, read_metadata
from lbllm.models.gguf import precision as gguf_precision
from lbllm.models.loading import FileFault, load_model, quiet, read_config
from lbllm.models.opened import ConvertedWeights, open_blocks
from lbllm.models.sizes import check_sizes
from lbllm.models.source import GATED, ModelSource, dense_place, resolve
from lbllm.models.stored import untie_stored_head
from lbllm.models.streamed import BlockModel
from lbllm.models.tokens import check_tokenizer, embedding_rows
from lbllm.places import home

_COPY = "its files are damaged, give another copy of the model"


@dataclass
class Teacher:
    """A dense model in eval mode without gradients. ``precision``: the format in which its weights were stored."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: str
    licence: str


@dataclass(frozen=True)
class ModelSummary:
    """The parts of a model. All counts are in parameters; ``kept`` maps each dense part's name to its count.

    ``experts``: the most that a block has, 0 without a mixture; ``expert_weights``: of all experts.
    """

    name: str
    architecture: str
    parameters: int
    blocks: int
    layers: int
    binarized: int
    kept: dict[str, int]
    context_length: int | None
    chat_template: bool
    licence: str
    experts: int = 0
    expert_weights: int = 0


def load_teacher(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Teacher:
    """Load the model ``name``, with its weights in ``dtype`` on ``device``, and its tokenizer.

    Raises ModelError, and ResourceError if the disk has too little space to convert a GGUF file.
    """
    source, place, offline, config = _found(name)
    placement: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
    with _load_errors(name):
        model = load_model(place, offline=offline, config=config, dtype=dtype, **placement)
    split_experts(model)
    tokenizer = _tokenizer(name, place, offline)
    check_tokenizer(name, tokenizer, embedding_rows(model))
    return Teacher(
        name=name,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        precision=_precision(source, place, config),
        licence=_licence(source, place),
    )


@dataclass
class BlockTeacher:
    """A dense model that is computed one block at a time. ``precision`` and ``licence`` as in ``Teacher``; ``whole``
    loads it into memory, for what needs all of it."""

    name: str
    model: BlockModel
    tokenizer: PreTrainedTokenizerBase
    precision: str
    licence: str
    whole: Callable[[], PreTrainedModel]

    @classmethod
    def of(cls, teacher: Teacher, device: torch.device) -> BlockTeacher:
        """Return a teacher in memory as one that is computed block by block, on a device."""
        model = teacher.model.to(device)  # type: ignore[arg-type]
        return cls(
            teacher.name, BlockModel.of(model), teacher.tokenizer, teacher.precision, teacher.licence, lambda: model
        )


def stream_teacher(name: str, device: torch.device) -> BlockTeacher:
    """Open the model ``name`` to compute it one block at a time on ``device``; its weights become float32.

    A model whose weights transformers converts when it reads them is loaded as a whole. Raises ModelError, and
    ResourceError if the disk has too little space to convert a GGUF file.
    """
    source, place, offline, config = _found(name)
    try:
        with _load_errors(name):
            model = open_blocks(place, offline, config, device)
    except ConvertedWeights:
        return BlockTeacher.of(load_teacher(name), device)
    tokenizer = _tokenizer(name, place, offline)
    check_tokenizer(name, tokenizer, embedding_rows(model.model))
    return BlockTeacher(
        name=name,
        model=model,
        tokenizer=tokenizer,
        precision=_precision(source, place, config),
        licence=_licence(source, place),
        whole=lambda: load_teacher(name, device=str(device)).model,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model ``name``. Raises ModelError."""
    place, offline = dense_place(resolve(name))
    return _tokenizer(name, place, offline)


def skeleton(name: str) -> PreTrainedModel:
    """Build the model ``name`` from its config on the meta device: shapes without weights. Raises ModelError.

    ``config.dtype`` is the dtype of the stored weights.
    """
    source = resolve(name)
    folder: Path | None = None
    if source.kind in ("embedded", "gguf"):
        file = Path(source.place)
        folder = converted_folder(file, home() / "models")
        config = _checked_config(name, str(folder), True) if folder.is_dir() else gguf_model_config(file)
    else:
        place, offline = dense_place(source)
        config = _checked_config(name, place, offline)
        folder = Path(place) if source.kind == "folder" else None
    stored = config.dtype
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever a foreign config makes transformers do
        raise _load_error(name, error) from error
    if folder is not None:
        untie_stored_head(model, folder)
    split_experts(model)
    model.config.dtype = stored  # from_config sets it to float32
    return model.eval()


def summary(name: str) -> ModelSummary:
    """Return the summary of the model ``name``, from its config and tokenizer only. Raises ModelError."""
    source = resolve(name)
    model = skeleton(name)
    if source.kind in ("embedded", "gguf"):
        metadata = read_metadata(Path(source.place))
        templated = "tokenizer.chat_template" in metadata
        licence = source.entry.licence if source.entry else str(metadata.get("general.license", "not stated"))
    else:
        templated = load_tokenizer(name).chat_template is not None
        licence = _licence(source, source.place)
    return summarize(model, name=name, chat_template=templated, licence=licence)


def summarize(model: PreTrainedModel, *, name: str, chat_template: bool, licence: str) -> ModelSummary:
    """Count a model's parts: the linear layers of its decoder blocks are binarized, all else is kept dense."""
    check_supported(model)
    _, blocks = decoder_blocks(model)
    layers = [layer for block in blocks for layer in linear_layers(block).values()]
    counted = {id(layer.weight) for layer in layers}
    binarized = sum(linear_weight(layer).numel() for layer in layers)
    outer = sum(linear_weight(layer).numel() for block in blocks for layer in outer_layers(block).values())
    kept = {"embeddings": 0, "output head": 0, "norms, biases and other": 0}
    head = model.get_output_embeddings()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            matrix = parameter.ndim > 1
            part = (
                "embeddings" if isinstance(module, nn.Embedding) else "output head" if matrix and module is head else ""
            )
            kept[part or "norms, biases and other"] += parameter.numel()
    return ModelSummary(
        name=name,
        architecture=type(model).__name__,
        parameters=binarized + sum(kept.values()),
        blocks=len(blocks),
        layers=len(layers),
        binarized=binarized,
        kept={part: count for part, count in kept.items() if count},
        context_length=getattr(model.config, "max_position_embeddings", None),
        chat_template=chat_template,
        licence=licence,
        experts=max(map(expert_count, blocks)),
        expert_weights=binarized - outer,
    )


def _checked_config(name: str, place: str, offline: bool) -> PretrainedConfig:
    """Return the model's config. Raises ModelError if the model can't be a teacher."""
    if offline and Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise ModelError(f"folder {place} has no config.json; give a model folder written by save_pretrained")
    try:
        check_sizes(read_config(place, offline))
        with quiet():
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=offline)
    except FileFault as fault:
        raise ModelError(f"{name} can't be loaded: {fault}; {_COPY}") from None
    except Exception as error:  # whatever a foreign config makes transformers do
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} needs custom code, which never runs here; "
                "give a model with an architecture of the transformers library"
            ) from None
        raise _load_error(name, error) from error
    quantized: Any = getattr(config, "quantization_config", None)
    if quantized is not None:
        stated = quantized if isinstance(quantized, dict) else vars(quantized)
        method = stated.get("quant_method", "?")
        raise ModelError(f"{name} is already quantized ({method}); give the dense model it was made from")
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} is of type {config.model_type}, which is not a decoder-only language model")
    return config


def _found(name: str) -> tuple[ModelSource, str, bool, PretrainedConfig]:
    """Where a teacher's name leads, the folder or hub id of its files, whether to stay offline, and its config."""
    source = resolve(name)
    place, offline = dense_place(source)
    config = _checked_config(name, place, offline)
    if source.kind == "folder":
        _check_weights(Path(place))
    return source, place, offline, config


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Raise ModelError for what goes wrong while weights are loaded; ConvertedWeights passes."""
    try:
        yield
    except ConvertedWeights:
        raise
    except FileFault as fault:
        raise ModelError(f"{name}: {fault}; {_COPY}") from None
    except Exception as error:  # whatever a foreign config or file makes the libraries do
        raise _load_error(name, error) from error


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"folder {folder} contains only pickled weights ({pickled[0]}), and loading those can run code. "
            "If you trust the file, convert it: from_pretrained and then save_pretrained writes safetensors"
        )
    raise ModelError(f"folder {folder} contains no weights: it has no *.safetensors file")


def _tokenizer(name: str, place: str, offline: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=offline)
    except Exception as error:  # the tokenizer libraries raise a plain Exception for a bad tokenizer.json
        raise ModelError(f"{name}: its tokenizer can't be loaded: {_first_line(error)}") from error
    if not len(tokenizer):
        raise ModelError(f"{name} has no tokenizer files (tokenizer.json and tokenizer_config.json) beside its weights")
    return tokenizer


def _load_error(name: str, error: Exception) -> ModelError:
    """Return an error of transformers or safetensors as a ModelError with one sentence for the user."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return ModelError(GATED.format(name))
        cause = cause.__cause__ or cause.__context__
    return ModelError(f"{name} can't be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _precision(source: ModelSource, place: str, config: PretrainedConfig) -> str:
    if source.kind == "embedded":
        return EMBEDDED_PRECISION
    if source.kind == "gguf":
        return f"dequantized {gguf_precision(read_metadata(Path(source.place)))} ({Path(source.place).name})"
    return str(config.dtype).removeprefix("torch.") if config.dtype else "float32"


def _licence(source: ModelSource, place: str) -> str:
    if source.entry is not None:
        return source.entry.licence
    if source.kind == "hub":
        return f"see https://huggingface.co/{source.place}"
    stated = Path(place) / "source.json"
    if stated.is_file():
        try:
            return str(json.loads(stated.read_text())["licence"])
        except (OSError, ValueError, KeyError, TypeError):
            return "not stated in the folder"
    card = Path(place) / "README.md"
    match = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE) if card.is_file() else None
    return match.group(1) if match else "not stated in the folder"
