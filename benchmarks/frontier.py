"""Perplexity against bits, every method at its best: ``python -m benchmarks.frontier FOLDER --outside OUTSIDE``.

    python -m benchmarks.frontier FOLDER --outside OUTSIDE                      all rows, from 8,192 tokens
    python -m benchmarks.frontier FOLDER --outside OUTSIDE --rows gptq,own      only these, or those that begin so
    python -m benchmarks.frontier FOLDER --outside OUTSIDE --rows best --act-bits 16,4
    python -m benchmarks.frontier FOLDER --outside OUTSIDE --rows best --tokens 131072
    python -m benchmarks.frontier FOLDER --show --out docs/results/frontier.json

One protocol for all rows: the same teacher, calibration tokens, windows and questions. Each row is computed in a
process of its own and stored in FOLDER as soon as it is there, so the program can be stopped and started again; it goes
on with the rows that are missing. A row that fails is reported and left out. ``--rows best`` takes the four best other
methods by what is in FOLDER, and ours. ``--list`` prints the rows' keys; ``--show`` computes nothing.

Rows are measured with the inputs left alone (A16), and with ``--act-bits 16,4`` also with inputs and KV cache in plain
4 bits, with ranges of 64 inputs as ours have them (A4KV4; BWA keeps its 8-bit channels' inputs in 8 bits). Our own rows
have a mode each, their own. Methods that train take the same number of steps, so about the same time, which is printed.
Bits count everything stored. Our own rows are means over three seeds, with the least and the greatest beside them.
The options of each row are below; OUTSIDE is the environment that ``benchmarks.quality`` describes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message, progress
from benchmarks.compared import Options, Row, measure
from benchmarks.report import commit, machine, plain, settings_of, write_report
from lbllm.config import DEFAULT_MODEL
from lbllm.errors import ConfigError
from lbllm.files import write_file
from lbllm.labels import group_name
from lbllm.measure.zero_shot import task_names
from lbllm.sections import ACT_GROUP_SIZE

SEEDS = (0, 1, 2)
BEST = 4  # other methods that --rows best takes
ABOUT = ("label", "method", "key", "kind", "inputs", "bits", "tokens", "seeds", "questions", "seed", "minutes")
# Our formats by bits: groups with 4-bit parameters.
OWN_GROUPS = (64, 32, 24, 16)
OWN_PLANES = ((-1, 16), (64, 4))  # groups of W(1+1+1) and bits of their scale
STEP = 512  # tokens of a training step, AutoRound's with one sequence


def all_rows(tokens: int = 8_192, steps: int = 200) -> dict[str, tuple[str, Row]]:
    """The rows of the table by their keys: what is shown, and how each is made. All methods that train take about so
    many ``steps`` a block: AutoRound by its own count, the others by how often they use the ``tokens``."""
    epochs = max(1, steps * STEP // tokens)
    rows: dict[str, tuple[str, Row]] = {"teacher": ("Teacher", Row("teacher", ""))}

    def add(key: str, label: str, kind: Any, name: str, size: int, **how: Any) -> None:
        rows[key] = (f"{label}, {group_name(size)}", Row(kind, name, size, how))

    for size in (128, 64, 32):
        add(f"rtn-2-g{size}", "RTN, 2 bits, clipping", "baseline", "rtn", size, bits=2, clip=True)
        add(f"gptq-2-g{size}", "GPTQ, 2 bits", "baseline", "gptq", size, bits=2)
    for size in (-1, 128):
        add(f"rtn-3-g{size}", "RTN, 3 bits, clipping", "baseline", "rtn", size, bits=3, clip=True, symmetric=True)
        add(f"gptq-3-g{size}", "GPTQ, 3 bits", "baseline", "gptq", size, bits=3, symmetric=True)
        add(f"gptq-3a-g{size}", "GPTQ, 3 bits, asymmetric", "baseline", "gptq", size, bits=3)
    for size in (128, 64):
        add(f"bwa-g{size}", "BWA", "baseline", "bwa", size)
        add(f"billm-g{size}", "BiLLM", "baseline", "billm", size)
    add("arb-g128", "ARB-LLM", "baseline", "arb", 128)
    for bits, size in ((2, 64), (2, 32), (3, -1), (3, 192)):
        add(f"hqq-{bits}-g{size}", f"HQQ, {bits} bits", "outside", "hqq", size, bits=bits)
    for bits, size in ((2, 128), (2, 64), (2, 32), (2, 16), (3, -1), (3, 128)):
        way: dict[str, Any] = {"bits": bits, "sym": True, "iters": steps}
        add(f"auto-round-{bits}-g{size}", f"AutoRound, {bits} bits", "outside", "auto-round", size, **way)
    for size in (-1, 128):
        way = {"bits": 3, "sym": False, "iters": steps}
        add(f"auto-round-3a-g{size}", "AutoRound, 3 bits, asymmetric", "outside", "auto-round", size, **way)
    for size in (64, 32):
        add(f"gptqmodel-2-g{size}", "GPTQModel, 2 bits", "outside", "gptqmodel", size, bits=2, sym=False, mse=2.4)
    way = {"bits": 3, "sym": True, "mse": 2.4, "desc_act": True, "act_group_aware": False}
    add("gptqmodel-3-g-1", "GPTQModel, 3 bits", "outside", "gptqmodel", -1, **way)
    for bits, size in ((2, 128), (2, 64), (2, 32), (3, 128)):
        way = {"bits": bits, "block_epochs": epochs}
        add(f"efficient-qat-{bits}-g{size}", f"EfficientQAT, {bits} bits", "trained", "efficient-qat", size, **way)
    for bits, size in ((2, 128), (2, 64), (2, 32), (2, 16), (3, -1), (3, 128)):
        way = {"bits": bits, "symmetric": True, "wat": {"epochs": epochs}}
        add(f"even-{bits}-g{size}", f"Even levels by our stages, {bits} bits", "trained", "even", size, **way)
    for size in OWN_GROUPS:
        rows |= own_rows(f"own-g{size}", "Ours, W(1+1)", size, {"quant": {"param_bits": 4}}, epochs)
    for size, param_bits in OWN_PLANES:
        how = {"quant": {"format": "w1+1+1", "param_bits": param_bits}}
        rows |= own_rows(f"own3-g{size}", "Ours, W(1+1+1)", size, how, epochs)
    return rows


def own_rows(key: str, label: str, size: int, how: dict[str, Any], epochs: int) -> dict[str, tuple[str, Row]]:
    """The rows of one of our formats: stage 1; stages 1 and 2 with the tokens once; stages 1, 2 and 4 with so many
    epochs of stage 2; all four with 4-bit activations and KV cache. The last two from several seeds, which order the
    texts. ``how``: the format, as changes of a run's settings."""
    shown = f"{label}, {group_name(size)}"
    rows = {f"{key}-1": (f"{shown}: stage 1", Row("own", "stage1", size, how))}
    rows[f"{key}-12"] = (f"{shown}: stages 1 and 2", Row("own", "stage2", size, how))
    for seed in SEEDS:
        ways = how | {"wat": {"epochs": epochs}, "seed": seed}
        rows[f"{key}-124-s{seed}"] = (f"{shown}: stages 1, 2 and 4", Row("own", "stages124", size, ways))
        ways = ways | {"quant": how["quant"] | {"act_group_size": ACT_GROUP_SIZE}}
        rows[f"{key}-1234-s{seed}"] = (f"{shown}: all stages, A4KV4", Row("own", "stage4", size, ways))
    return rows


