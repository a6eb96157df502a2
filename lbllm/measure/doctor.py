"""Check the installation: versions, machine, compiler, kernels, disk, stored files.

    for check in checks():
        print(check.section, check.name, check.state, check.value, check.advice)

Every check is made when the iterator reaches it. A check that fails in an unforeseen way is a fault with the error as
its value, and the others go on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement
from torch import Tensor

from lbllm import kernels
from lbllm.checkpoints import shipped
from lbllm.checkpoints.hf import is_checkpoint
from lbllm.errors import LbllmError
from lbllm.extras import MODULES, Extra, installation
from lbllm.machine import free_memory, has_bfloat16
from lbllm.models.gguf import CONVERSION, is_whole
from lbllm.models.source import embedded_file
from lbllm.places import ASSETS, BUNDLE, data_dir, home, root
from lbllm.quant.gpu_trial import faults as gpu_faults
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.repair import is_damaged
from lbllm.runs.store import ACTIVE, RunStore
from lbllm.sections import LayerFormat
from lbllm.texts.catalogue import TEXTS, location
from lbllm.units import size

State = Literal["ok", "note", "fault"]
# Of the sum of absolute products of one output, in float32.
TOLERANCE = 1e-5
# What a conversion of the embedded model, a compiled library and a short run need together.
ENOUGH_DISK = 2 * 10**9
_VARIABLES = ("LBLLM_", "OMP_", "MKL_", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "CXX", "TRITON_INTERPRET")
# One layer for each path through the kernels: words and tables, one to three planes, all widths of the parameters.
_FORMATS = (
    LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=16),
    LayerFormat(format="w1+1", group_size=16, param_bits=4, act_bits=4, act_group_size=64),
    LayerFormat(format="w1+1", group_size=64, param_bits=16, act_bits=4),
    LayerFormat(format="w1", group_size=32, param_bits=8, act_bits=16),
    LayerFormat(format="w1+1+1", group_size=64, param_bits=4, act_bits=4, act_group_size=64),
)


@dataclass(frozen=True)
class Check:
    """One line of the report. ``advice`` is what to do about a note or a fault."""

    section: str
    name: str
    state: State
    value: str
    advice: str = ""


def checks() -> Iterator[Check]:
    """All checks, in the order of the report."""
    sections: tuple[tuple[str, Callable[[], Iterator[tuple[str, State, str, str]]]], ...] = (
        ("program", _program),
        ("machine", _machine),
        ("kernels", _kernels),
        ("disk", _disk),
        ("models", _models),
        ("texts", _texts),
        ("runs", _runs),
    )
    for section, made in sections:
        try:
            for name, state, value, advice in made():
                yield Check(section, name, state, _short(value), _short(advice))
        except Exception as error:  # the report is needed most where something is broken
            yield Check(section, section, "fault", _short(f"{type(error).__name__}: {error}"))


Lines = Iterator[tuple[str, State, str, str]]


def _short(text: str) -> str:
    """``text`` without the name of the user's folder, which a report should not carry."""
    return text.replace(str(Path.home()), "~") if len(Path.home().parts) > 1 else text


def _program() -> Lines:
    kind = "checkout" if (BUNDLE / "pyproject.toml").is_file() else "installed package"
    yield "lbllm", "ok", f"{_version()}, {kind}", ""
    yield "python", "ok", f"{platform.python_version()} on {platform.platform()}", ""
    for requirement, name in _requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if name is None:
                yield requirement.name, "fault", "not installed", f"pip install '{requirement}'"
            else:
                yield requirement.name, "note", "not installed", installation(name)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wanted = f"the program needs {requirement}: pip install '{requirement}'"
        yield requirement.name, "ok" if fits else "fault", version, "" if fits else wanted
    for variable in sorted(os.environ):
        if variable.startswith(_VARIABLES):
            yield variable, "ok", os.environ[variable], ""


