"""Compare the decoding speed of whole models in one run: ``python -m benchmarks.decode CHECKPOINT``.

The teacher in transformers with float32 and bfloat16 weights, and the packed checkpoint as it is and with its
activations and KV cache left alone (A16), each in its own process and in turn, several rounds: greedy decoding of 128
tokens after a prompt of 64, the end of the text ignored. Printed are medians over the rounds: tokens per second after
the first, time to the first token, and the process's resident memory after decoding, beside that of a process with only
the libraries.

With ``--llama-cpp FOLDER`` the embedded model's GGUF file runs in llama.cpp as well, on as many threads. Into FOLDER

    npm install --ignore-scripts --omit=optional node-llama-cpp @node-llama-cpp/linux-x64

puts a prebuilt one; node is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message
from benchmarks.llama_cpp import llama_cpp_command
from benchmarks.report import settings_of, write_report
from lbllm.config import DEFAULT_MODEL

PROMPT, TOKENS = 64, 128


def measure(kind: str, model: str) -> dict[str, float]:
    """One model in this process."""
    import gc

    import psutil
    import torch
    from transformers import LogitsProcessor
    from transformers.generation.streamers import BaseStreamer

    from lbllm.checkpoints.find import find_checkpoint, open_teacher
    from lbllm.checkpoints.hf import load

    libraries = psutil.Process().memory_info().rss

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    network: Any
    if kind.startswith("packed"):
        network, _ = load(find_checkpoint(model).folder, activations=kind != "packed16")
    else:
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        network = open_teacher(model, dtype=dtype).model
    ids = torch.arange(1000, 1000 + PROMPT)[None] % network.config.vocab_size

    class NoEnd(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, network.generation_config.eos_token_id] = -float("inf")
            return scores

    def answer(tokens: int) -> tuple[float, list[float]]:
        clock = Clock()
        began = time.perf_counter()
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "logits_processor": [NoEnd()]}
        network.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        return began, clock.times[1:]  # the first is the prompt

    answer(8)
    began, times = answer(TOKENS)
    gc.collect()
    return {
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "first_token": times[0] - began,
        "memory": psutil.Process().memory_info().rss,
        "libraries": libraries,
    }


def check_names(checkpoint: str, teacher: str) -> Path:
    """The checkpoint's folder. Raises LbllmError if a name leads nowhere, before anything is measured."""
    from lbllm.checkpoints.find import find_checkpoint, find_teacher

    find_teacher(teacher)
    return find_checkpoint(checkpoint).folder


def llama_cpp(folder: str) -> list[str]:
    """The command that measures the embedded model's file in llama.cpp."""
    from lbllm.models.source import embedded_file

    return llama_cpp_command("llama_cpp.mjs", folder, embedded_file(), PROMPT, TOKENS)


def row(label: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """A model's medians over the rounds, rounded to their precision."""
    rate, first, memory, libraries = (
        statistics.median(one[key] for one in rounds)
        for key in ("tokens_per_second", "first_token", "memory", "libraries")
    )
    sizes = {"resident_mb": round(memory / 1e6), "model_mb": round((memory - libraries) / 1e6)}
    return {"label": label, "tokens_per_second": rate, "first_token_ms": round(1e3 * first)} | sizes


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", help="packed: its folder, a finished run's id, or shipped")
    parser.add_argument("--teacher", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="where npm has installed node-llama-cpp")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        name = arguments.checkpoint if arguments.kind.startswith("packed") else arguments.teacher
        print(json.dumps(measure(arguments.kind, name)))
        return
    folder = check_names(arguments.checkpoint, arguments.teacher)
    kinds = {"fp32": "transformers, float32", "bf16": "transformers, bfloat16"}
    kinds |= {"packed16": "packed, A16", "packed": "packed, as it was trained"}
    if arguments.llama_cpp:
        kinds["llama.cpp"] = "llama.cpp, Q4_1"
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], "--kind", kind]
            if kind == "llama.cpp":
                command = llama_cpp(arguments.llama_cpp)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{kinds[kind]}: {done.stderr.strip()}")
            results[kind].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{arguments.rounds} rounds, {date.today()}")
    rows = [row(label, results[kind]) for kind, label in kinds.items()]
    rounded = ("first_token_ms", "resident_mb", "model_mb")
    cells = [[one["label"], f"{one['tokens_per_second']:.1f}", *(str(one[key]) for key in rounded)] for one in rows]
    print(markdown.table(["", "tokens/s", "first token, ms", "resident, MB", "of that model, MB"], cells))
    if arguments.out:
        from lbllm.checkpoints.weights import weights_bytes

        rows[list(kinds).index("packed")]["disk_mb"] = weights_bytes(folder) / 1e6
        shape = {"prompt": PROMPT, "tokens": TOKENS, "triton": importlib.util.find_spec("triton") is not None}
        write_report(arguments.out, "decode", settings_of(arguments, "kind") | shape, rows)


if __name__ == "__main__":
    main()
