"""Compare how much quality each method of quantization costs: ``python -m benchmarks.quality``.

    python -m benchmarks.quality --methods rtn,gptq,billm,arb,bwa,stage1 --group-sizes 64,128 --act-bits 16,4
    python -m benchmarks.quality --methods arb --checkpoint runs/mine --tasks piqa,arc_easy --task-limit 200
    python -m benchmarks.quality --methods rtn,hqq,auto-round --outside OUTSIDE

Every method quantizes all decoder blocks of the same teacher, in order, calibrated on the same tokens; each layer's
inputs have come through what was quantized before. ``stage1``, ``stage2`` and ``stage3`` are this program's own stages
on as many tokens each. Printed: stored bits per weight of the quantized layers, everything counted; perplexity on the
texts and accuracy in zero-shot tasks; the minutes that quantizing took, and the peak memory until it was done. With
``--act-bits 4`` the layers' inputs are in plain 4 bits (asymmetric, a range for each token, or for so many of its
inputs as ``--act-group-size`` says), with ``16,4`` there are columns of both; our stages and checkpoints have their own
bits and are in the columns of these. Each row is computed in its own process.

Other packages run in an environment of their own, which never sees this program:

    python3 -m venv OUTSIDE
    OUTSIDE/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 termcolor einops \
py-cpuinfo requests pydantic
    OUTSIDE/bin/pip install --no-deps hqq==0.2.8.post1 auto-round==0.16.1
    OUTSIDE/bin/pip install --no-deps defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 ninja==1.13.2 pillow==13.0.0 \
pypcre==0.6.4 threadpoolctl==3.8.0 tokenicer==0.0.14 torchao==0.18.0
    OUTSIDE/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0

``--no-deps`` keeps them from replacing PyTorch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from typing import Any, Literal

import torch

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.compared import OUTSIDE, OWN, Options, Row, measure, suffix
from benchmarks.report import settings_of, write_report
from lbllm.baselines.methods import METHODS
from lbllm.checkpoints.find import find_checkpoint, find_teacher
from lbllm.config import DEFAULT_MODEL
from lbllm.errors import ConfigError
from lbllm.measure.zero_shot import task_names

# Keys of a measured row that are not its figures.
ABOUT = ("label", "kind", "act_bits", "bits", "questions", "seed", "minutes", "memory_mb")


def figures(row: dict[str, Any]) -> dict[str, str]:
    """The figures of a measured row as they are printed, by their columns."""
    found: dict[str, str] = {}
    for key, value in row.items():
        if key in ABOUT or key.endswith("_stderr"):
            continue
        error = row.get(f"{key}_stderr")
        if error is not None:
            cell = f"{value:.1%} ± {error:.1%}"
        else:
            cell = f"{value:.1%}" if key == "average" else f"{value:,.2f}"
        found[f"{key}{suffix(row['act_bits'])}"] = cell
    return found


def table(models: list[list[dict[str, Any]]]) -> str:
    """Models as ``measure`` gives them as a Markdown table of a line each; a column that a model has nothing for stays
    empty."""
    shown = [{column: cell for row in rows for column, cell in figures(row).items()} for rows in models]
    columns = list(dict.fromkeys(column for cells in shown for column in cells))
    columns.sort(key=lambda column: column.endswith(", A4"))
    lines = []
    for (row, *_), cells in zip(models, shown, strict=True):
        bpw = "" if row["bits"] is None else f"{row['bits']:.3f}"
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
        memory = f"{row['memory_mb']}" if "memory_mb" in row else ""
        lines.append([row["label"], bpw, *(cells.get(column, "") for column in columns), minutes, memory])
    return markdown.table(["", "bits per weight", *columns, "minutes", "peak, MB"], lines)


def rows_of(methods: str, sizes: str, checkpoints: list[str], outside: str | None) -> list[Row]:
    """The table's rows: the teacher, each method at each group size, checkpoints. Raises ConfigError."""
    rows = [Row("teacher", "")]
    for name in filter(None, methods.split(",")):
        kind: Literal["baseline", "own", "outside"] = (
            "own" if name in OWN else "outside" if name in OUTSIDE else "baseline"
        )
        if kind == "baseline" and name not in METHODS:
            raise ConfigError(f"--methods {name}: choose from {', '.join((*METHODS, *OWN, *OUTSIDE))}")
        if kind == "outside" and outside is None:
            raise ConfigError(f"--methods {name} needs --outside with the environment that it is installed in")
        for size in sizes.split(","):
            rows.append(Row(kind, name, size_of(size, "--group-sizes")))
    return rows + [Row("checkpoint", folder) for folder in checkpoints]


