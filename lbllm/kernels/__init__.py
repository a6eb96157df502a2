"""Kernels that compute from packed bits. Those for the CPU are C++, compiled for this machine at first use.

    ready()     loads the library and compiles it first if necessary; False, with one warning, if that fails

Those for GPUs are in lbllm.kernels.gpu; lbllm.quant.gpu_trial tries them on this machine.

The operators, for example packed_linear, are in torch.ops.lbllm once ready() has returned True; operators.h lists them.
The system's C++ compiler (CXX, else c++, g++ or clang++) builds the library for the widest instruction set that PyTorch
finds (AVX-512, AVX2, or portable code). The library is kept in LBLLM_HOME/kernels under a name with the hash of
everything that it depends on, with its own hash beside it: a damaged library would end the process that loads it, so it
is built anew. Without a compiler the layers compute in PyTorch, slowly, with the same results.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch.utils import cpp_extension

from lbllm.errors import LbllmError
from lbllm.files import file_sha256, locked, new_file, write_file
from lbllm.places import home

# Every .cpp is a translation unit of its own.
SOURCES = tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h")))
InstructionSet = Literal["avx512", "avx2", "portable"]
_FLAGS: dict[InstructionSet, tuple[str, ...]] = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
# The quantizer must round exactly as PyTorch does, so the compiler may not fuse a product and a sum.
_ALWAYS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)


class BuildError(LbllmError):
    """There is no compiler, it failed, or the library can't be read or written. The message has the way out."""


_OTHER_COMPILER = "Set CXX to a C++20 compiler that works and start again"
Result = TypeVar("Result")


class Once(Generic[Result]):
    """A function without parameters that works at its first call. Threads may call it at once; one does the work."""

    def __init__(self, work: Callable[[], Result]) -> None:
        functools.update_wrapper(self, work)
        self._work, self._lock = work, threading.RLock()
        self._results: list[Result] = []

    def __call__(self) -> Result:
        """Return the result."""
        results = self._results
        if not results:
            with self._lock:
                if not results:
                    results.append(self._work())
        return results[0]

    def cache_clear(self) -> None:
        """Let the next call work anew."""
        self._results = []


def instruction_set() -> InstructionSet:
    """The widest instruction set of this processor, or the one in LBLLM_KERNELS."""
    named = os.environ.get("LBLLM_KERNELS", "")
    if named in get_args(InstructionSet):
        return named  # type: ignore[return-value]
    found = torch.backends.cpu.get_cpu_capability()
    return "avx512" if found == "AVX512" else "avx2" if found == "AVX2" else "portable"


def find_compiler() -> str | None:
    """The path of the system's C++ compiler: CXX, else c++, g++ or clang++."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def build(folder: Path, instructions: InstructionSet) -> Path:
    """The library for these instructions in ``folder``; compiles it if it is missing. Raises BuildError."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler was found (CXX, c++, g++ or clang++). Install a C++ compiler (g++) and start again"
        )
    # PyTorch runs its threads with GCC's OpenMP runtime. With another compiler there would be a second runtime.
    threads = ["-fopenmp"] if sys.platform == "linux" and "clang" not in Path(compiler).resolve().name else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [*_ALWAYS, *_FLAGS[instructions], *threads, abi]
    library = folder / f"operators-{instructions}-{_key(SOURCES, flags, torch.__version__, compiler)}.so"
    if _is_whole(library):
        return library
    try:
        with locked(folder / "lock"):  # of several processes at once one compiles
            if not _is_whole(library):
                _remove_leftovers(folder)
                with new_file(library) as made:
                    _compile(compiler, flags, made)
                    digest = file_sha256(made)
                write_file(_digest_file(library), digest.encode())
    except OSError as error:
        raise BuildError(
            f"the compiled kernels can't be kept in {folder} ({error}). Make the folder writable, or set LBLLM_HOME to "
            "a folder that is"
        ) from error
    return library


def _is_whole(library: Path) -> bool:
    """Whether the library is the file that was built."""
    try:
        return file_sha256(library) == _digest_file(library).read_text()
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _remove_leftovers(folder: Path) -> None:
    """Remove what builds that were killed left, also of other versions. The caller holds the folder's lock."""
    for left in (*folder.glob(".operators-*.new"), *folder.glob("operators-*.tmp")):
        shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            left.unlink()


def _key(sources: Iterable[Path], *others: object) -> str:
    """The hash of the files' names and contents and of ``others``."""
    parts = [(source.name, source.read_bytes()) for source in sources]
    return hashlib.sha256(repr((parts, others)).encode()).hexdigest()[:16]


def _compile(compiler: str, flags: Sequence[str], library: Path) -> Path:
    """Compile the units in parallel, one per core, and link them to ``library``. Raises BuildError."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    places = [f"-L{path}" for path in cpp_extension.library_paths()]
    units = [source for source in SOURCES if source.suffix == ".cpp"]
    objects = [str(library.with_name(f"{unit.stem}.o")) for unit in units]
    commands = [
        [compiler, *flags, *includes, "-c", str(unit), "-o", made] for unit, made in zip(units, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    _run([compiler, *flags, "-shared", *objects, "-o", str(library), *places, "-lc10", "-ltorch_cpu"])
    return library


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the compiler {command[0]} can't be run ({error}). {_OTHER_COMPILER}") from error
    made = Path(command[command.index("-o") + 1])
    if result.returncode != 0 or not made.is_file():
        said = result.stderr.strip()[-600:] or f"exit code {result.returncode}, without a message"
        raise BuildError(f"the compiler {command[0]} failed: {said}. {_OTHER_COMPILER}")


@Once
def ready() -> bool:
    """Whether torch.ops.lbllm can be used. Compiles the library if it is missing; warns once if that fails."""
    if os.environ.get("LBLLM_KERNELS") == "none":
        return False
    try:
        library = build(home() / "kernels", instruction_set())
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise BuildError(
                f"{library}, which the compiler made, can't be loaded ({error}). Delete it. {_OTHER_COMPILER}"
            ) from error
    except BuildError as error:
        warnings.warn(f"packed layers compute in PyTorch, slowly: {error}", stacklevel=4)
        return False
    return True