def chosen(rows: dict[str, tuple[str, Row]], given: str, folder: Path, text: str) -> list[str]:
    """The keys that ``--rows`` means; ``text`` decides which are the best. Raises ConfigError where it means none."""
    if given == "best":
        found = [one for one in merged(folder, 8_192) if one["inputs"] == "A16" and one["kind"] != "teacher"]
        others = sorted((one for one in found if one["kind"] != "own"), key=lambda one: float(one[text]))
        best: dict[str, str] = {}
        for one in others:
            best.setdefault(one["method"], one["key"])
        keys = list(best.values())[:BEST]
        return ["teacher", *keys, *(key for key in rows if rows[key][1].kind == "own")]
    words = given.split(",")
    keys = [key for key in rows if given == "all" or any(_is_meant(key, word, rows) for word in words)]
    if not keys:
        raise ConfigError(f"--rows {given}: no row has a key that begins so; --list prints the keys")
    return keys


def _is_meant(key: str, word: str, rows: Container[str]) -> bool:
    """A whole key means this row alone."""
    return key == word if word in rows else key.startswith(word)


def stored(folder: Path, key: str, tokens: int) -> Path:
    """The file of a row's figures."""
    return folder / f"{key}@{tokens}.json"


def is_there(path: Path, row: Row, options: Options) -> bool:
    """Whether the row was measured with these settings, and with all bits of inputs that are asked for."""
    if not path.is_file():
        return False
    found, wanted = json.loads(path.read_bytes()), protocol(options)
    bits, asked = set(found["options"].pop("act_bits")), set(wanted.pop("act_bits"))
    enough = row.kind == "own" or asked <= bits
    return bool(enough and found["row"] == asdict(row) and found["options"] == wanted)


