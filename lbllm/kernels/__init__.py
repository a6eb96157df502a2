"""Kernels that compute from packed bits: C++ for the CPU, compiled for this machine at first use and kept.

    ready()             compiles if need be, loads; False where it can't, which is then said once
    packed_linear(...)  and the other operators: torch.ops.lbllm
    on_gpu()            the module of Triton kernels, None where they can't be used, which is then said once

The library is built by the system's C++ compiler (CXX, else c++ or g++ or clang++) for the widest of the instruction
sets that PyTorch finds (AVX-512, AVX2, or portable code) and lies under LBLLM_HOME/kernels, named by the hash of
everything that it depends on. Without a compiler the layers compute in PyTorch, slowly: the results are the same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch
from torch.utils import cpp_extension

from lbllm.errors import LbllmError
from lbllm.files import locked, new_file

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("operators.cpp", "packed.h", "lookup.h", "attention.h", "team.h", "divergence.h")
)
InstructionSet = Literal["avx512", "avx2", "portable"]
_FLAGS: dict[InstructionSet, tuple[str, ...]] = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
# The quantizer has to round where PyTorch does, so a product and a sum stay two operations.
_ALWAYS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)


class BuildError(LbllmError):
    """There is no compiler, or it failed."""


def instruction_set() -> InstructionSet:
    """The widest set that this processor has, or the one that LBLLM_KERNELS names."""
    named = os.environ.get("LBLLM_KERNELS", "")
    if named in get_args(InstructionSet):
        return named  # type: ignore[return-value]
    found = torch.backends.cpu.get_cpu_capability()
    return "avx512" if found == "AVX512" else "avx2" if found == "AVX2" else "portable"


def build(folder: Path, instructions: InstructionSet) -> Path:
    """The library for these instructions in ``folder``, compiled if it isn't there yet. Raises BuildError."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise BuildError("no C++ compiler was found (CXX, c++, g++ or clang++)")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    # PyTorch's loops over threads are OpenMP's, by GCC's runtime; another compiler's would be a second one beside it.
    threads = ["-fopenmp"] if sys.platform == "linux" and "clang" not in Path(compiler).resolve().name else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [*_ALWAYS, *_FLAGS[instructions], *threads, abi]
    text = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(text + repr((flags, torch.__version__, compiler)).encode()).hexdigest()[:16]
    library = folder / f"operators-{instructions}-{key}.so"
    if library.exists():
        return library
    try:
        with locked(folder / "lock"):  # of several processes at once one compiles
            if library.exists():
                return library
            with new_file(library) as made:
                command = [
                    compiler,
                    *flags,
                    *includes,
                    str(SOURCES[0]),
                    "-o",
                    str(made),
                    *libraries,
                    "-lc10",
                    "-ltorch_cpu",
                ]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode != 0:
                    raise BuildError(f"{compiler} failed: {result.stderr.strip()[-600:]}")
    except OSError as error:
        raise BuildError(f"{folder} can't be written ({error})") from error
    return library


@functools.cache
def ready() -> bool:
    """Whether torch.ops.lbllm can be used; compiles it first where that was never done. Warns once where it can't."""
    from lbllm.places import home

    if os.environ.get("LBLLM_KERNELS") == "none":
        return False
    try:
        torch.ops.load_library(str(build(home() / "kernels", instruction_set())))
    except (BuildError, OSError) as error:
        warnings.warn(
            f"packed layers compute in PyTorch, slowly: {error}. Install a C++ compiler (g++) and start again",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def on_gpu() -> ModuleType | None:
    """``lbllm.kernels.gpu`` where it works on this machine's GPU, tried once; warns once where it doesn't."""
    if os.environ.get("LBLLM_KERNELS") == "none" or not torch.cuda.is_available():
        return None
    try:
        from lbllm.kernels import gpu

        reason = None if gpu.works() else "Triton's results are wrong"
    except Exception as error:  # whatever a driver or a compiler of this machine stumbles over
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return gpu
    warnings.warn(f"packed layers compute on the GPU in PyTorch, slowly: {reason}", stacklevel=2)
    return None
