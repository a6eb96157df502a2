"""The compiled library in the cache: damaged files, builds that are killed or run at once, compilers that fail.

A script that copies a library stands in for the compiler, which takes half a minute.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbllm import kernels
from lbllm.places import home
from tests.helpers import ROOT

COMPILER = """#!/bin/sh
for word; do
  [ "$before" = -o ] && out=$word
  [ "$word" = -shared ] && step=link
  before=$word
done
[ "$KILLED_AT" = "${step:-compile}" ] && kill -9 $PPID
[ "$step" = link ] && echo built >> "$BUILDS"
cp "$LIBRARY" "$out"
"""
LOAD = "import torch; from lbllm import kernels; print(kernels.ready(), hasattr(torch.ops.lbllm, 'packed_linear'))"


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with a line for each library that was built; the compiler is ``COMPILER``."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    assert kernels.ready()
    monkeypatch.setenv("LIBRARY", str(kernels.build(home() / "kernels", kernels.instruction_set())))
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path / "builds"


def started_build(folder: Path) -> int:
    """The id of a child process that builds."""
    child = os.fork()
    if child == 0:
        try:
            kernels.build(folder, "portable")
            os._exit(0)
        finally:
            os._exit(1)
    return child


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut to half": cut,
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "text": lambda path: path.write_text("no library"),
    "deleted": Path.unlink,
    "a hash that is damaged": lambda path: flip(path.with_name(f"{path.name}.sha256")),
    "a hash that is no text": lambda path: path.with_name(f"{path.name}.sha256").write_bytes(b"\xff"),
    "no hash": lambda path: path.with_name(f"{path.name}.sha256").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(builds: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "kernels"
    library = kernels.build(folder, "portable")
    whole, names = library.read_bytes(), kept(folder)
    assert kernels.build(folder, "portable") == library
    assert builds.read_text().split() == ["built"]
    DAMAGES[damage](library)
    assert kernels.build(folder, "portable") == library
    assert library.read_bytes() == whole
    assert kept(folder) == names
    assert builds.read_text().split() == ["built"] * 2


def test_a_process_never_loads_a_damaged_library(builds: Path, tmp_path: Path) -> None:
    library = kernels.build(tmp_path / "kernels", kernels.instruction_set())
    cut(library)
    environment = os.environ | {"LBLLM_HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout.split()) == (0, ["True", "True"])
    assert builds.read_text().split() == ["built"] * 2


@pytest.mark.parametrize("step", ["compile", "link"])
@pytest.mark.usefixtures("builds")
def test_a_build_that_is_killed_leaves_nothing_for_the_next(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "operators-old-0123.tmp").touch()  # as earlier versions left it
    monkeypatch.setenv("KILLED_AT", step)
    assert os.waitpid(started_build(folder), 0)[1] == signal.SIGKILL
    monkeypatch.delenv("KILLED_AT")
    assert not list(folder.glob("*.so"))
    assert list(folder.glob(".operators-*.new"))
    library = kernels.build(folder, "portable")
    assert kept(folder) == sorted(["lock", library.name, f"{library.name}.sha256"])


def test_of_two_processes_at_once_one_builds(builds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert [os.waitpid(child, 0)[1] for child in [started_build(folder) for _ in range(2)]] == [0, 0]
    assert builds.read_text().split() == ["built"]


@pytest.mark.usefixtures("builds")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file")
    with pytest.raises(kernels.BuildError, match=r"can't be kept in .*kernels \(.*set LBLLM_HOME"):
        kernels.build(tmp_path / "kernels", "portable")


def test_a_folder_that_can_only_be_read_serves_and_one_that_cannot_be_read_is_named(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = kernels.build(tmp_path / "kernels", "portable")

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(kernels, "locked", refuse)
    assert kernels.build(tmp_path / "kernels", "portable") == library
    monkeypatch.setattr(kernels, "file_sha256", refuse)
    with pytest.raises(kernels.BuildError, match=r"can't be kept in .*kernels \(.*Permission.*set LBLLM_HOME"):
        kernels.build(tmp_path / "kernels", "portable")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'no such flag' >&2; exit 3", r"failed: no such flag\. Set CXX"),
        ("exit 3", r"failed: exit code 3, without a message"),
        ("exit 0", r"failed: exit code 0, without a message"),
        ("kill -9 $$", r"failed: exit code -9"),
    ],
)
@pytest.mark.usefixtures("builds")
def test_a_compiler_that_fails_is_named(tmp_path: Path, script: str, words: str) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(kernels.BuildError, match=f"the compiler {compiler} {words}"):
        kernels.build(tmp_path / "kernels", "portable")
    compiler.write_text("#!/no/such/shell\n")
    with pytest.raises(kernels.BuildError, match=f"the compiler {compiler} can't be run"):
        kernels.build(tmp_path / "kernels", "portable")
    assert kept(tmp_path / "kernels") == ["lock"]
