"""The seal of a packed checkpoint: it shows whether any file that decides the model's output has changed.

``config.json`` holds it under ``quantization_config.seal``: the size and SHA-256 of the weights, generation settings,
tokenizer files and chat templates, and the SHA-256 of config.json itself without the seal and the provenance, which
decides no output. Names in a seal are only compared with the files that lie in the folder, and never opened.

A checkpoint of lbllm 0.1 or 0.2 has no seal; its weights and its format have a hash each, which are checked as before.

    python -m lbllm.checkpoints.seal FOLDER     seal a folder anew after you changed its files on purpose
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from lbllm.checkpoints.weights import WEIGHTS, weights_files
from lbllm.errors import CheckpointError, LbllmError
from lbllm.files import file_sha256, write_errors, write_file
from lbllm.models.loading import INDEX, FileFault

SEAL_VERSION = 1
CORRUPT = "copy or make the checkpoint again; nothing of it was used"  # the advice for every damaged checkpoint
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
_MODEL = (*_WEIGHTS, "generation_config.json", "adapter_config.json")
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", f"{CHAT_TEMPLATE_DIR}/*.jinja"),
    *("*.model", "*.tiktoken", "tekken.json", "vocab*", "merges.txt"),
)
_READERS = 8
_checked: ContextVar[Path | None] = ContextVar("checked", default=None)


class SealedFile(BaseModel):
    """The size in bytes and the hash of a file when it was sealed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size: int


class Seal(BaseModel):
    """What a checkpoint's files were when it was sealed; ``files`` by their names relative to the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    config_sha256: str
    files: dict[str, SealedFile]


def format_sha256(quant: dict[str, Any]) -> str:
    """SHA-256 of the format as config.json states it, in hex."""
    return hashlib.sha256(json.dumps(quant, sort_keys=True).encode()).hexdigest()


def add_seal(document: dict[str, Any], folder: Path) -> None:
    """Put the seal of the files in ``folder`` into the content of its config.json. Raises OSError."""
    stated = document["quantization_config"]
    files = _sealed(deciding_files(folder))
    # For versions without seals, which read one file of weights.
    stated["tensors_sha256"] = files[WEIGHTS].sha256 if WEIGHTS in files else None
    stated["seal"] = Seal(config_sha256=_config_sha256(document), files=files).model_dump()


def seal_again(folder: Path) -> None:
    """Seal a checkpoint whose files were changed on purpose. Only the weights must be those that were saved.

    Raises CheckpointError if the weights or the format are not, or config.json can't be read; OSError.
    """
    document = read_document(folder)
    stated, weights = document["quantization_config"], stated_weights(folder)
    if stated.get("format_sha256") != format_sha256(stated.get("quant", {})):
        raise CheckpointError(other_format(str(folder / "config.json")))
    for name, hashed in weights_sha256(folder).items():
        if weights.get(name) != hashed:
            raise CheckpointError(_changed(folder / name))
    add_seal(document, folder)
    _write(folder, document)


def seal_tokenizer(folder: Path) -> None:
    """Bring the seal up to date with the folder's tokenizer files, if the folder has a sealed checkpoint.

    Raises CheckpointError if the seal can't be read; OSError.
    """
    try:
        document = read_document(folder)
    except CheckpointError:
        return
    seal = _read_seal(document, folder)
    if seal is None:
        return
    kept = {name: entry for name, entry in seal.files.items() if not _is_named(name, _TOKENIZER)}
    files = dict(sorted((kept | _sealed(deciding_files(folder, _TOKENIZER))).items()))
    document["quantization_config"]["seal"] = seal.model_copy(update={"files": files}).model_dump()
    _write(folder, document)


def is_sealed(folder: Path) -> bool:
    """Whether the folder holds a checkpoint with a seal that this version can read."""
    try:
        return _read_seal(read_document(folder), folder) is not None
    except CheckpointError:
        return False


def check_config(folder: Path) -> Seal | None:
    """Check config.json against its seal and return the seal; None if it has none. Raises CheckpointError."""
    document = read_document(folder)
    seal = _read_seal(document, folder)
    if seal is not None and seal.config_sha256 != _config_sha256(document):
        raise CheckpointError(_changed(folder / "config.json"))
    return seal


def check_folder(folder: Path) -> None:
    """Check every file of a checkpoint that decides its output.

    Raises CheckpointError for a file that differs, is missing or was added. A tokenizer that was added to a checkpoint
    sealed without one passes.
    """
    weights, seal, found = packed_weights(folder), check_config(folder), deciding_files(folder)
    if seal is None:
        _check_unsealed(folder, weights)
        return
    if not any(_is_named(name, _TOKENIZER) for name in seal.files):
        found = {name: file for name, file in found.items() if not _is_named(name, _TOKENIZER)}
    for name in seal.files:
        if name not in found:
            raise CheckpointError(_missing(folder / name))
    _check_files(folder, seal, found)


def check_loaded(files: Iterable[str | Path]) -> None:
    """Check the weights files that transformers is about to read, and the settings beside them.

    On the hub's cache only some of a checkpoint's files are present. Raises CheckpointError.
    """
    paths = [Path(file) for file in files]
    if not paths or _checked.get() == paths[0].parent.absolute():
        return
    folder = paths[0].parent
    for path in paths:
        if not path.is_file():
            raise CheckpointError(_missing(path))
    seal = check_config(folder)
    if seal is None:
        _check_unsealed(folder, paths)
    else:
        _check_files(folder, seal, deciding_files(folder, _MODEL) | {path.name: path for path in paths})


@contextmanager
def already_checked(folder: Path) -> Iterator[None]:
    """Within it ``check_loaded`` does not read this folder's files a second time."""
    token = _checked.set(folder.absolute())
    try:
        yield
    finally:
        _checked.reset(token)