def size_of(text: str, setting: str) -> int:
    """The size of a group that a setting names. Raises ConfigError."""
    if not text.removeprefix("-").isdigit() or int(text) < -1 or int(text) == 0:
        raise ConfigError(f"{setting} {text}: a size is 1 or more, or -1 for a whole row")
    return int(text)


def own_process(row: Row) -> list[dict[str, Any]] | None:
    """What ``measure`` gives of a row, by this program called again with the same arguments; None where that failed."""
    command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], "--row", json.dumps(asdict(row))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        progress(f"{row.kind} {row.name} {row.group_size}: no row, see above")
        return None
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    progress(table([found]))  # hours may pass until all rows are there
    return found


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--teacher", default=DEFAULT_MODEL)
    parser.add_argument("--methods", default="rtn,gptq,billm,arb,bwa", help=", ".join((*METHODS, *OWN, *OUTSIDE)))
    parser.add_argument("--group-sizes", default="128", help="joined by commas; -1: the whole row")
    packed = "packed: its folder, a finished run's id, or shipped; may be repeated"
    parser.add_argument("--checkpoint", action="append", default=[], metavar="CHECKPOINT", help=packed)
    parser.add_argument("--corpus", default="embedded", help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=24_576, help="to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence that is calibrated on")
    parser.add_argument("--damping", type=float, default=0.01, help="of the Hessians, as published; not of the stages")
    parser.add_argument("--texts", default="wikitext2,c4", help="for perplexity: wikitext2, corpora, files")
    parser.add_argument("--window", type=int, default=2_048)
    parser.add_argument("--limit", type=int, help="windows of each text; all by default")
    parser.add_argument(
        "--act-bits", default="16", choices=("16", "4", "16,4"), help="of the inputs; 16: not quantized"
    )
    parser.add_argument("--act-group-size", default="-1", help="inputs that share a range; -1: all of a token")
    parser.add_argument("--param-bits", type=int, default=16, choices=(16, 8, 4), help="of our own stages' groups")
    parser.add_argument("--tasks", help="zero-shot tasks joined by commas, or all")
    parser.add_argument("--task-limit", type=int, help="questions of each task; all by default")
    parser.add_argument("--outside", metavar="ENV", help="environment of hqq, auto-round and gptqmodel")
    parser.add_argument("--jobs", type=count, default=1, help="rows made at once, each in a process of its own")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = Options(
        **{name: getattr(given, name) for name in ("teacher", "corpus", "tokens", "seq_len", "damping")},
        **{name: getattr(given, name) for name in ("window", "limit", "task_limit", "outside")},
        param_bits=given.param_bits,
        act_group_size=size_of(given.act_group_size, "--act-group-size"),
        act_bits=tuple(int(bits) for bits in given.act_bits.split(",")),
        texts=tuple(given.texts.split(",")),
        tasks=tuple(task_names(given.tasks)) if given.tasks else (),
    )
    if given.row:
        print(json.dumps(measure(Row(**json.loads(given.row)), options, progress)))
        return
    rows = rows_of(given.methods, given.group_sizes, given.checkpoint, given.outside)
    find_teacher(options.teacher)
    for name in given.checkpoint:
        find_checkpoint(name)
    threads = f"{torch.get_num_threads()} threads" + (f" a row, {given.jobs} rows at once" if given.jobs > 1 else "")
    print(f"{given.tokens:,} tokens of {given.corpus}, {threads}, {date.today()}", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        models = [found for found in pool.map(own_process, rows) if found is not None]
    print(table(models))
    if given.out:
        write_report(given.out, "quality", settings_of(given, "row"), [row for model in models for row in model])


if __name__ == "__main__":
    main()
