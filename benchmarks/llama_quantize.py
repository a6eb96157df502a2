"""Quantize a GGUF file with llama.cpp's own function, ``llama_model_quantize`` of a prebuilt libllama.

    python -m benchmarks.llama_quantize LIBLLAMA SOURCE.gguf TARGET.gguf TYPE [IMPORTANCE.safetensors]

TYPE is one of ``TYPES``. Rows whose length does not fit a type fall back as llama.cpp decides, as for its users. SOURCE
may be quantized itself. IMPORTANCE has a float32 vector (in) by the name of a tensor, the mean squared input of each
column; types of two bits and less need one. A process of its own, because the library ends the process where it fails.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

from safetensors.numpy import load_file

# The numbers of llama.h's enum llama_ftype.
TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "TQ1_0": 36,
    "TQ2_0": 37,
}


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Options(ctypes.Structure):
    """The beginning of ``llama_model_quantize_params``; ``rest`` is more than what later versions add."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("embedding_type", ctypes.c_int32),
        ("allow_requantize", ctypes.c_bool),
        ("flags", ctypes.c_bool * 5),
        ("importance", ctypes.POINTER(_Importance)),
        ("rest", ctypes.c_uint8 * 256),
    )


def library_in(modules: Path) -> Path:
    """The libllama that npm put into a folder with node-llama-cpp. Raises FileNotFoundError."""
    found = sorted(modules.glob("node_modules/@node-llama-cpp/*/bins/*/libllama.*so"))
    if not found:
        raise FileNotFoundError(2, "no libllama; npm must have installed node-llama-cpp there", str(modules))
    return found[0]


def quantize(library: Path, source: Path, target: Path, kind: str, importance: Path | None, threads: int) -> int:
    """Write ``target``; returns the library's status, 0 for success."""
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = _Options
    options: _Options = llama.llama_model_quantize_default_params()
    options.threads, options.type, options.allow_requantize = threads, TYPES[kind], True
    if importance is not None:
        vectors = load_file(importance)
        entries = (_Importance * (len(vectors) + 1))()
        for entry, (name, vector) in zip(entries, vectors.items(), strict=False):
            entry.name, entry.data, entry.size = name.encode(), vector.ctypes.data, vector.size
        options.importance = entries
    llama.llama_backend_init()
    status: int = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("library", "source", "target"):
        parser.add_argument(name, type=Path)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("importance", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    status = quantize(given.library, given.source, given.target, given.type, given.importance, given.threads)
    if status:
        raise SystemExit(f"llama.cpp could not make {given.type}: status {status}")


if __name__ == "__main__":
    main()