def deciding_files(folder: Path, patterns: tuple[str, ...] = _MODEL + _TOKENIZER) -> dict[str, Path]:
    """The files of a checkpoint, apart from config.json, that decide the model's output, by their names."""
    places = [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*.jinja")]
    files = {path.relative_to(folder).as_posix(): path for path in places if path.is_file()}
    return {name: path for name, path in sorted(files.items()) if _is_named(name, patterns)}


def read_document(folder: Path) -> dict[str, Any]:
    """The content of a packed checkpoint's config.json. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); {CORRUPT}") from error
    if not isinstance(document, dict) or not isinstance(document.get("quantization_config"), dict):
        raise CheckpointError(f"{path} is not that of a packed checkpoint; {CORRUPT}")
    return document


def packed_weights(folder: Path) -> list[Path]:
    """Like ``weights_files`` of a checkpoint. Raises CheckpointError."""
    try:
        return weights_files(folder)
    except FileFault as fault:
        raise CheckpointError(f"{folder}: {fault}; {CORRUPT}") from None


def weights_sha256(folder: Path) -> dict[str, str]:
    """The hash of each weights file in a folder, with their index if there are several, by name.

    Raises CheckpointError if one is missing; OSError.
    """
    files = packed_weights(folder)
    if files != [folder / WEIGHTS]:
        files.append(folder / INDEX)
    return {name: one.sha256 for name, one in _sealed({file.name: file for file in files}).items()}


def stated_weights(folder: Path) -> dict[str, str]:
    """The hashes that a checkpoint's config.json states of these files; empty if there are none, or if it can't be
    read."""
    try:
        document = read_document(folder)
        alone = document["quantization_config"].get("tensors_sha256")
        seal = _read_seal(document, folder)
    except CheckpointError:
        return {}
    if alone is not None:
        return {WEIGHTS: str(alone)}
    files = {} if seal is None else seal.files
    return {name: one.sha256 for name, one in files.items() if _is_named(name, _WEIGHTS)}


def other_format(place: str) -> str:
    """The message for a format that does not fit its hash."""
    return f"{place}: the format in quantization_config.quant is not the one its tensors were packed in; {CORRUPT}"


def _read_seal(document: dict[str, Any], folder: Path) -> Seal | None:
    path, stated = folder / "config.json", document["quantization_config"].get("seal")
    if stated is None:
        return None
    version = stated.get("version") if isinstance(stated, dict) else None
    if isinstance(version, int) and version > SEAL_VERSION:
        raise CheckpointError(
            f"{path} has a seal of version {version}; this program reads version {SEAL_VERSION}. Install the lbllm "
            "that wrote it, or make the checkpoint again"
        )
    try:
        return Seal.model_validate(stated)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{path} has a damaged seal (quantization_config.seal.{place}); {CORRUPT}") from error


def _check_files(folder: Path, seal: Seal, found: dict[str, Path]) -> None:
    """Compare files with the seal."""
    for name, path in found.items():
        if name not in seal.files:
            raise CheckpointError(f"{path} was added after this checkpoint was saved; remove it, or {_reseal(folder)}")
        # The sizes first: where a file was cut off, no file is read.
        if seal.files[name].size != path.stat().st_size:
            raise CheckpointError(_changed(path))
    for name, now in _sealed(found).items():
        if now.sha256 != seal.files[name].sha256:
            raise CheckpointError(_changed(found[name]))


def _check_unsealed(folder: Path, weights: list[Path]) -> None:
    """Compare the weights with the only hash that a checkpoint without a seal has."""
    for path in weights:
        if stated_weights(folder).get(path.name) != file_sha256(path):
            raise CheckpointError(_changed(path))


def _missing(path: Path) -> str:
    return f"{path} is missing, which was saved with this checkpoint; {_way_out(path)}"


def _changed(path: Path) -> str:
    return f"{path} is not the file that was saved (its hash differs); {_way_out(path)}"


def _way_out(path: Path) -> str:
    if _is_named(path.name, _WEIGHTS):
        return CORRUPT
    folder = path.parent if path.parent.name != CHAT_TEMPLATE_DIR else path.parent.parent
    return f"copy or make the checkpoint again, or {_reseal(folder)}"


def _reseal(folder: Path) -> str:
    return f"if you changed it on purpose, run `python -m lbllm.checkpoints.seal {folder}`"


def _sealed(files: dict[str, Path]) -> dict[str, SealedFile]:
    """Size and hash of files; several are read at a time."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _READERS)) as pool:
        hashes = pool.map(file_sha256, files.values())
        entries = zip(files.items(), hashes, strict=True)
        return {name: SealedFile(sha256=hashed, size=file.stat().st_size) for (name, file), hashed in entries}


def _config_sha256(document: dict[str, Any]) -> str:
    stated = {key: value for key, value in document["quantization_config"].items() if key not in ("seal", "provenance")}
    text = json.dumps(document | {"quantization_config": stated}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _write(folder: Path, document: dict[str, Any]) -> None:
    write_file(folder / "config.json", (json.dumps(document, indent=2) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Seal a packed checkpoint anew after its tokenizer, chat templates or settings were changed on purpose."""
    parser = argparse.ArgumentParser(prog="python -m lbllm.checkpoints.seal", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a packed checkpoint")
    folder = parser.parse_args(arguments).folder
    try:
        with write_errors(folder):
            seal_again(folder)
    except LbllmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
