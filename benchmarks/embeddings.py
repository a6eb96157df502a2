"""What the bits of embeddings and output head cost: ``python -m benchmarks.embeddings [CHECKPOINT]``.

The checkpoint is given embeddings of 16, 8, 6 and 4 bits (``lbllm repack``), from its teacher's weights. For each: the
bytes of the file; the bits of an embedding's weight, scales included; perplexity, and KL and agreement with the
teacher, on the first windows of a held-out text; and, in processes of their own that take turns, decoding speed as a
ratio to that with 16 bits, and the memory of the process after decoding, without that of the libraries (as
``benchmarks.decode``). The median over the rounds counts. With ``--rounds 0`` only the quality is measured.

    python -m benchmarks.embeddings --train 65536 --bits 16,6,4 --rounds 0

With ``--train`` each of them goes on in stage 4 first, with so many tokens of --corpus and the same settings, in which
the scales of 4-bit embeddings learn, too. It is all measured before, and after that.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import find_checkpoint, teacher_of
from lbllm.checkpoints.hf import load
from lbllm.config import SHIPPED, make_config
from lbllm.errors import ConfigError
from lbllm.events import BlockDone
from lbllm.measure.perplexity import divergences
from lbllm.models.teacher import load_teacher
from lbllm.pipeline.run import run
from lbllm.pipeline.start import settings_to_go_on
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


def trained(folder: Path, teacher: str, corpus: str, tokens: int, place: Path) -> Path:
    """The checkpoint of a run that goes on from the one in ``folder`` with stage 4."""
    changes = settings_to_go_on(str(folder)) | {"model": teacher, "corpus": corpus, "e2e": {"tokens": tokens}}
    for event in run(make_config("quick", changes), place, request=lambda: None):
        if isinstance(event, BlockDone):
            progress(f"{place.name}: loss {event.loss_before:.4f}, {event.loss_after:.4f} after {event.seconds:.0f} s")
    return place / "checkpoint"


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
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="16 and others, joined by commas")
    parser.add_argument("--train", type=count, metavar="TOKENS", help="of stage 4")
    parser.add_argument("--corpus", default="embedded+wikipedia", help="to train on")
    options = parser.parse_args()
    found = find_checkpoint(options.checkpoint)
    teacher = options.teacher or teacher_of(found)
    asked = [bits for bits in BITS if str(bits) in options.bits.split(",")]
    if asked[:1] != [16]:
        raise ConfigError(f"--bits {options.bits}: 16 must be among them, the others are compared with it")
    with tempfile.TemporaryDirectory() as place:
        folders: dict[int, Path] = {}
        for bits in asked:
            folders[bits] = repack(found, bits, Path(place) / f"bits-{bits}", teacher=teacher).path
            progress(f"{bits} bits are packed")
        measured = partial(quality, teacher=teacher, text=options.text, window=options.window, limit=options.limit)
        rows = measured(folders)
        if options.train:
            for bits in asked:
                ended = Path(place) / f"trained-{bits}"
                folders[bits] = trained(folders[bits], teacher, options.corpus, options.train, ended)
            rows = [row | {"trained": 0} for row in rows]
            rows += [row | {"trained": options.train} for row in measured(folders)]
        fast = speeds(folders, options.rounds) if options.rounds else {}
    rows = [row | fast.get(row["embedding_bits"], {}) for row in rows]
    print(f"{options.text}, {options.limit} windows, teacher {rows[0]['teacher_perplexity']:.2f}, {date.today()}")
    heads = ["trained on", "bits", "with scales", "file, MB", "perplexity", "change", "KL", "same top token"]
    heads += ["memory, MB", "speed"]
    print(markdown.table(heads, [cells(row) for row in rows]))
    if options.out:
        write_report(options.out, "embeddings", settings_of(options) | {"teacher": teacher}, rows)


def cells(row: dict[str, Any]) -> list[str]:
    """The printed row."""
    shown = [f"{row.get('trained', 0):,}", str(row["embedding_bits"])]
    shown += [f"{row['stored_bits']:.2f}", f"{row['disk_mb']:.1f}"]
    shown += [f"{row['perplexity']:.3f}", f"{row['change']:+.2%}", f"{row['kl']:.4f}", f"{row['same_top']:.1%}"]
    return shown + ([str(row["model_mb"]), f"{row['speed']:.2f}"] if "speed" in row else ["", ""])


if __name__ == "__main__":
    main()
