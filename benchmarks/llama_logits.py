"""Logits of a GGUF file in llama.cpp, by the functions of a prebuilt libllama.

    python -m benchmarks.llama_logits LIBLLAMA MODEL.gguf IDS.npy LOGITS.npy
    python -m benchmarks.llama_logits LIBLLAMA MODEL.gguf IDS.npy --perplexity
    python -m benchmarks.llama_logits LIBLLAMA MODEL.gguf TEXTS.json IDS.json --tokenize

IDS.npy: int32 (windows, T), each window a text of its own. The logits are float32 (windows, T, vocabulary). With
--perplexity two numbers are printed as JSON: the summed negative log-likelihood of the tokens after the first of each
window, in nats, and their number. With --tokenize the texts' token ids are written, special tokens in a text read as
such. A process of its own, because the library ends the process where it fails.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _ModelOptions(ctypes.Structure):
    """``llama_model_params`` as the library fills it: more bytes than any version has."""

    _fields_ = (("all", ctypes.c_uint8 * 512),)


class _ContextOptions(ctypes.Structure):
    """The beginning of ``llama_context_params``; ``rest`` is more than what any version has."""

    _fields_ = (
        ("context", ctypes.c_uint32),
        ("batch", ctypes.c_uint32),
        ("computed", ctypes.c_uint32),
        ("sequences", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 512),
    )


class _Batch(ctypes.Structure):
    """``llama_batch``; the pointers that are null leave positions and the sequence to the library."""

    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("sequence_counts", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_ERROR = 4  # of ggml's levels of messages


def _log_errors(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaFile:
    """A GGUF file, loaded. Raises RuntimeError if llama.cpp can't read it."""

    def __init__(self, library: Path, file: Path, threads: int) -> None:
        self.llama: Any = ctypes.CDLL(str(library))
        self.log = _Log(_log_errors)  # kept: the library calls it later
        self.llama.llama_log_set(self.log, None)
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
            getattr(self.llama, name).restype = ctypes.c_void_p
        for name in ("llama_get_memory", "llama_get_logits"):
            getattr(self.llama, name).restype = ctypes.c_void_p
        self.llama.llama_model_default_params.restype = _ModelOptions
        self.llama.llama_context_default_params.restype = _ContextOptions
        # The parts of the library that compute lie beside it, one for each kind of processor.
        backends: Any = ctypes.CDLL(str(next(library.parent.glob("libggml.*so"))))
        backends.ggml_backend_load_all_from_path(str(library.parent).encode())
        self.llama.llama_backend_init()
        options = self.llama.llama_model_default_params()
        self.threads = threads
        self.model = ctypes.c_void_p(self.llama.llama_model_load_from_file(str(file).encode(), options))
        if not self.model:
            raise RuntimeError(f"llama.cpp can't read {file}")
        self.vocab = ctypes.c_void_p(self.llama.llama_model_get_vocab(self.model))
        self.rows = int(self.llama.llama_vocab_n_tokens(self.vocab))

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text's tokens, with those that llama.cpp adds."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = self.llama.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, True)
        if count < 0:
            raise RuntimeError(f"llama.cpp can't split {text[:40]!r}")
        return list(ids[:count])

    def logits(self, windows: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        """The logits (T, vocabulary) of each window (T,) of (windows, T)."""
        length = windows.shape[1]
        options = self.llama.llama_context_default_params()
        options.context = options.batch = options.computed = max(length, 32)
        options.sequences = 1
        context = ctypes.c_void_p(self.llama.llama_init_from_model(self.model, options))
        if not context:
            raise RuntimeError(f"llama.cpp has no context of {length} tokens for this file")
        self.llama.llama_set_n_threads(context, self.threads, self.threads)
        wanted = np.ones(length, np.int8)
        memory = ctypes.c_void_p(self.llama.llama_get_memory(context))
        for window in windows:
            ids = np.ascontiguousarray(window, np.int32)
            self.llama.llama_memory_clear(memory, True)
            batch = _Batch(tokens=length, token=ids.ctypes.data, wanted=wanted.ctypes.data)
            status = self.llama.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama.cpp could not compute a window: status {status}")
            found = ctypes.cast(self.llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
            yield np.ctypeslib.as_array(found, (length, self.rows)).copy()
        self.llama.llama_free(context)


def negative_log_likelihood(logits: NDArray[np.float32], window: NDArray[np.int32]) -> float:
    """The summed negative log-likelihood, in nats, of a window's tokens (T,) after the first, in float64."""
    wide = logits[:-1].astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normal = np.log(np.exp(wide).sum(-1))
    return float((normal - wide[np.arange(len(wide)), window[1:]]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("library", "file", "given"):
        parser.add_argument(name, type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--tokenize", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    try:
        model = LlamaFile(asked.library, asked.file, asked.threads)
        if asked.tokenize:
            texts = json.loads(asked.given.read_bytes())
            asked.out.write_text(json.dumps([model.tokenize(text) for text in texts]))
            return
        windows = np.load(asked.given)
        if asked.perplexity:
            pairs = zip(model.logits(windows), windows, strict=True)
            total = sum(negative_log_likelihood(logits, window) for logits, window in pairs)
            print(json.dumps([total, windows[:, 1:].size]))
        else:
            np.save(asked.out, np.stack(list(model.logits(windows))))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
