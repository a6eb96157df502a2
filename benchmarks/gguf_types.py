"""A checkpoint in llama.cpp's types: ``python -m benchmarks.gguf_types --llama-cpp FOLDER [CHECKPOINT|RUN]``.

The checkpoint is exported in each type. llama.cpp computes the perplexity of each file on the
same windows of a text as the packed model in this program, by the same rule: every window is a text of its own, and all
tokens after its first count. Printed for each file: bits of a binarized weight, megabytes, the error of the weights
relative to the packed ones, perplexity, and a greedy answer. ``benchmarks.gguf_agree`` says how npm puts a prebuilt
llama.cpp into FOLDER.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message, progress
from benchmarks.gguf_agree import as_asked, llama_cpp
from benchmarks.llama_quantize import library_in
from benchmarks.report import ROOT, settings_of, write_report
from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.hf import load
from lbllm.checkpoints.weights import weights_bytes
from lbllm.errors import ModelError
from lbllm.measure.perplexity import perplexity
from lbllm.quant.packed_layer import PackedLinear
from lbllm.share.export import export
from lbllm.share.gguf_names import SHAPES, GgufType
from lbllm.share.gguf_types import pack_layer, stored_matrices
from lbllm.texts.windows import evaluation_tokens

PROMPT = "What is the capital of France?"


def perplexity_in_llama_cpp(modules: str, file: Path, tokens: Tensor) -> float:
    """The perplexity of a GGUF file on windows of token ids (n, T), computed by llama.cpp."""
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.npy"
        np.save(ids, tokens.numpy().astype(np.int32))
        command = [sys.executable, "-m", "benchmarks.llama_logits", str(library_in(Path(modules)).resolve()), str(file)]
        counts = ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(
            [*command, str(ids), "--perplexity", *counts], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
    total, count = json.loads(done.stdout.splitlines()[-1])
    return float(np.exp(total / count))


def own_row(modules: str, dense: Path, kind: str, tokens: Tensor, packed: float) -> dict[str, Any]:
    """The row of a type that llama.cpp's own function makes of the file in bfloat16."""
    file = dense.with_name(f"own-{kind}.gguf")
    command = [sys.executable, "-m", "benchmarks.llama_quantize", str(library_in(Path(modules)).resolve())]
    subprocess.run([*command, str(dense), str(file), kind.upper()], cwd=ROOT, check=True, capture_output=True)
    found = perplexity_in_llama_cpp(modules, file, tokens)
    row = {"label": f"{kind.upper()}, by llama.cpp", "mb": round(file.stat().st_size / 1e6, 1), "bits": None}
    file.unlink()
    return row | {"error": None, "perplexity": found, "change": found / packed - 1, "answer": None}


def weights_in(model: Any, kind: GgufType) -> tuple[float, float]:
    """Bits of a binarized weight in a file of this type, and the error of all of them relative to the packed ones."""
    stored = stored_matrices(model, kind)
    bits = error = whole = count = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        weight = layer.dequantize()
        if kind == "bf16":
            found = weight.bfloat16().float()
        else:
            own = stored[f"{name}.weight"].kind
            blocks = pack_layer(layer, own).numpy()
            found = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[own.upper()]))
        bits += weight.numel() * SHAPES[stored[f"{name}.weight"].kind if kind != "bf16" else kind].bits
        count += weight.numel()
        error += float((found - weight).double().square().sum())
        whole += float(weight.double().square().sum())
    return bits / count, (error / whole) ** 0.5


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help="a packed folder, a run, or shipped")
    parser.add_argument("--llama-cpp", metavar="FOLDER", required=True, help="where npm has installed node-llama-cpp")
    parser.add_argument("--types", default=",".join(SHAPES), help="joined by commas")
    parser.add_argument("--own", default="", help="types that llama.cpp itself makes of the file in bf16")
    parser.add_argument("--text", default="wikitext2", help="for perplexity: wikitext2 or a file")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8, help="windows of the text")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer, at most")
    given = parser.parse_args()
    source = find_checkpoint(given.checkpoint)
    folder = source.folder
    model, tokenizer = load(folder)
    tokens = evaluation_tokens(given.text, tokenizer, seq_len=given.window, limit=given.limit)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.keep_dense(torch.float32)
    progress("packed")
    own = perplexity(model, tokens).perplexity
    rows: list[dict[str, Any]] = [{"label": "packed, in this program", "mb": round(weights_bytes(folder) / 1e6, 1)}]
    rows[0] |= {"bits": None, "error": 0.0, "perplexity": own, "change": 0.0, "answer": None}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in given.types.split(","):
            progress(kind)
            try:
                (file,) = export(source, "gguf", Path(scratch) / kind, gguf_type=kind).path.glob("*.gguf")
            except ModelError as error:
                progress(f"{kind}: no row: {error}")
                continue
            found = perplexity_in_llama_cpp(given.llama_cpp, file, tokens)
            bits, difference = weights_in(model, kind)
            (said,) = llama_cpp(given.llama_cpp, file, [as_asked(tokenizer, PROMPT)], given.tokens)
            row = {"label": kind.upper(), "mb": round(file.stat().st_size / 1e6, 1), "bits": round(bits, 2)}
            row |= {"error": difference, "perplexity": found, "change": found / own - 1}
            rows.append(row | {"answer": tokenizer.decode(said["answer"], skip_special_tokens=True)})
            for own_type in given.own.split(",") if kind == "bf16" and given.own else ():
                progress(f"llama.cpp's own {own_type}")
                rows.append(own_row(given.llama_cpp, file, own_type, tokens, own))
            file.unlink()
    lines = [
        [
            row["label"],
            "" if row["bits"] is None else f"{row['bits']:g}",
            f"{row['mb']:.1f}",
            "" if row["error"] is None else f"{row['error']:.2%}",
            f"{row['perplexity']:.3f}",
            f"{row['change']:+.2%}",
            row["answer"] or "",
        ]
        for row in rows
    ]
    print(
        markdown.table(["", "bits a weight", "file, MB", "error of weights", "perplexity", "change", "answer"], lines)
    )
    if given.out:
        write_report(given.out, "gguf_types", settings_of(given), rows)


if __name__ == "__main__":
    main()
