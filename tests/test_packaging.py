"""The wheel: built from a copy of the checkout, installed into an empty folder, used from somewhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

from lbllm.extras import MODULES
from tests.helpers import ROOT

SOURCES = ("lbllm", "app", "assets")
# Where the wheel has what lies in these folders of the checkout.
PLACES = {"lbllm": "lbllm", "app": "lbllm/_bundle/app", "assets": "lbllm/_bundle/assets"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a connection by the hatchling that is here; in a copy, as a build leaves folders behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel))
    return target


def pip(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def run(installed: Path, elsewhere: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """The command, run in an unrelated folder with the installed program alone on the path."""
    environment = os.environ | {"PYTHONPATH": str(installed), "LBLLM_HOME": str(elsewhere / "home")}
    environment |= {"PATH": os.pathsep.join([str(installed / "bin"), environment["PATH"]])}
    environment |= {"PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_the_wheel_has_every_file_of_the_program_and_no_other_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{PLACES[folder]}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder in SOURCES
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == expected


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        licences = {PurePosixPath(name).name for name in archive.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_lock_has_a_version_in_the_range_of_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = (*project["dependencies"], *(line for name, lines in extras.items() if name != "all" for line in lines))
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    ranges = {one.name: one.specifier for one in map(Requirement, lines)}
    assert pins.keys() == ranges.keys()
    assert [name for name, pin in pins.items() if pin not in ranges[name]] == []


def test_each_extra_brings_the_modules_that_are_looked_for_in_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() == {*MODULES, "all"}
    names = {"lm-eval": "lm_eval", "protobuf": "google"}
    for extra, modules in MODULES.items():
        assert {names.get(one.name, one.name) for one in map(Requirement, extras[extra])} == set(modules)


def test_the_installed_command_helps_without_waiting_for_torch(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, "lbllm", "--help")
    assert "quantize" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "lbllm.commands.main" in imported
    assert "torch" not in imported


def test_the_installed_program_finds_its_own_files(installed: Path, tmp_path: Path) -> None:
    # One process for all: most of its time goes into importing torch.
    program = """
import json, sys
from lbllm import kernels, places
from lbllm.commands import main
from lbllm.share import space
from lbllm.texts import prompts
assert main.main(["corpora", "--json"]) == 0
sys.path.insert(0, str(places.BUNDLE))
from app.view import THEME
files = [places.APP / "workbench.py", THEME / "theme.toml", places.ASSETS / "checkpoint" / "packed.safetensors"]
files += space._licence_files()
assert [file.name for file in files[-2:]] == ["LICENSE", "NOTICE"]
found = {"files": list(map(str, [*files, *kernels.SOURCES])), "prompts": len(prompts.example_prompts())}
print(json.dumps(found | {"space": space._requirements()}))
"""
    lines = run(installed, tmp_path, sys.executable, "-c", program).stdout.splitlines()
    embedded = json.loads("".join(lines[:-1]))["corpora"][0]
    found = json.loads(lines[-1])
    assert embedded["id"] == "embedded"
    for file in map(Path, [embedded["location"], *found["files"]]):
        assert file.is_file()
        assert file.is_relative_to(installed), file
    assert found["prompts"] > 0
    # The versions that are installed here are those of the lock.
    assert set(found["space"]) < set((ROOT / "requirements.txt").read_text().split())
