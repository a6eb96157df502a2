"""A GGUF file that was split into parts (name-00001-of-00003.gguf, ...): find them all, and join them.

Only the first part has the model's settings and tokenizer. Each part has a table of its own tensors.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from lbllm.errors import ModelError

_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_TOGETHER = "put all parts of the model into one folder, under their own names"


def model_name(file: Path) -> str:
    """The name of the model in a file, without the number of a part."""
    found = _NAME.fullmatch(file.name)
    return file.stem if found is None else found["name"]


def all_parts(file: Path) -> list[Path]:
    """The files of the model that ``file`` is, or by its name is a part of, in order. Raises ModelError if a part is
    missing."""
    found = _NAME.fullmatch(file.name)
    if found is None:
        return [file]
    count = int(found["count"])
    suffix = file.suffix
    parts = [file.with_name(f"{found['name']}-{number:05}-of-{count:05}{suffix}") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise ModelError(f"{file} is one of {count} parts, and {', '.join(missing[:3])} is missing; {_TOGETHER}")
    return parts


def check_whole(file: Path, metadata: dict[str, Any]) -> None:
    """Raise ModelError if a file's metadata says that it is a part of a model, and its name does not say which."""
    count = metadata.get("split.count", 1)
    if count not in (0, 1) and not _NAME.fullmatch(file.name):
        raise ModelError(f"{file} is one of {count} parts of a model, but its name does not say which; {_TOGETHER}")


def join(parts: list[Path], target: Path) -> None:
    """Write the one GGUF file that the parts were split from. Raises ModelError if they are not parts of one model."""
    import gguf  # an extra

    readers = []
    for number, part in enumerate(parts):
        try:
            reader = gguf.GGUFReader(part)
        except (ValueError, KeyError, IndexError, TypeError, OSError, struct.error) as error:
            raise ModelError(f"{part} can't be read as a GGUF file: {error}") from None
        stated = [_value(reader, f"split.{key}") for key in ("no", "count", "tensors.count")]
        if stated[:2] != [number, len(parts)]:
            raise ModelError(
                f"{part} says that it is part {stated[0]} of {stated[1]} (counted from 0), not {number} of "
                f"{len(parts)}; {_TOGETHER}"
            )
        readers.append(reader)
    whole = sum(len(reader.tensors) for reader in readers)
    wanted = _value(readers[0], "split.tensors.count")
    if wanted != whole:
        raise ModelError(f"{parts[0]} says that the model has {wanted} tensors, its parts have {whole}; {_TOGETHER}")
    fields = [
        b"".join(part.tobytes() for part in field.parts)
        for name, field in readers[0].fields.items()
        if not name.startswith(("GGUF.", "split."))
    ]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    alignment = int(_value(readers[0], "general.alignment") or gguf.GGUF_DEFAULT_ALIGNMENT)
    with target.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields))
        offset = 0
        for tensor in tensors:
            name = tensor.name.encode()
            stream.write(struct.pack("<Q", len(name)) + name)
            stream.write(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *map(int, tensor.shape)))
            stream.write(struct.pack("<IQ", int(tensor.tensor_type), offset))
            offset += tensor.n_bytes + -tensor.n_bytes % alignment
        stream.write(bytes(-stream.tell() % alignment))
        for tensor in tensors:
            stream.write(tensor.data.tobytes())
            stream.write(bytes(-tensor.n_bytes % alignment))


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
