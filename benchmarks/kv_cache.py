"""What a KV cache in few bits costs, by the position of the tokens: ``python -m benchmarks.kv_cache [MODEL]``.

    python -m benchmarks.kv_cache --text notes.txt --window 8192
    python -m benchmarks.kv_cache shipped --formats 16 4 4/64/1

One model, a teacher or a packed checkpoint with a 16-bit cache, on the same windows, with caches of several formats:
BITS, or BITS/GROUP/FIRST for keys in groups of GROUP tokens with FIRST tokens in 16 bits. Every token is predicted as
in a chat: what it sees of the others does not depend on how much text is read at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import open_model
from lbllm.checkpoints.hf import keep_bits
from lbllm.config import DEFAULT_MODEL
from lbllm.errors import ConfigError
from lbllm.machine import float32_products
from lbllm.measure.cache_size import cache_size
from lbllm.measure.perplexity import ROWS
from lbllm.models.blocks import share_copy
from lbllm.quant.kv_cache import KVFormat
from lbllm.sections import WHOLE_ROW
from lbllm.texts.windows import evaluation_windows

FORMATS = ("16", "4", "4/64/1")
SHORTEST = 256  # tokens of the first range of positions; each further one is as long as all before it


def format_of(text: str) -> KVFormat:
    """The format that an option names."""
    try:
        bits, group, first = [*map(int, text.split("/")), *(WHOLE_ROW, 0)[len(text.split("/")) - 1 :]]
        found = KVFormat(bits, group, first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BITS or BITS/GROUP/FIRST, for example 4/64/1") from None
    if bits not in (4, 8, 16) or (group < 1 and group != WHOLE_ROW) or first < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: bits are 4, 8 or 16, a group has a token or more")
    return found


def format_label(kv: KVFormat) -> str:
    """A format in words."""
    return f"KV{kv.bits}, keys in groups of {kv.group_size}, {kv.first} first" if kv.in_groups else f"KV{kv.bits}"


def ranges(length: int) -> list[tuple[int, int]]:
    """Ranges of the positions 1 to length - 1, which are predicted, as (first, one after the last)."""
    edges = [1]
    while edges[-1] < length:
        edges.append(min(length, 2 * edges[-1] if edges[-1] > 1 else SHORTEST))
    return list(pairwise(edges))


@torch.no_grad()
@float32_products()
def losses(model: PreTrainedModel, window: Tensor) -> Tensor:
    """The negative log-likelihood of the tokens 2 to T of token ids (T,), in nats: (T - 1,), float64.

    The logits of ROWS tokens exist at a time."""
    made: Any = model
    hidden = made.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]
    parts = []
    for rows, wanted in zip(hidden.split(ROWS), window[1:].split(ROWS), strict=True):
        logits = made.get_output_embeddings()(rows).float()
        parts.append(-logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
    return torch.cat(parts)


def measured(
    opened: Callable[[], PreTrainedModel], formats: Sequence[KVFormat], windows: Tensor, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Perplexity by range of positions and in all, a row for each; ``opened`` gives a model with a 16-bit cache.
    ``windows``: token ids (n, T)."""
    found: dict[KVFormat, Tensor] = {}
    sizes = {}
    for kv in formats:
        model = opened()
        if kv.bits < 16:
            keep_bits(model, model.base_model, kv)
        found[kv] = torch.stack([losses(model, window) for window in windows])
        sizes[kv] = cache_size(model.config, kv, windows.shape[1])
        report(f"{format_label(kv)}: {math.exp(float(found[kv].mean())):.3f}")
    rows = []
    length = windows.shape[1]
    for start, stop in (*ranges(length), (1, length)):
        base = math.exp(float(found[formats[0]][:, start - 1 : stop - 1].mean()))
        for kv in formats:
            value = math.exp(float(found[kv][:, start - 1 : stop - 1].mean()))
            size = sizes[kv]
            row = {"positions": f"{start:,} to {stop - 1:,}", "cache": format_label(kv), "perplexity": value}
            row |= {"change": value / base - 1, "bits": None if size is None else size.bits}
            rows.append(row | {"cache_bytes": None if size is None else size.nbytes})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; the bits are those of a cache that holds a whole window."""
    cells = [
        [row["positions"], row["cache"], f"{row['perplexity']:.3f}", f"{row['change']:+.2%}", f"{row['bits'] or 0:.2f}"]
        for row in rows
    ]
    return markdown.table(["positions", "cache", "perplexity", f"over {rows[0]['cache']}", "bits a value"], cells)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a teacher, or a packed checkpoint")
    parser.add_argument("--text", default="wikitext2", help="wikitext2, a file, or a corpus' held-out part")
    parser.add_argument("--window", type=count, help="tokens of a window; 2,048 by default")
    parser.add_argument("--limit", type=count, default=1, help="windows")
    parser.add_argument("--formats", type=format_of, nargs="+", default=[*map(format_of, FORMATS)], metavar="FORMAT")
    options = parser.parse_args()
    model, tokenizer = open_model(options.model)
    packed = getattr(model.config, "quantization_config", None)
    if packed is not None and packed.format.kv_bits != 16:
        raise ConfigError(f"{options.model} has a KV cache in few bits; give a checkpoint with one in 16 bits")
    windows = evaluation_windows(options.text, model, tokenizer, options.window, options.limit)
    rows = measured(lambda: share_copy(model), options.formats, windows, progress)
    print(f"{options.model}, {options.text}, {len(windows)} windows of {windows.shape[1]} tokens\n\n{table(rows)}")
    if options.out:
        facts = {"formats": [format_label(kv) for kv in options.formats], "window": windows.shape[1]}
        write_report(options.out, "kv_cache", settings_of(options) | facts, rows)


if __name__ == "__main__":
    main()
