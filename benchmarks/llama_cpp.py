"""Programs that run llama.cpp through node-llama-cpp, which npm has installed in a folder."""

from __future__ import annotations

from pathlib import Path

import torch


def llama_cpp_command(script: str, modules: str, gguf: Path, *numbers: int) -> list[str]:
    """The command that runs a script of this folder over a GGUF file, on as many threads as torch has. ``modules``: the
    folder with node-llama-cpp; ``numbers``: what the script takes besides."""
    path = Path(__file__).with_name(script)
    counts = [str(number) for number in (torch.get_num_threads(), *numbers)]
    return ["node", str(path), str(Path(modules).resolve()), str(gguf), *counts]