def protocol(options: Options) -> dict[str, Any]:
    """What decides a row's figures, as JSON gives it back."""
    kept = {name: value for name, value in asdict(options).items() if name != "outside"}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def compute(key: str, label: str, row: Row, options: Options, path: Path) -> None:
    """Measure a row in this process and store it."""
    found = measure(row, options, progress)
    for one in found:
        inputs = "A16" if one["act_bits"] == 16 else "A4KV4"
        one |= {"key": key, "label": label, "method": row.name or "teacher", "inputs": inputs, "tokens": options.tokens}
    about: dict[str, Any] = {"row": asdict(row), "options": protocol(options), "date": date.today().isoformat()}
    about |= {"commit": commit(), "machine": machine(), "found": plain(found)}
    write_file(path, f"{json.dumps(about, indent=1)}\n".encode())


def merged(folder: Path, tokens: int | None = None) -> list[dict[str, Any]]:
    """The stored rows, all or from so many tokens, by bits; rows of several seeds are one: means, and the least and
    greatest of each text as TEXT_low and TEXT_high."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*@*.json")):
        for one in json.loads(path.read_bytes())["found"]:
            if tokens in (None, one["tokens"]):
                groups.setdefault((one["label"], one["inputs"], one["tokens"]), []).append(one)
    found = [_mean(same) for same in groups.values()]
    return sorted(found, key=lambda one: (one["inputs"], one["tokens"], one["bits"] or 0))


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = {name: value for name, value in rows[0].items() if name != "act_bits"}
    if len(rows) == 1:
        return first
    numbers = {name for name, value in first.items() if isinstance(value, float) and name != "bits"}
    mean = {name: fmean(float(one[name]) for one in rows) for name in numbers}
    for text in ("wikitext2", "c4"):
        if text in numbers:
            values = [float(one[text]) for one in rows]
            mean |= {f"{text}_low": min(values), f"{text}_high": max(values)}
    return first | mean | {"seeds": len(rows)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    texts = list(dict.fromkeys(name for row in rows for name in row if name not in ABOUT and is_text(name)))
    lines = []
    for row in rows:
        cells = [f"{float(row[text]):,.2f}{_spread(row, text)}" if text in row else "" for text in texts]
        bits = "" if row["bits"] is None else f"{row['bits']:.3f}"
        average = f"{row['average']:.1%}" if "average" in row else ""
        minutes = f"{row['minutes']:.1f}" if "minutes" in row else ""
        lines.append([row["inputs"], row["label"], f"{row['tokens']:,}", bits, *cells, average, minutes])
    return markdown.table(["inputs", "", "tokens", "bits", *texts, "tasks", "minutes"], lines)


def is_text(name: str) -> bool:
    """Whether a figure is a text's perplexity."""
    return name in ("wikitext2", "c4") or name.endswith(".raw")


