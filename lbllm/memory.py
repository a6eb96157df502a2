"""The memory of this process: its peak, and the freed memory that glibc's allocator keeps."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path


def keep_large_allocations() -> None:
    """Make glibc reuse the freed memory of large tensors instead of returning it to the kernel.

    By default each tensor above 32 MB has its own mapping, whose pages the kernel clears again at every step. With
    reuse, matmuls with large outputs were measured 10 to 25% faster. No effect with other C libraries.
    """
    library = _glibc()
    if library is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, 2**31 - 1)


def trim() -> None:
    """Return unused memory to the kernel: after loading a model this is tens of megabytes.

    This covers freed memory, and the pages of mapped safetensors files: a file stays mapped after it is loaded, and
    every page that was copied from it counts as resident. If a tensor still uses a page, the kernel reads it again.
    Mappings that were written to are skipped, and all mappings on systems without /proc.
    """
    gc.collect()
    library, maps = _glibc(), Path("/proc/self/smaps")
    if library is None:
        return
    library.malloc_trim(0)
    if not maps.exists():
        return
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = end = 0
    for line in maps.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.split(" ", 1)[0].split("-") if line.endswith(".safetensors") else ("0", "0")
            start, end = (int(part, 16) for part in here)
        elif end and line.startswith("Private_Dirty:") and int(line.split()[1]) == 0:
            library.madvise(start, end - start, 4)  # MADV_DONTNEED


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
