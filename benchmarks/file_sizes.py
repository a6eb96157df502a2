"""Perplexity against the size of the file: ``python -m benchmarks.file_sizes FOLDER --llama-cpp MODULES``.

    python -m benchmarks.file_sizes FOLDER --llama-cpp MODULES --checkpoint shipped --checkpoint runs/mine
    python -m benchmarks.file_sizes FOLDER --llama-cpp MODULES --show --out docs/results/file_sizes.json

llama.cpp's types of the embedded model, made with its own quantization function from the embedded GGUF file, which is
the teacher, each with and without an importance matrix (from 8,192 tokens of the corpus); beside them checkpoints of
this program. Rows of 576 weights are no multiple of 256, so most of llama.cpp's types fall back to larger ones, as they
do for its users. Printed, by size: megabytes of the file, perplexity on the same windows, and the resident memory of
the model in the process that runs it, after decoding 128 tokens (llama.cpp's through node-llama-cpp, ours in packed
form; that of the libraries alone is subtracted). Perplexities are those of the dequantized weights in float32, ours of
the expanded ones; llama.cpp itself also rounds the inputs of its layers to 8 bits.

A row is stored in FOLDER when it is there, so the program can be stopped and started again. ``benchmarks.decode`` says
how npm puts a prebuilt llama.cpp into MODULES.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message, progress
from benchmarks.compared import windows_of
from benchmarks.decode import PROMPT, TOKENS
from benchmarks.llama_cpp import llama_cpp_command
from benchmarks.llama_quantize import TYPES, library_in
from benchmarks.report import ROOT, plain, settings_of, write_report
from lbllm.checkpoints.find import find_checkpoint, open_teacher
from lbllm.checkpoints.hf import load
from lbllm.checkpoints.weights import weights_bytes
from lbllm.config import DEFAULT_MODEL
from lbllm.files import write_file
from lbllm.measure.perplexity import perplexity
from lbllm.models.blocks import decoder_blocks, linear_layers
from lbllm.models.gguf import convert
from lbllm.models.source import embedded_file
from lbllm.models.teacher import load_teacher
from lbllm.quant.packed_layer import PackedLinear
from lbllm.texts.corpus import load_corpus

CALIBRATION, CALIBRATION_LENGTH = 8_192, 512  # tokens, and tokens of a sequence


def importance(corpus: str) -> dict[str, Tensor]:
    """The mean squared inputs (in) of the teacher's linear layers, float32, by llama.cpp's names of the weights."""
    teacher = open_teacher(DEFAULT_MODEL)
    text = load_corpus(corpus, teacher.tokenizer, seq_len=CALIBRATION_LENGTH, tokens=CALIBRATION)
    sums: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().sum(0)

        return hook

    path, blocks = decoder_blocks(teacher.model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(blocks))
    for number, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            renamed = names.get_name(f"{path}.{number}.{name}.weight", try_suffixes=(".weight",))
            assert renamed is not None
            layer.register_forward_pre_hook(keep(renamed))
    with torch.no_grad():
        for row in text.sequences.split(1):
            teacher.model(input_ids=row, use_cache=False)
    return {name: total / text.tokens for name, total in sums.items()}


def llama_row(kind: str, given: argparse.Namespace, matrix: Path | None) -> dict[str, Any]:
    """A type's row; "embedded" is the file that the teacher comes from."""
    with tempfile.TemporaryDirectory() as name:
        file = embedded_file() if kind == "embedded" else Path(name) / f"{kind}.gguf"
        if kind != "embedded":
            library = str(library_in(Path(given.llama_cpp)))
            command = [
                sys.executable,
                "-m",
                "benchmarks.llama_quantize",
                library,
                str(embedded_file()),
                str(file),
                kind,
            ]
            subprocess.run([*command, *([str(matrix)] if matrix else [])], cwd=ROOT, check=True, capture_output=True)
        plain_copy = Path(name) / "float32.gguf"
        write_dequantized(file, plain_copy)
        teacher = load_teacher(str(convert(plain_copy, Path(name) / "models")))
        plain_copy.unlink()
        found: dict[str, Any] = {"mb": file.stat().st_size / 1e6}
        for text in given.texts.split(","):
            tokens = windows_of(text, teacher.tokenizer, given.window, given.limit, given.corpus)
            found[text] = perplexity(teacher.model, tokens).perplexity
        del teacher
        return found | memory_of(llama_cpp_command("llama_cpp.mjs", given.llama_cpp, file, PROMPT, TOKENS))