def _spread(row: dict[str, Any], text: str) -> str:
    low, high = row.get(f"{text}_low"), row.get(f"{text}_high")
    return "" if low is None or high is None else f" ({low:,.2f} to {high:,.2f})"


def run_rows(keys: list[str], rows: dict[str, tuple[str, Row]], options: Options, folder: Path) -> Iterator[str]:
    """Compute the rows that are missing, each in its own process; yields the key of each that is there at the end."""
    for number, key in enumerate(keys, 1):
        path = stored(folder, key, options.tokens)
        if not is_there(path, rows[key][1], options):
            progress(f"{number} of {len(keys)}: {key}")
            words = [word for word in sys.argv[1:] if word != "--show"]
            done = subprocess.run([sys.executable, "-m", "benchmarks.frontier", *words, "--row", key])
            if done.returncode:
                progress(f"{key}: no row, see above")
                continue
        yield key


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the rows are kept")
    parser.add_argument("--rows", default="all", help="all, best, or keys or their beginnings joined by commas")
    parser.add_argument("--list", action="store_true", help="print the keys of the rows")
    parser.add_argument("--show", action="store_true", help="compute nothing; print the rows that are there")
    parser.add_argument("--outside", metavar="ENV", help="environment of hqq, auto-round and gptqmodel")
    parser.add_argument("--teacher", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded+wikipedia", help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=8_192, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=200, help="of a block, for methods that train")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence that is calibrated on")
    parser.add_argument("--texts", default="wikitext2,c4", help="for perplexity: wikitext2, corpora, files")
    parser.add_argument("--window", type=int, default=2_048)
    parser.add_argument("--limit", type=int, default=10, help="windows of each text")
    parser.add_argument("--act-bits", default="16", choices=("16", "16,4"), help="of the inputs")
    parser.add_argument("--act-group-size", type=int, default=ACT_GROUP_SIZE, help="inputs that share a 4-bit range")
    parser.add_argument("--tasks", help="zero-shot tasks joined by commas, paper, or all")
    parser.add_argument("--task-limit", type=int, help="questions of each task, drawn at random; all by default")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    kv_bits: Literal[4] = 4
    options = Options(
        **{name: getattr(given, name) for name in ("teacher", "corpus", "tokens", "seq_len", "window", "limit")},
        damping=0.01,
        texts=tuple(given.texts.split(",")),
        act_bits=tuple(int(bits) for bits in given.act_bits.split(",")),
        act_group_size=given.act_group_size,
        kv_bits=kv_bits,
        param_bits=16,
        tasks=tuple(task_names(given.tasks)) if given.tasks else (),
        task_limit=given.task_limit,
        outside=given.outside,
    )
    rows = all_rows(given.tokens, given.steps)
    if given.row:
        label, row = rows[given.row]
        compute(given.row, label, row, options, stored(given.folder, given.row, options.tokens))
        return
    if given.list:
        print("\n".join(rows))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.show:
        keys = chosen(rows, given.rows, given.folder, options.texts[0])
        outside = [key for key in keys if rows[key][1].kind == "outside"]
        if outside and given.outside is None:
            raise ConfigError(f"{outside[0]} needs --outside with the environment that its package is installed in")
        for _ in run_rows(keys, rows, options, given.folder):
            pass
    found = merged(given.folder)
    print(table(found))
    if given.out:
        write_report(given.out, "frontier", settings_of(given, "row", "list", "show", "folder"), found)


if __name__ == "__main__":
    main()
