"""Turn a GGUF file into a dense Hugging Face model folder, once; every later use reads the folder.

    <home>/models/<file name>-<first 16 digits of the file's sha256>/
        config.json, model.safetensors (float32), tokenizer.json, ...
        source.json       what the weights are: precision, licence, the file's name and sha256

The folder is written atomically. If several processes need it at once, one converts and the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig
from transformers.integrations.gguf.reader import read_gguf_metadata

from lbllm.errors import ModelError, ResourceError
from lbllm.extras import extra
from lbllm.files import locked, new_folder

# Vocabularies whose merges were learned with every digit on its own (llama.cpp gives these names the pattern \p{N}).
# transformers builds them without that split, which changes runs of spaces before a digit.
_DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_BAD_FILE = (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, struct.error)


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value part of a GGUF file; arrays of strings as their lengths. Raises ModelError, ResourceError."""
    with extra("gguf", f"GGUF file {file}"):
        import gguf  # noqa: F401 - transformers reads by it
    try:
        return read_gguf_metadata(str(file))[0]
    except _BAD_FILE as error:
        raise ModelError(f"{file} can't be read as a GGUF file: {error}") from None


def precision(metadata: dict[str, Any]) -> str:
    """The file's main weight type as a name, e.g. ``Q4_1``."""
    import gguf  # after read_metadata, which says where it is missing

    try:
        return gguf.LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return "GGUF of unstated type"


def sha256(file: Path) -> str:
    """Hex digest of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def converted_folder(file: Path, models: Path) -> Path:
    """The folder under ``models`` for the conversion of ``file``."""
    return models / f"{file.stem}-{sha256(file)[:16]}"


def gguf_model_config(file: Path) -> PretrainedConfig:
    """The transformers config that the metadata of a GGUF file describes. Raises ModelError."""
    read_metadata(file)
    try:
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except _BAD_FILE as error:
        raise ModelError(f"{file}: transformers can't make a model config of this GGUF file: {error}") from None


def convert(file: Path, models: Path) -> Path:
    """The dense folder made from ``file``; converts it if that has not been done. Raises ModelError, ResourceError.

    Weights are dequantized to float32, so the folder takes 4 bytes per parameter on disk.
    """
    folder = converted_folder(file, models)
    if folder.is_dir():
        return folder
    with locked(models / f".{folder.name}.lock"):
        if not folder.is_dir():
            with new_folder(folder) as unfinished:
                _write(file, unfinished, models)
    return folder


def _write(file: Path, folder: Path, models: Path) -> None:
    """Write the model into ``folder``; messages name ``models``, where it ends up."""
    metadata = read_metadata(file)
    config = gguf_model_config(file)
    with torch.device("meta"):
        needed = 4 * AutoModelForCausalLM.from_config(config).num_parameters() + 16 * 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"converting {file.name} needs {needed / 1e9:.2f} GB in {models}, {free / 1e9:.2f} GB are free; "
            "free some space or set LBLLM_HOME to a folder on another disk"
        )
    place = str(file.parent)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one of its progress bars has no other switch
            model = AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(place, config=config, gguf_file=file.name)
    except _BAD_FILE as error:
        raise ModelError(f"{file} can't be converted: {error}") from error
    if metadata.get("tokenizer.ggml.pre") in _DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        raise ResourceError(f"the converted model can't be written to {models}: {error}") from None
    source = {
        "file": file.name,
        "sha256": sha256(file),
        "precision": precision(metadata),
        "licence": metadata.get("general.license", "not stated in the file"),
    }
    (folder / "source.json").write_text(json.dumps(source, indent=1))