def _version() -> str:
    project = BUNDLE / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return metadata.version("lbllm")


def _requirements() -> Iterator[tuple[Requirement, Extra | None]]:
    """What the program requires, each with the extra that brings it."""
    project = BUNDLE / "pyproject.toml"
    if project.is_file():
        stated = tomllib.loads(project.read_text())["project"]
        for text in stated["dependencies"]:
            yield Requirement(text), None
        for extra in MODULES:
            for text in stated["optional-dependencies"][extra]:
                yield Requirement(text), extra
        return
    for text in metadata.requires("lbllm") or ():
        requirement = Requirement(text)
        if requirement.marker is None:
            yield requirement, None
            continue
        for extra in MODULES:
            if requirement.marker.evaluate({"extra": extra}):
                yield requirement, extra


def _machine() -> Lines:
    yield "processor", "ok", processor(), ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores, threads of torch", "ok", f"{cores}, {torch.get_num_threads()}", ""
    yield "memory, free", "ok", f"{size(psutil.virtual_memory().total)}, {size(free_memory('cpu'))}", ""
    yield "bfloat16 products", "ok", "yes" if has_bfloat16() else "no", ""
    if not torch.cuda.is_available():
        yield "GPU", "ok", "none that torch can use", ""
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", "ok", f"{found.name}, {size(found.total_memory)}, CUDA {torch.version.cuda}", ""


