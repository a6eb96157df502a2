"""Files and folders are written atomically: after a kill, an error or two writers at once there is a complete one."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lbllm import files
from lbllm.errors import ResourceError
from lbllm.files import locked, new_file, new_folder, write_errors, write_file
from tests.helpers import ROOT

NO_EXCHANGE = "the file system of the temporary folder can't exchange two folders"


def fill(folder: Path, version: int) -> None:
    """A folder of several files, all of one version."""
    (folder / "inner").mkdir()
    for name in ("a", "b", "inner/c"):
        (folder / name).write_text(str(version) * 1000)


def version_of(path: Path) -> int:
    """The version of a file or folder that is complete; AssertionError where it is not."""
    parts = [path / name for name in ("a", "b", "inner/c")] if path.is_dir() else [path]
    texts = {part.read_text() for part in parts}
    assert len(texts) == 1
    (text,) = texts
    assert len(text) == 1000
    return int(text[0])


def write(path: Path, version: int, kind: str) -> None:
    if kind == "file":
        write_file(path, (str(version) * 1000).encode())
        return
    with new_folder(path, replace=True) as folder:
        fill(folder, version)


def no_exchange(one: Path, other: Path) -> bool:
    return False


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def can_exchange(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir()
    can = files._exchange(folder / "one", folder / "other")
    for name in ("one", "other"):
        (folder / name).rmdir()
    return can


@pytest.fixture
def masked() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


# What is written, and with which permissions.


def test_a_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, b"first")
    write_file(path, b"second")
    with new_file(path) as file:
        assert file.name == "state"
        file.with_name("beside").write_text("scrap")
        file.write_bytes(b"third")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"third"
    assert names(tmp_path) == ["state"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaces_the_old_one(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", no_exchange)
    path = tmp_path / "deep" / "folder"
    write(path, 1, "folder")
    (path / "old").touch()
    write(path, 2, "folder")
    assert version_of(path) == 2
    assert names(path) == ["a", "b", "inner"]
    assert names(path.parent) == ["folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_two_folders_change_places(tmp_path: Path) -> None:
    for version, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, version)
    if not files._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip(NO_EXCHANGE)
    assert (version_of(tmp_path / "one"), version_of(tmp_path / "other")) == (1, 0)
    assert not files._exchange(tmp_path / "one", tmp_path / "missing")


def test_only_an_empty_folder_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with new_folder(path) as folder:
        fill(folder, 1)
    with pytest.raises(OSError, match="not empty"), new_folder(path) as folder:
        fill(folder, 2)
    assert version_of(path) == 1
    assert names(tmp_path) == ["out"]


def test_a_folder_and_a_file_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="folder"):
        write_file(tmp_path / "folder", b"")
    with pytest.raises(OSError, match="file"), new_folder(tmp_path / "file", replace=True):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.usefixtures("masked")
def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"")
    with new_file(tmp_path / "private") as file:
        file.touch(mode=0o600)
    with new_folder(tmp_path / "folder") as folder:
        folder.chmod(0o700)
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "weights").touch(mode=0o600)
        (folder / "program").touch(mode=0o700)
        (folder / "link").symlink_to("nowhere")
    modes = {str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.lstat().st_mode)) for path in tmp_path.rglob("*")}
    del modes["folder/link"]
    assert modes == {
        "file": "0o640",
        "private": "0o640",
        "folder": "0o750",
        "folder/inner": "0o750",
        "folder/inner/weights": "0o640",
        "folder/program": "0o750",
    }


# Errors.


def break_off(path: Path, kind: str) -> None:
    with new_file(path) if kind == "file" else new_folder(path) as new:
        (new if kind == "file" else new / "a").write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("there", [True, False])
def test_an_exception_leaves_the_old_one_alone(tmp_path: Path, kind: str, there: bool) -> None:
    path = tmp_path / "target"
    if there:
        write(path, 1, kind)
    with pytest.raises(KeyboardInterrupt):
        break_off(path, kind)
    assert names(tmp_path) == (["target"] if there else [])
    assert not there or version_of(path) == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_flush_that_fails_leaves_the_old_one_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"
    write(path, 1, kind)

    def fail(descriptor: int) -> None:
        raise OSError("the disk is broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken"):
        write(path, 2, kind)
    assert version_of(path) == 1
    assert names(tmp_path) == ["target"]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.argv[0] = "-m"  # as in our own commands: no import of what isn't needed
from safetensors.numpy import save_file
from lbllm.errors import ResourceError
from lbllm.files import new_folder, write_errors, write_file
import numpy
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_file(folder / "file", bytes(100_000))
except OSError as error:
    print(error)
for write in (
    lambda new: (new / "a").write_bytes(bytes(100_000)),
    lambda new: save_file({"a": numpy.zeros(100_000)}, new / "a"),
):
    try:
        with write_errors(folder / "folder"), new_folder(folder / "folder", replace=True) as new:
            write(new)
    except ResourceError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_ones_and_is_told(tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        write(tmp_path / kind, 1, kind)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == 3
    assert all("File too large" in line for line in told)
    assert all(f"{tmp_path / 'folder'} can't be written" in line and "free some space" in line for line in told[1:])
    for kind in ("file", "folder"):
        assert version_of(tmp_path / kind) == 1
    assert names(tmp_path) == ["file", "folder"]


READ_ONLY = """
import os, sys, tempfile
from pathlib import Path
sys.argv[0] = "-m"
from lbllm.errors import ResourceError
from lbllm.files import new_folder, write_errors, write_file
folder = Path(tempfile.mkdtemp())
folder.chmod(0o555)
try:
    if os.fork() == 0:
        if os.geteuid() == 0:  # whom permissions do not stop
            os.setuid(65534)
        try:
            write_file(folder / "file", b"")
        except PermissionError as error:
            print(error, flush=True)
        try:
            with write_errors(folder / "folder"), new_folder(folder / "folder"):
                pass
        except ResourceError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
    assert not list(folder.iterdir())