def write_dequantized(file: Path, target: Path) -> None:
    """Write a copy of a GGUF file with all tensors in float32, as the package gguf dequantizes them: transformers does
    not read all types."""
    reader = gguf.GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        kind, *parts = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=parts[-1] if parts else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def own_row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint's row."""
    folder = find_checkpoint(name).folder
    model, tokenizer = load(folder)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.keep_dense(torch.float32)
    found: dict[str, Any] = {"mb": weights_bytes(folder) / 1e6}
    for text in given.texts.split(","):
        tokens = windows_of(text, tokenizer, given.window, given.limit, given.corpus)
        found[text] = perplexity(model, tokens).perplexity
    del model
    return found | memory_of([sys.executable, "-m", "benchmarks.decode", name, "--kind", "packed"])


def memory_of(command: list[str]) -> dict[str, Any]:
    """The resident memory of a model, without that of the libraries, by a program that tells both."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {"model_mb": round((told["memory"] - told["libraries"]) / 1e6)}


def missing(given: argparse.Namespace) -> Iterator[tuple[Path, str, str, bool]]:
    """The rows that are not there: where they are kept, kind, name, whether with an importance matrix."""
    asked = [("llama.cpp", "embedded", False)]
    asked += [("llama.cpp", kind, matrix) for kind in given.types.split(",") for matrix in (False, True)]
    asked += [("ours", name, False) for name in given.checkpoint]
    for kind, name, matrix in asked:
        path = given.folder / f"{kind}-{name.replace('/', '+')}{'-imatrix' if matrix else ''}.json"
        if not path.is_file():
            yield path, kind, name, matrix


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    about = ("label", "mb", "model_mb")
    texts = list(dict.fromkeys(name for row in rows for name in row if name not in about))
    lines = [
        [row["label"], f"{row['mb']:.1f}", *(f"{float(row[text]):,.2f}" for text in texts), str(row["model_mb"])]
        for row in rows
    ]
    return markdown.table(["", "file, MB", *texts, "memory of the model, MB"], lines)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the rows are kept")
    parser.add_argument("--llama-cpp", metavar="MODULES", help="where npm has installed node-llama-cpp")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's types, joined by commas")
    packed = "packed: its folder, a finished run's id, or shipped; may be repeated"
    parser.add_argument("--checkpoint", action="append", default=[], metavar="CHECKPOINT", help=packed)
    parser.add_argument("--corpus", default="embedded+wikipedia", help="for the importance matrix")
    parser.add_argument("--texts", default="wikitext2,c4", help="for perplexity: wikitext2, corpora, files")
    parser.add_argument("--window", type=int, default=2_048)
    parser.add_argument("--limit", type=int, default=10, help="windows of each text")
    parser.add_argument("--show", action="store_true", help="compute nothing; print the rows that are there")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    matrix = given.folder / "importance.safetensors"
    for path, kind, name, weighted in [] if given.show else missing(given):
        if kind == "llama.cpp" and given.llama_cpp is None:
            parser.error("llama.cpp's types need --llama-cpp")
        if weighted and not matrix.is_file():
            save_file(importance(given.corpus), matrix)
        progress(path.stem)
        try:
            found = (
                llama_row(name, given, matrix if weighted else None) if kind == "llama.cpp" else own_row(name, given)
            )
        except subprocess.CalledProcessError as error:
            reason = str(error.stderr).strip().splitlines()[-1:] or ["no message"]
            progress(f"{path.stem}: no row: {reason[0][-200:]}")
            continue
        shown = "the embedded file, Q4_1" if name == "embedded" else name
        label = f"{kind}: {shown}{', importance matrix' if weighted else ''}"
        write_file(path, f"{json.dumps(plain({'label': label} | found), indent=1)}\n".encode())
    rows = [json.loads(path.read_bytes()) for path in sorted(given.folder.glob("*.json"))]
    rows.sort(key=lambda row: float(row["mb"]))
    print(table(rows))
    if given.out:
        write_report(given.out, "file_sizes", settings_of(given, "folder", "show"), rows)


if __name__ == "__main__":
    main()