def processor() -> str:
    """The processor's name; /proc/cpuinfo has it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _kernels() -> Lines:
    compiler = kernels.find_compiler()
    if compiler is None:
        yield "compiler", "note", "not found", "install a C++ compiler, for example g++; packed layers are slow without"
    else:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        first = (told.stdout.splitlines() or [f"exit code {told.returncode}"])[0]
        yield "compiler", "ok" if told.returncode == 0 else "fault", f"{compiler}: {first}", ""
    yield "instruction set", "ok", kernels.instruction_set(), ""
    try:
        library = kernels.build(home() / "kernels", kernels.instruction_set())
        loaded = kernels.ready()
        why = "LBLLM_KERNELS is none" if os.environ.get("LBLLM_KERNELS") == "none" else "it can't be loaded"
        digest = library.with_name(f"{library.name}.sha256").read_text()[:16]
        used = f"{library.name}, SHA-256 {digest}..., {'used' if loaded else f'not used: {why}'}"
        yield "library", "ok" if loaded else "note", used, ""
    except kernels.BuildError as error:
        yield "library", "note", "not built; PyTorch computes, slowly", str(error)
    for fmt in _FORMATS:
        yield _self_test(fmt, "cpu")
    if torch.cuda.is_available():
        yield from _triton()
        for fmt in _FORMATS:
            yield _self_test(fmt, "cuda")


def _triton() -> Lines:
    """The kernels for GPUs on each format that the presets use, and what failed."""
    if os.environ.get("LBLLM_KERNELS") == "none":
        yield "Triton", "note", "not used: LBLLM_KERNELS is none", ""
        return
    found = gpu_faults()
    yield "Triton", "note" if found else "ok", "not used; PyTorch computes, slowly" if found else "used", ""
    advice = "report it, with this list"
    yield from (("Triton fails", "note", fault, advice) for fault in found)


def _self_test(fmt: LayerFormat, device: str) -> tuple[str, State, str, str]:
    """Compare a random layer of this format with float64, for one token and for 40."""
    layer, generator = random_layer(fmt)
    weight = layer.dequantize().double()
    layer = layer.to(device)
    worst = 0.0
    for tokens in (1, 40):
        x = torch.randn(tokens, layer.in_features, generator=generator)
        quantized = x if layer.quantizer is None else layer.quantizer.to("cpu")(x)
        expected = quantized.double() @ weight.T
        whole = quantized.double().abs() @ weight.abs().T
        layer = layer.to(device)
        with torch.no_grad():
            found: Tensor = layer(x.to(device)).cpu().double()
        worst = max(worst, float(((found - expected).abs() / whole).max()))
    words = f"{fmt.format.upper()}, groups of {fmt.group_size}, {fmt.param_bits}-bit parameters, A{fmt.act_bits}"
    name = f"self-test on {device}: {words}"
    if worst <= TOLERANCE:
        return name, "ok", f"error {worst:.1e} of the sum of absolute products", ""
    advice = f"remove {home() / 'kernels'}, start again, and report it; LBLLM_KERNELS=none computes in PyTorch"
    return name, "fault", f"error {worst:.1e}, allowed {TOLERANCE:.0e}", advice


def random_layer(fmt: LayerFormat) -> tuple[PackedLinear, torch.Generator]:
    """A layer of 64 rows and 192 columns with random bits and parameters, and the generator that made it."""
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(192, 64, fmt, bias=False, tail=3, dtype=torch.float32)
    layer.weight = torch.randint(0, 256, layer.weight.shape, generator=generator, dtype=torch.uint8)
    if layer.params.dtype == torch.uint8:
        layer.params = torch.randint(0, 256, layer.params.shape, generator=generator, dtype=torch.uint8)
    else:
        layer.params = torch.randn(layer.params.shape, generator=generator).half()
    if layer.table is not None:
        layer.table = torch.randn(layer.table.shape, generator=generator).sort().values.half()
    for name in ("params_scale", "params_range"):
        if getattr(layer, name) is not None:
            setattr(layer, name, torch.rand(getattr(layer, name).shape, generator=generator).half())
    return layer, generator


def _disk() -> Lines:
    folder = next(path for path in (home(), *home().absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    advice = "free some space, or set LBLLM_HOME to a folder on another disk"
    writable = os.access(folder, os.W_OK)
    yield "home", "ok" if writable else "fault", str(home()), "" if writable else f"make it writable, or {advice}"
    enough = free >= ENOUGH_DISK
    yield "free there", "ok" if enough else "note", size(free), "" if enough else advice
    yield "folder of the pages", "ok", str(root()), ""


def _models() -> Lines:
    try:
        yield "embedded model", "ok", str(embedded_file()), ""
    except LbllmError as error:
        yield "embedded model", "note", "not found", str(error)
    yield "assets", "ok" if ASSETS.is_dir() else "fault", str(ASSETS), ""
    yield from _cached_models(home() / "models")


def _cached_models(folder: Path) -> Lines:
    """The converted and assembled models of the cache, each with its files' hashes checked."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.is_dir() or path.name.startswith("."):
            continue
        used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        packed = is_checkpoint(path)
        whole = shipped.is_whole(path) if packed else is_whole(path)
        old = not (whole or packed or path.name.endswith(f"-{CONVERSION}"))
        said = (
            "hashes are right" if whole else "of another version, not used" if old else "changed since it was written"
        )
        advice = "" if whole else f"delete {path}" if old else f"delete {path}; it is made anew when it is needed"
        yield path.name, "ok" if whole else "note" if old else "fault", f"{size(used)}, {said}", advice


def _texts() -> Lines:
    yield "LBLLM_DATA_DIR", "ok", str(data_dir() or "not set"), ""
    for entry in TEXTS:
        yield entry.id, "ok", location(entry), ""


def _runs() -> Lines:
    folder = home() / "runs"
    if not (folder / "runs.db").is_file():
        yield "run store", "ok", "no run yet", ""
        return
    if is_damaged(folder / "runs.db"):
        advice = "the next command that lists runs makes it anew from what can be read, and keeps the damaged file"
        yield "run store", "fault", f"{folder / 'runs.db'} is damaged", advice
        return
    yield "run store", "ok", str(folder / "runs.db"), ""
    states = [run.state for run in RunStore(folder).all()]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    yield "runs", "ok", counted or "none", ""
    yield "working now", "ok", str(sum(state in ACTIVE for state in states)), ""
