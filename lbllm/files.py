"""Write files and folders atomically: a reader finds the old one or the new one, complete, also after a crash.

    write_file(path, data)    write these bytes
    new_file(path)            context manager: write to the file that it names; at the end the file becomes ``path``
    new_folder(path)          the same for a folder
    locked(file)              context manager: of several processes at once one does the work, the others wait
    is_held(file)             whether a process holds that lock

A writer works in a draft folder beside its target: ``.<name>.<8 hex digits>.new``. It flushes the new file or folder to
disk and renames it. As long as it works, it holds the lock file in its draft. So a draft that nobody holds was left by
a killed writer, and the next writer of the same target removes it.

A file replaces the old one by a rename. A folder that is not empty changes places with the new one in one step, where
the system can do that (renameat2 on Linux). Elsewhere the old one is first moved into the draft as ``<name>.old``, so
there is a moment without it. Where the writer is killed in that moment, the next writer of the target puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from lbllm.errors import ResourceError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's <fcntl.h> and <linux/fs.h>
_OLD_DRAFTS = (".{}.unfinished", ".{}.part")
_FOLDER_EXISTS = (errno.ENOTEMPTY, errno.EEXIST)


def refuse_links(folder: Path) -> None:
    """Check a folder before its files are published: a link in it may show any file of this machine.

    A link to a file of the same folder passes, and one from a snapshot in the hub's cache to that cache's blobs.
    Raises ResourceError.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent) / name for name in (*folders, *names)):
            if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
                raise ResourceError(
                    f"{path} is a link to {path.readlink()}, which lies outside {folder}; put the file itself there "
                    "if it is meant to be published"
                )


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically. Its folder must exist. Raises OSError."""
    with new_file(path) as file:
        file.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the path of a file to write. At the end the file becomes ``path``; after an exception it is removed. Other
    files that are written beside it are always removed.

    The folder of ``path`` must exist. The file gets the permissions that the umask leaves. Raises OSError.
    """
    path = path.absolute()
    with _draft(path) as (draft, mode):
        file = draft / path.name
        yield file
        _flush(file, mode)
        file.replace(path)
        _sync(path.parent)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a new folder to fill. At the end it becomes ``path``; after an exception it is removed.

    ``path`` must be missing or an empty folder; with ``replace`` it may be any folder. Its parent is created. The
    folder and its files get the permissions that the umask leaves. Raises OSError.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path) as (draft, mode):
        folder = draft / path.name
        folder.mkdir()
        yield folder
        for inner in (*folder.rglob("*"), folder):
            _flush(inner, mode)
        _place_folder(folder, path, replace)
        _sync(path.parent)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise ResourceError, with the path and the way out, where a file can't be written or read."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{path} can't be written ({error}); free some space there, or choose a folder that you may write to"
        ) from error


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Wait for the exclusive lock on ``file`` and hold it. The file and its folder are created. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> IO[bytes] | None:
    """Lock the file for this process; closing it frees the lock. None where another process holds it."""
    file = path.open("ab")
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Perhaps a worker, perhaps only an is_held of this very moment.
            time.sleep(0.01)
        else:
            return file
    file.close()
    return None


def is_held(path: Path) -> bool:
    """Whether a living process holds the exclusive lock on a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


def remove_drafts(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it."""
    for old in _OLD_DRAFTS:  # of earlier versions, which held no lock
        left = path.with_name(old.format(path.name))
        with suppress(OSError):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.new")
    for draft in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        with suppress(OSError), _locked_draft(draft, path):
            _remove(draft, path)


@contextmanager
def _draft(path: Path) -> Iterator[tuple[Path, int]]:
    """A draft folder for ``path`` and its mode, which the umask has formed. Removes the drafts of killed writers."""
    remove_drafts(path)
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        draft.mkdir()
        lock: AbstractContextManager[object]
        try:
            lock = _locked_draft(draft, path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer has just taken it for the draft of a killed one
        except OSError:
            lock = nullcontext()  # a file system without locks, where drafts of killed writers stay
        break
    with lock:
        try:
            yield draft, draft.stat().st_mode
        finally:
            _remove(draft, path)


def _locked_draft(draft: Path, path: Path) -> IO[bytes]:
    """The draft's lock file, open and locked. Raises BlockingIOError where another process holds it, FileNotFoundError
    where the draft is gone."""
    lock = (draft / f"{path.name}.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(draft))
    except OSError:
        lock.close()
        raise
    return lock


def _remove(draft: Path, path: Path) -> None:
    """Remove a draft; a folder that was moved into it is put back where nothing has taken its place."""
    old = _old(draft, path)
    if old.exists():
        with suppress(OSError):
            if not path.exists():
                old.rename(path)
        if not path.exists():
            return  # this is the only one left
    shutil.rmtree(draft, ignore_errors=True)


def _old(draft: Path, path: Path) -> Path:
    return draft / f"{path.name}.old"


def _flush(path: Path, mode: int) -> None:
    """Give a new file or folder the permissions of the folder mode ``mode``, and force it to disk."""
    found = path.lstat().st_mode
    if stat.S_ISLNK(found):
        return
    wanted = stat.S_IMODE(mode) if stat.S_ISDIR(found) else mode & (0o777 if found & stat.S_IXUSR else 0o666)
    if stat.S_IMODE(found) != wanted:
        path.chmod(wanted)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't flush a folder
            raise
    finally:
        os.close(descriptor)


def _place_folder(new: Path, path: Path, replace: bool) -> None:
    """Rename the folder ``new`` to ``path``. What was there, if anything, is then in ``new``'s folder."""
    while True:
        try:
            new.rename(path)  # also replaces an empty folder
            return
        except OSError as error:
            if not replace or error.errno not in _FOLDER_EXISTS:
                raise
        if _exchange(new, path):
            return
        old = _old(new.parent, path)
        shutil.rmtree(old, ignore_errors=True)  # of the round before: another writer's folder has taken its place
        with suppress(FileNotFoundError):
            path.rename(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system can't do that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