finally:
    folder.rmdir()
"""


def test_a_folder_that_must_not_be_written_to_is_told() -> None:
    command = [sys.executable, "-c", READ_ONLY]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == 2
    assert "Permission denied" in told[0]
    assert "folder can't be written" in told[1]
    assert "choose a folder that you may write to" in told[1]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), write_errors(tmp_path):
        raise ValueError("mine")
    with pytest.raises(ResourceError, match=tmp_path.name), write_errors(tmp_path):
        raise OSError("full")


# Killed writers.

# Python reports these before it does them; between two of them nothing changes on the disk.
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "ctypes.dlopen", "shutil.rmtree"}


@contextmanager
def quick_flush() -> Iterator[None]:
    """Without fsync: a kill, unlike a power cut, loses nothing that was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def killed_at(step: int, path: Path, version: int, kind: str) -> bool:
    """Write in a child process that is killed before the given step of its work; False where it ended before."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: object) -> None:
            nonlocal left
            if event not in STEPS:
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            write(path, version, kind)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("kind", "exchange"), [("file", True), ("folder", True), ("folder", False)])
def test_a_killed_writer_leaves_the_old_or_the_new(
    tmp_path: Path, kind: str, exchange: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", no_exchange)
    elif kind == "folder" and not can_exchange(tmp_path):
        pytest.skip(NO_EXCHANGE)
    path, found, gaps, step = tmp_path / "target", [], 0, 1
    with quick_flush():
        if there:
            write(path, 1, kind)
        while killed_at(step, path, 2, kind):
            if there and not path.exists():
                # The old one waits in the draft; who writes next begins by putting it back.
                gaps += 1
                with suppress(KeyboardInterrupt):
                    break_off(path, kind)
            found.append(version_of(path) if path.exists() else None)
            write(path, 1, kind)
            assert version_of(path) == 1
            assert names(tmp_path) == ["target"]
            if not there:
                path.rename(tmp_path.with_name(f"{tmp_path.name}-{step}"))
            step += 1
    assert step > 5
    assert set(found) == {1 if there else None, 2}
    # Once there is the new one, it stays.
    assert found == sorted(found, key=lambda version: version == 2)
    assert bool(gaps) == (there and not exchange)


@contextmanager
def endless_writers(path: Path, kind: str, count: int) -> Iterator[list[int]]:
    """Child processes that write one thing again and again, and are killed at the end."""
    children = []
    for version in range(1, count + 1):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    write(path, version, kind)
            finally:
                os._exit(1)
        children.append(child)
    try:
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
    assert all(map(os.WIFSIGNALED, ends))  # no writer met an error


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_loop_of_writes_can_be_killed_at_any_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    write(path, 2, kind)
    for moment in range(12):
        with endless_writers(path, kind, 1):
            time.sleep(0.02 + 0.011 * moment)
        assert version_of(path) in (1, 2)
        assert len(names(tmp_path)) <= 2  # of all killed writers only the last one's draft is left
    write(path, 3, kind)
    assert version_of(path) == 3
    assert names(tmp_path) == ["target"]


# Several writers at once.


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_reader_always_finds_one_while_two_write(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    write(path, 3, kind)
    if kind == "folder" and not can_exchange(tmp_path):
        pytest.skip(NO_EXCHANGE)
    part, seen = path / "a" if kind == "folder" else path, set()
    with quick_flush(), endless_writers(path, kind, 2):
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert path.exists()
            text = part.read_text()
            assert len(text) == 1000
            seen.add(text[0])
    assert {"1", "2"} <= seen
    assert version_of(path) in (1, 2)
    write(path, 3, kind)
    assert names(tmp_path) == ["target"]


def test_two_writers_that_cannot_exchange_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", no_exchange)
    path = tmp_path / "target"
    with quick_flush(), endless_writers(path, "folder", 3):
        time.sleep(1.5)
    write(path, 4, "folder")
    assert version_of(path) == 4
    assert names(tmp_path) == ["target"]


def test_drafts_of_living_writers_and_other_files_stay(tmp_path: Path) -> None:
    path, dead = tmp_path / "target", tmp_path / ".target.0123abcd.new"
    others = [".target.0123abcd.old", ".target.x.0123abcd.new", "target.0123abcd.new"]
    for folder in (dead, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "target").write_text("half")
    with new_file(path) as first:
        first.write_text("first")
        assert not dead.exists()
        write_file(path, b"second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert names(tmp_path) == sorted(["target", *others])


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with locked(tmp_path / "new" / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
