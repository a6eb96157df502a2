"""Turn a GGUF file into a dense Hugging Face model folder, once; every later use reads the folder.

    <home>/models/<file name>-<first 16 digits of the file's sha256>-<version of the conversion>/
        config.json, model.safetensors (float32), tokenizer.json, ...
        source.json       what the weights are: precision, licence, the GGUF file's name and sha256; each file's sha256

A model that was split into several files is read whole. Every tensor and setting of the file must be used, and every
weight of the model must be in it. The folder is written atomically; one that was changed is made anew. If several
processes need it at once, one converts and the others wait.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.reader import read_gguf_metadata

from lbllm.errors import ModelError, ResourceError
from lbllm.extras import extra
from lbllm.files import file_sha256, locked, new_folder
from lbllm.models.gguf_parts import all_parts, check_whole, join, model_name
from lbllm.models.loading import FileFault, check_report, quiet, settle_tied_weights
from lbllm.models.sizes import check_sizes

# Part of the folder's name: a folder that an earlier conversion made is not used. 2: all of the file must be used.
CONVERSION = 2
SOURCE = "source.json"

# Vocabularies whose merges were learned with every digit on its own (llama.cpp gives these names the pattern \p{N}).
# transformers builds them without that split, which changes runs of spaces before a digit.
_DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_BAD_FILE = (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, struct.error)


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value part of a GGUF file; arrays of strings as their lengths. Raises ModelError, ResourceError."""
    with extra("gguf", f"GGUF file {file}"):
        import gguf  # noqa: F401 - transformers reads by it
    first = all_parts(file)[0]
    try:
        metadata: dict[str, Any] = read_gguf_metadata(str(first))[0]
        check_sizes(metadata, first.name)
    except _BAD_FILE as error:
        raise ModelError(f"{first} can't be read as a GGUF file: {error}") from None
    check_whole(file, metadata)
    return metadata


def precision(metadata: dict[str, Any]) -> str:
    """The file's main weight type as a name, e.g. ``Q4_1``."""
    import gguf  # after read_metadata, which says where it is missing

    try:
        return gguf.LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return "GGUF of unstated type"


def sha256(file: Path) -> str:
    """Hex digest of a whole file; of all parts in order if it is a part of a model."""
    digest = hashlib.sha256()
    for part in all_parts(file):
        with part.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def converted_folder(file: Path, models: Path) -> Path:
    """The folder under ``models`` for the conversion of ``file``."""
    return models / f"{model_name(file)}-{sha256(file)[:16]}-{CONVERSION}"


def gguf_model_config(file: Path) -> PretrainedConfig:
    """The transformers config that the metadata of a GGUF file describes. Raises ModelError."""
    metadata = read_metadata(file)
    first = all_parts(file)[0]
    with _alone(first) as place:
        return _model_config(place, metadata)


def _model_config(file: Path, metadata: dict[str, Any]) -> PretrainedConfig:
    from lbllm.models.gguf_check import complete_config  # reads by an extra

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(file.parent), gguf_file=file.name, trust_remote_code=False
        )
        complete_config(config, metadata, file)
        return config
    except ModelError:
        raise
    except Exception as error:  # whatever foreign metadata makes transformers do
        raise ModelError(f"{file.name}: transformers can't make a model config of this GGUF file: {error}") from None


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers also reads a tokenizer or settings that lie beside it."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / file.name
        link.symlink_to(file.resolve())
        yield link


def convert(file: Path, models: Path) -> Path:
    """The dense folder made from ``file``; converts it if that has not been done. Raises ModelError, ResourceError.

    Weights are dequantized to float32, so the folder takes 4 bytes per parameter on disk.
    """
    folder = converted_folder(file, models)
    if is_whole(folder):
        return folder
    with locked(models / f".{folder.name}.lock"):
        if not is_whole(folder):
            with new_folder(folder, replace=True) as unfinished:
                _write(file, unfinished, models)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a converted folder has the very files that the conversion wrote. Each state of the files is read once."""
    try:
        stats = {str(path): path.stat() for path in folder.rglob("*")}
    except OSError:
        return False
    return _has_its_files(folder, tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())))


@functools.lru_cache(64)
def _has_its_files(folder: Path, state: tuple[tuple[str, int, int], ...]) -> bool:
    """``state``: name, size and time of each file."""
    try:
        stated = json.loads((folder / SOURCE).read_bytes())["files"]
        return bool(stated == _hashes(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a converted folder, by name."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SOURCE:
            hashes[path.relative_to(folder).as_posix()] = file_sha256(path)
    return hashes


def _write(file: Path, folder: Path, models: Path) -> None:
    """Write the model into ``folder``; messages name ``models``, where it ends up."""
    from lbllm.models.gguf_check import check_tensors  # reads by an extra

    metadata = read_metadata(file)
    parts = all_parts(file)
    joined = sum(part.stat().st_size for part in parts) if len(parts) > 1 else 0
    config = gguf_model_config(file)
    with quiet(), torch.device("meta"):
        shapes = _shapes(file, config)
    needed = 4 * shapes.num_parameters() + joined + 16 * 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"converting {file.name} needs {needed / 1e9:.2f} GB in {models}, {free / 1e9:.2f} GB are free; "
            "free some space or set LBLLM_HOME to a folder on another disk"
        )
    with contextlib.ExitStack() as stack:
        if joined:
            whole = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) / f"{model_name(file)}.gguf"
            join(parts, whole)
        else:
            whole = stack.enter_context(_alone(file))
        config = _model_config(whole, metadata)
        check_tensors(whole, config, shapes)
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # one of its bars has no other switch
        stack.enter_context(quiet())
        place = str(whole.parent)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                gguf_file=whole.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                trust_remote_code=False,
            )
            model, report = loaded
            check_report(report)
            settle_tied_weights(model)
            tokenizer = AutoTokenizer.from_pretrained(
                place, config=config, gguf_file=whole.name, trust_remote_code=False
            )
        except FileFault as fault:
            raise ModelError(f"{file}: {fault}; give another copy of the model") from None
        except Exception as error:  # whatever a foreign file makes the libraries do
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
        "conversion": CONVERSION,
        "file": file.name,
        "sha256": sha256(file),
        "precision": precision(metadata),
        "licence": metadata.get("general.license", "not stated in the file"),
        "files": _hashes(folder),
    }
    (folder / SOURCE).write_text(json.dumps(source, indent=1))


def _shapes(file: Path, config: PretrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model
    except Exception as error:  # whatever foreign metadata makes transformers do
        raise ModelError(f"{file}: transformers can't make a model of this GGUF file: {error}") from None
