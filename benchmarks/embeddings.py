"""What the bits of embeddings and output head cost: ``python -m benchmarks.embeddings [CHECKPOINT]``.

The checkpoint is given embeddings of 16, 8, 6 and 4 bits (``lbllm repack``), from its teacher's weights. For each: the
bytes of the file; the bits of an embedding's weight, scales included; perplexity, and KL and agreement with the
teacher, on the first windows of a held-out text; and, in processes of their own that take turns, decoding speed as a
ratio to that with 16 bits, and the memory of the process after decoding, without that of the libraries (as
``benchmarks.decode``). The median over the rounds counts. With ``--rounds 0`` only the quality is measured.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, get_args

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import find_checkpoint, teacher_of
from lbllm.checkpoints.hf import load
from lbllm.config import SHIPPED
from lbllm.measure.perplexity import divergences
from lbllm.models.teacher import load_teacher
from lbllm.quant.packed_embedding import PackedTable, table_weights, tables
from lbllm.sections import EmbeddingBits
from lbllm.share.repack import repack
from lbllm.texts.windows import evaluation_windows

BITS: tuple[EmbeddingBits, ...] = tuple(sorted(get_args(EmbeddingBits), reverse=True))


def quality(folders: dict[int, Path], teacher: str, text: str, window: int | None, limit: int) -> list[dict[str, Any]]:
    """A row for each number of bits: size and quality of the checkpoint in its folder."""
    dense = load_teacher(teacher)
    windows = evaluation_windows(text, dense.model, dense.tokenizer, window, limit)
    students = {bits: load(folder)[0] for bits, folder in folders.items()}
    found = divergences(dense.model, list(students.values()), windows)
    weights, first = table_weights(dense.model), found[0].student_perplexity
    rows = []
    for (bits, student), one in zip(students.items(), found, strict=True):
        parts = [table for table in tables(student).values() if isinstance(table, PackedTable)]
        packed = {id(table.weight): table.weight.nbytes for table in parts}
        row: dict[str, Any] = {
            "embedding_bits": bits,
            "stored_bits": 8 * sum(packed.values()) / weights if packed else 16.0,
            "disk_mb": sum(file.stat().st_size for file in folders[bits].glob("*.safetensors")) / 1e6,
        }
        row |= {"perplexity": one.student_perplexity, "change": one.student_perplexity / first - 1}
        row |= {"kl": one.kl, "same_top": one.top1_agreement, "teacher_perplexity": one.teacher_perplexity}
        rows.append(row)
    return rows


def speeds(folders: dict[int, Path], rounds: int) -> dict[int, dict[str, Any]]:
    """Speed and memory for each number of bits, from processes that take turns."""
    times: dict[int, list[dict[str, float]]] = {bits: [] for bits in folders}
    for round_ in range(rounds):
        for bits, folder in folders.items():
            command = [sys.executable, "-m", "benchmarks.decode", str(folder), "--kind", "packed"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times[bits].append(json.loads(done.stdout.splitlines()[-1]))
            progress(f"round {round_ + 1} of {rounds}: {bits} bits")
    rows = {}
    for bits, turns in times.items():
        pairs = zip(turns, times[BITS[0]], strict=True)
        speed = statistics.median(one["tokens_per_second"] / first["tokens_per_second"] for one, first in pairs)
        memory = statistics.median(one["memory"] - one["libraries"] for one in turns)
        rows[bits] = {"speed": speed, "model_mb": round(memory / 1e6)}
    return rows


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default=SHIPPED, help="packed: its folder, a run's id, or shipped")
    parser.add_argument("--teacher", help="by default what the checkpoint was made from")
    parser.add_argument("--text", default="wikitext-2-raw/wiki.valid.raw", help="wikitext2, a file, or a corpus")
    parser.add_argument("--limit", type=count, default=4, help="windows")
    parser.add_argument("--window", type=int, help="tokens of each; 2,048 by default")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding")
    options = parser.parse_args()
    found = find_checkpoint(options.checkpoint)
    teacher = options.teacher or teacher_of(found)
    with tempfile.TemporaryDirectory() as place:
        folders: dict[int, Path] = {}
        for bits in BITS:
            folders[bits] = repack(found, bits, Path(place) / f"bits-{bits}", teacher=teacher).path
            progress(f"{bits} bits are packed")
        rows = quality(folders, teacher, options.text, options.window, options.limit)
        fast = speeds(folders, options.rounds) if options.rounds else {}
    rows = [row | fast.get(row["embedding_bits"], {}) for row in rows]
    print(f"{options.text}, {options.limit} windows, teacher {rows[0]['teacher_perplexity']:.2f}, {date.today()}")
    heads = ["bits", "with scales", "file, MB", "perplexity", "change", "KL", "same top token", "memory, MB", "speed"]
    print(markdown.table(heads, [cells(row) for row in rows]))
    if options.out:
        write_report(options.out, "embeddings", settings_of(options) | {"teacher": teacher}, rows)


def cells(row: dict[str, Any]) -> list[str]:
    """The printed row."""
    shown = [str(row["embedding_bits"]), f"{row['stored_bits']:.2f}", f"{row['disk_mb']:.1f}"]
    shown += [f"{row['perplexity']:.3f}", f"{row['change']:+.2%}", f"{row['kl']:.4f}", f"{row['same_top']:.1%}"]
    return shown + ([str(row["model_mb"]), f"{row['speed']:.2f}"] if "speed" in row else ["", ""])


if __name__ == "__main__":
    main()
