"""The file in which a benchmark keeps its figures: what ``--out FILE.json`` writes.

``docs/results`` holds such files; ``benchmarks.tables`` renders the pages of the results from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lbllm.files import write_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "lbllm")
# Flags of /proc/cpuinfo that decide how fast the products are, and their usual names.
INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bfloat16 products", "asimd": "NEON"}


class Report(BaseModel):
    """One run of a benchmark.

    ``command`` makes the rows again. ``commit`` is the one of the code that measured, or, where ``origin`` is
    "transcribed", the one that first stated the rows. None is what is not known. ``rows`` are flat; shares are
    between 0 and 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal[1] = Field(alias="schema")
    benchmark: str
    command: str
    commit: str | None
    date: date
    machine: str
    threads: int | None
    versions: dict[str, str | None]
    settings: dict[str, Any]
    origin: Literal["measured", "transcribed"]
    rows: list[dict[str, str | float | int | bool | None]]


def add_out(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option ``--out FILE.json``; its value is ``out``, a Path or None."""
    parser.add_argument("--out", type=_out_path, metavar="FILE.json", help="also write the figures to this file")


def _out_path(text: str) -> Path:
    """The path of a file to write. Raises ArgumentTypeError, so that a wrong one is told before hours of work."""
    path = Path(text)
    if path.suffix != ".json" or not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: give a file that ends in .json, in a folder that exists")
    return path


def figure(label: str, value: float, unit: str = "") -> dict[str, Any]:
    """The row of a benchmark whose rows are single figures; ``value`` is rounded as it is to be shown."""
    return {"label": label, "value": value, "unit": unit}


def settings_of(arguments: argparse.Namespace, *others: str) -> dict[str, Any]:
    """The arguments as settings, without ``out`` and without ``others``."""
    return {name: value for name, value in vars(arguments).items() if name not in ("out", *others)}


def write_report(
    path: Path,
    benchmark: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    threads: int | None = None,
) -> None:
    """Write the file of a run of this process atomically; ``benchmark`` is the module's name,
    ``threads`` how many computed, by default as many as torch uses.

    NaN becomes null, infinity the string "inf" or "-inf". Raises OSError.
    """
    content = {
        "schema": 1,
        "benchmark": benchmark,
        "command": command(benchmark, sys.argv[1:]),
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": threads or torch.get_num_threads(),
        "versions": versions(),
        "settings": dict(settings),
        "origin": "measured",
        "rows": [dict(row) for row in rows],
    }
    text = json.dumps(plain(content), ensure_ascii=False, indent=1, allow_nan=False)
    write_file(path, f"{text}\n".encode())


def read_report(path: Path) -> Report:
    """The file's content. Raises OSError, or ValueError with the file's name if it has another format."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from None


def plain(value: Any) -> Any:
    """The value as JSON can have it: mappings, lists, strings, finite numbers, null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def command(benchmark: str, arguments: list[str]) -> str:
    """The command that makes the figures again, without the path of the output file."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *kept])


def commit() -> str | None:
    """The short hash of the code, with "-dirty" where a file differs from it; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """The processor, its cores that this process may use, its instruction sets, and the GPU if there is one."""
    told: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            told[name.strip()] = value.strip()
    processor = told.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in told:
        # Cloud machines give several generations the same name.
        processor += f" (family {told['cpu family']} model {told.get('model', '?')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = told.get("flags", told.get("Features", "")).split()
    parts = [processor, f"{cores} cores", *(name for flag, name in INSTRUCTIONS.items() if flag in flags)]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that decide the figures; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
