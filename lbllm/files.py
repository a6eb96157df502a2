"""Write files and folders atomically: they appear under their name complete, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lbllm.errors import ResourceError


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, which is missing or empty; it gets that name at the end, or is gone after an error.

    Raises ResourceError where a file can't be written or read.
    """
    unfinished: Path | None = None
    try:
        out = out.absolute()
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield unfinished
        # mkdtemp's folder is the user's own alone, and so are safetensors' files.
        for path in (unfinished, *unfinished.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{out} can't be written ({error}); free some space there, or choose a folder that you may write to"
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, also over a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
