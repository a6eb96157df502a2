"""The binarized checkpoint included with the project, so that you can try it without a run.

assets/checkpoint/ contains the part of a checkpoint that binarization made: bits, group parameters, knees and clips.
Embeddings and norms, which are most of the bytes, are those of the embedded teacher and are copied from it when the
checkpoint is assembled in the cache, once. Its hash covers the whole file, so ``load`` notices any difference.
Embeddings of 8 bits are packed from the teacher's, which gives its very values; those of 6 and 4 bits, which are found
by a search, are in the assets.

    python -m lbllm.checkpoints.shipped runs/quick      # how assets/checkpoint/ was made
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lbllm.checkpoints.record import RECORD
from lbllm.checkpoints.seal import add_seal, check_config, check_folder, is_sealed, read_document
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.errors import CheckpointError
from lbllm.files import file_sha256, locked, new_folder, write_errors, write_file
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.places import ASSETS, home
from lbllm.quant.embedding_code import pack_rows
from lbllm.quant.packed_embedding import tables

ASSET_FOLDER = ASSETS / "checkpoint"
PACKED = "packed.safetensors"
_SMALL = ("config.json", "generation_config.json", "README.md", RECORD)
_SEARCHED = (4, 6)  # bits of embeddings whose packed rows another machine may find differently
_PACKED_ENDINGS = (".params", ".params_scale", ".params_range", ".quantizer.act")


def shipped_checkpoint() -> Path:
    """The folder of the whole checkpoint, assembled at the first call. Raises CheckpointError, ModelError,
    ResourceError if it can't be written."""
    check_assets()
    stated = read_document(ASSET_FOLDER)["quantization_config"]
    target = home() / "models" / f"shipped-{stated['tensors_sha256'][:12]}"
    if not is_whole(target):
        with write_errors(target), locked(target.with_name(f".{target.name}.lock")):
            if not is_whole(target):  # another process may have made it while this one waited
                assemble(ASSET_FOLDER, load_teacher(stated["provenance"]["model"]), target)
    return target


def is_whole(folder: Path) -> bool:
    """Whether the folder has a checkpoint with a seal, and the files that were sealed. One that an older version
    assembled has no seal."""
    try:
        check_folder(folder)
    except CheckpointError:
        return False
    return is_sealed(folder)


def check_assets() -> None:
    """Raise CheckpointError if the project's assets lack the checkpoint."""
    config = ASSET_FOLDER / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{config} is missing; get the project's assets again, or binarize a model by a run")


def strip(checkpoint: Path, target: Path) -> None:
    """Write the part of a checkpoint folder that ``assemble`` can't take from the teacher. Raises CheckpointError if
    its weights are in several files: the hash of ``assemble`` is that of one."""
    if not (checkpoint / WEIGHTS).is_file():
        raise CheckpointError(f"{checkpoint} has no {WEIGHTS}; save it in one file, with a larger max_shard_size")
    with safe_open(checkpoint / WEIGHTS, "pt") as file, new_folder(target, replace=True) as folder:
        names = set(file.keys())
        layers = _packed_layers(names)
        kept = {n for n in names if n.endswith(_PACKED_ENDINGS) or n.removesuffix(".weight") in layers}
        if _embedding_bits(checkpoint) in _SEARCHED:
            kept |= {name for name in names if file.get_slice(name).get_dtype() == "U8"}
        save_file({name: file.get_tensor(name) for name in kept}, folder / PACKED)
        _copy_small(checkpoint, folder)


def assemble(stripped: Path, teacher: Teacher, target: Path) -> None:
    """Assemble a whole checkpoint from a stripped one and its teacher. Raises CheckpointError if the result is not
    the file that was stripped."""
    seal = check_config(stripped)
    for name in _SMALL:
        if seal is not None and name in seal.files and seal.files[name].sha256 != file_sha256(stripped / name):
            raise CheckpointError(f"{stripped / name} is not the file that was saved; get the project's assets again")
    expected = read_document(stripped)["quantization_config"]["tensors_sha256"]
    try:
        tensors = load_file(stripped / PACKED)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{stripped / PACKED} can't be read ({error}); get the project's assets again") from error
    layers = _packed_layers(tensors)
    rows = {f"{name}.weight" for name in tables(teacher.model)} if _embedding_bits(stripped) == 8 else set()
    seen: set[int] = set()
    for name, tensor in teacher.model.state_dict(keep_vars=True).items():
        # A tied tensor is in the file once, under its first name.
        if name.removesuffix(".weight") not in layers and id(tensor) not in seen:
            seen.add(id(tensor))
            if name not in tensors:
                own = tensor.detach()
                tensors[name] = pack_rows(own, 8, None) if name in rows else own.bfloat16().contiguous()
    with new_folder(target, replace=True) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if file_sha256(folder / WEIGHTS) != expected:
            raise CheckpointError(
                f"{stripped / PACKED} does not give the checkpoint that it was taken from together with "
                f"{teacher.name} ({teacher.precision}); get the project's assets again"
            )
        teacher.tokenizer.save_pretrained(folder)
        _copy_small(stripped, folder)
        document = read_document(folder)
        add_seal(document, folder)
        write_file(folder / "config.json", (json.dumps(document, indent=2) + "\n").encode())


def _embedding_bits(folder: Path) -> int:
    """The bits of a checkpoint's embeddings; the format of a checkpoint from before they could be chosen has none."""
    return int(read_document(folder)["quantization_config"]["quant"].get("embedding_bits", 16))


def _packed_layers(names: Iterable[str]) -> set[str]:
    """The names of the packed layers among the names of a checkpoint's tensors."""
    return {name.removesuffix(".params") for name in names if name.endswith(".params")}


def _copy_small(source: Path, target: Path) -> None:
    for name in _SMALL:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def main() -> None:
    """Make assets/checkpoint/ from a finished run's checkpoint folder."""
    parser = argparse.ArgumentParser(prog="python -m lbllm.checkpoints.shipped", description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint of the embedded model")
    strip(parser.parse_args().checkpoint, ASSET_FOLDER)


if __name__ == "__main__":
    main()
